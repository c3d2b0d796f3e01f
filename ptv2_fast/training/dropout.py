"""Dropout by our options in models of any family."""

import warnings

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ptv2_fast.encoders import FAMILIES
from ptv2_fast.training.options import ModelOptions

# Names of one thing in the configurations of transformers; a family has one or several of each.
_INSIDE = (
    "hidden_dropout_prob", "hidden_dropout", "dropout", "dropout_rate", "embedding_dropout",
    "embedding_dropout_prob", "mlp_dropout",
)  # fmt: skip
_ATTENTION = ("attention_probs_dropout_prob", "attention_dropout")
# Heads of decoders read the last one from configurations that do not have it, too.
_HEAD = (
    "classifier_dropout_prob", "seq_classif_dropout", "qa_dropout", "summary_last_dropout",
    "cls_dropout", "classifier_dropout",
)  # fmt: skip


def set_dropout(config: PretrainedConfig, options: ModelOptions) -> None:
    """Give a configuration the probabilities that the options ask for, by all names that it has."""
    # DeBERTa's heads read it from configurations that do not have it.
    unnamed = "cls_dropout" if str(config.model_type).startswith("deberta") else None
    inside, attention, head = options.dropout, options.attention_dropout, options.head_dropout
    for names, value in (
        (_INSIDE, inside),
        (_ATTENTION, inside if attention is None else attention),
        (_HEAD, inside if head is None else head),
    ):
        for name in names:
            is_read = hasattr(config, name) or name == _HEAD[-1] or name == unnamed
            if value is not None and is_read:
                setattr(config, name, float(value))


def check_dropout(model: PreTrainedModel, options: ModelOptions) -> None:
    """Check that modules of a model have the probabilities that the options ask for.

    Warns where only the head has none of its own: many have not.

    Raises:
        ValueError: for an option that reaches no module of a supported encoder.
    """
    backbone = set(model.base_model.modules())
    inside: set[float] = set()
    of_head: set[float] = set()
    for module in model.modules():
        group = inside if module in backbone else of_head
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                group.add(value)
        if isinstance(module, nn.Dropout):
            group.add(module.p)
    kind, head = type(model).__name__, options.head_dropout
    for name, known in (("dropout", inside | of_head), ("attention_dropout", inside)):
        value = getattr(options, name)
        if value and value not in known and model.config.model_type in FAMILIES:
            raise ValueError(f"{name}: expected None or 0 for {kind}, no module of which has a "
                             f"probability of its own for that, got {value}")  # fmt: skip
    if head and head not in of_head:
        warnings.warn(
            f"head_dropout: no effect, the head of {kind} has no dropout of its own", stacklevel=2
        )
