"""The dropout options of training, whatever a model's configuration calls them."""

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ptv2_fast.training.options import ModelOptions

_ENCODER = ("hidden_dropout_prob", "dropout", "dropout_rate", "embedding_dropout", "mlp_dropout")
_ATTENTION = ("attention_probs_dropout_prob", "attention_dropout")


def set_encoder_dropout(config: PretrainedConfig, options: ModelOptions) -> None:
    """Write the options into the configuration that a model is about to be made from.

    Raises:
        ValueError: for an option that the configuration has no name for.
    """
    attention = options.dropout if options.attention_dropout is None else options.attention_dropout
    for value, names in ((options.dropout, _ENCODER), (attention, _ATTENTION)):
        for name in names:
            if value is not None and hasattr(config, name):
                setattr(config, name, value)
    both = (*_ENCODER, *_ATTENTION)
    for option, known in (("dropout", both), ("attention_dropout", _ATTENTION)):
        value = getattr(options, option)
        if value is not None and not any(hasattr(config, name) for name in known):
            raise ValueError(
                f"{option}: expected None for a model whose {type(config).__name__} has none of "
                f"{', '.join(known)}, got {value}"
            )


def set_head_dropout(model: PreTrainedModel, options: ModelOptions) -> None:
    """Give the dropout modules outside the encoder their rate; a head may have none."""
    value = options.dropout if options.head_dropout is None else options.head_dropout
    inside = set(model.base_model.modules())
    for module in model.modules():
        if value is not None and isinstance(module, nn.Dropout) and module not in inside:
            module.p = value
