"""What a configuration and a tokenizer need so that a model of any family trains by our options."""

import inspect
import warnings

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ptv2_fast.encoders import FAMILIES
from ptv2_fast.training.options import ModelOptions

# Names of one thing in the configurations of transformers; a family has one or several of each.
_INSIDE = (
    "hidden_dropout_prob", "hidden_dropout", "dropout", "dropout_rate", "embedding_dropout",
    "mlp_dropout",
)  # fmt: skip
_ATTENTION = ("attention_probs_dropout_prob", "attention_dropout")
# Heads of decoders read the last one from configurations that do not have it, too.
_HEAD = (
    "classifier_dropout_prob", "seq_classif_dropout", "qa_dropout", "summary_last_dropout",
    "classifier_dropout",
)  # fmt: skip


def set_dropout(config: PretrainedConfig, options: ModelOptions) -> None:
    """Give a configuration the probabilities that the options ask for, by its own names.

    Raises:
        ValueError: for an option of which the configuration has nothing.
    """
    for option, names in (
        ("dropout", (*_INSIDE, *_ATTENTION)),
        ("attention_dropout", _ATTENTION),
    ):
        value = getattr(options, option)
        known = [name for name in names if hasattr(config, name)]
        if value is not None and not known:
            raise ValueError(
                f"{option}: expected None for the model_type {config.model_type!r}, whose "
                f"configuration has none of {', '.join(names)}; got {value}"
            )
        for name in known if value is not None else ():
            setattr(config, name, float(value))
    head = options.dropout if options.head_dropout is None else options.head_dropout
    if head is not None:
        for name in _HEAD:
            if hasattr(config, name) or name == _HEAD[-1]:
                setattr(config, name, float(head))


def check_head_dropout(model: PreTrainedModel, options: ModelOptions) -> None:
    """Say so when the head of a loaded model has no dropout that the option could set."""
    value = options.head_dropout
    inside = set(model.base_model.modules())
    found = [m.p for m in model.modules() if isinstance(m, nn.Dropout) and m not in inside]
    if value and value not in found:
        warnings.warn(
            f"head_dropout: no effect, the head of {type(model).__name__} has no dropout of its "
            "own",
            stacklevel=2,
        )


def fit_padding(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a model and its tokenizer agree on the pad token, in place; decoders often have none.

    Then the token that ends a text takes its place, as in transformers' scripts: decoders classify
    by the last token that is no pad. They get padding on the right and no cache.

    Raises:
        ValueError: when the tokenizer has neither.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                "tokenizer: expected one with a pad token, or with an end-of-text token to take "
                f"its place, got neither in {tokenizer.name_or_path or type(tokenizer).__name__}"
            )
        tokenizer.pad_token = tokenizer.eos_token
    family = FAMILIES.get(config.model_type)
    is_decoder = family is not None and family.is_decoder
    if is_decoder or getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    if is_decoder:
        tokenizer.padding_side = "right"
        config.use_cache = False


def drop_unknown_inputs(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Let a tokenizer make what a model takes: some make types of tokens for models without."""
    known = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [n for n in tokenizer.model_input_names if n in known]
