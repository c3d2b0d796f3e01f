"""Pretrained encoders, their configurations and tokenizers, made fit for a task."""

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ptv2_fast.encoders import FAMILIES
from ptv2_fast.encoders.family_table import is_encoder
from ptv2_fast.tasks.task import Task
from ptv2_fast.training.dropout import check_dropout, set_dropout
from ptv2_fast.training.options import ModelOptions


def load_pretrained(
    options: ModelOptions, task: Task, labels: list[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pretrained encoder with the task's head for the labels, and its tokenizer.

    Warns when a head that should be pretrained is not.

    Raises:
        OSError, ValueError: for a model that cannot be loaded, or cannot serve the task.
    """
    changes: dict[str, Any] = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    assert options.model is not None
    config = load_config(options.model, **changes)
    _check_class(config, task)
    set_dropout(config, options)
    tokenizer = load_tokenizer(options.model)
    fit_padding(config, tokenizer)
    if config.model_type in FAMILIES:
        FAMILIES[config.model_type].check_tokenizer(tokenizer)
    model, drawn = read_pretrained(task.model_class, options.model, config)
    require_finite_weights(model, options.model)
    _require_complete(options.model, [name for name in drawn if _is_of_encoder(name, model)])
    if drawn and not task.head_is_new:
        warnings.warn(
            f"model: {options.model} has no pretrained head for {task.model_class}; a new one is "
            "used, which has to be trained from nothing",
            stacklevel=2,
        )
    drop_unknown_inputs(tokenizer, model)
    check_dropout(model, options)
    task.adapt_model(model, tokenizer, labels)
    return model, tokenizer


def load_encoder(name: str) -> PreTrainedModel:
    """A pretrained encoder without a head, on the GPU where there is one.

    Raises:
        OSError, ValueError: for a model that cannot be loaded, lacks weights or is not served.
    """
    config = load_config(name)
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model: expected an encoder that is served (`ptv2-fast models` lists them), got the "
            f"model_type {config.model_type!r}"
        )
    auto = "AutoModelForTextEncoding" if config.is_encoder_decoder else "AutoModel"
    model, drawn = read_pretrained(auto, name, config)
    require_finite_weights(model, name)
    _require_complete(name, [key for key in drawn if "pooler" not in key])
    return model.cuda() if torch.cuda.is_available() else model


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Within the context transformers reads a model, a configuration or a tokenizer.

    Args:
        what: is read, for the message.

    Raises:
        OSError, MemoryError: of the machine.
        ValueError: for whatever goes wrong in files of others: transformers and tokenizers check
            few of them, and their errors are of any type.
    """
    try:
        yield
    except BaseException as error:
        of_machine = isinstance(error, MemoryError) or getattr(error, "errno", None) is not None
        # A panic of tokenizers is no Exception.
        is_panic = type(error).__name__ == "PanicException"
        if of_machine or not (is_panic or isinstance(error, Exception)):
            raise
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        words = " ".join(str(error).split())
        raise ValueError(f"{what} cannot be read: {kind}{words:.300}") from error


def read_pretrained(
    auto: str, name: str, config: PretrainedConfig, dtype: torch.dtype = torch.float32
) -> tuple[Any, list[str]]:
    """A pretrained model, and the names of its weights that were drawn at random.

    The checkpoint lacks these, or has others in their place, as of a head for more labels.

    Args:
        auto: name of transformers' class.
        name: of the model, on the hub or a folder.
        config: of the model.
        dtype: of its weights.

    Raises:
        OSError, ValueError: when it cannot be read.
    """
    with reading(f"model: {name}"):
        model, report = getattr(transformers, auto).from_pretrained(
            name,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    others = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    return model, [*report["missing_keys"], *others]


def load_config(name: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a pretrained model; code that comes with it does not run.

    Raises:
        OSError, ValueError: when it cannot be read, or asks for code from elsewhere.
    """
    with reading(f"model: {name}"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **changes)
    attention = config._attn_implementation
    if attention is not None and not str(attention).isidentifier():  # a kernel of the hub
        raise ValueError(f"model: expected {name} to run without foreign code, got the attention "
                         f"implementation {attention!r:.100}")  # fmt: skip
    return config


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A fast tokenizer that also takes text split into words; code with it does not run.

    Args:
        name: on the hub, or a folder; a Path is a folder and never looked for on the hub.

    Raises:
        OSError, ValueError: when there is no fast tokenizer of this model, or a damaged one.
    """
    if isinstance(name, Path) and not name.is_dir():
        raise ValueError(f"tokenizer: expected a folder, got {str(name)!r}")
    # Byte-level tokenizers refuse split words without the blank in front; others ignore it.
    with reading(f"tokenizer: {name}"):
        tokenizer = AutoTokenizer.from_pretrained(
            name, add_prefix_space=True, trust_remote_code=False
        )
    if not tokenizer.is_fast:
        raise ValueError(f"model: expected one with a fast tokenizer, got {str(name)!r}")
    first = [*tokenizer.model_input_names][:1]
    if first != ["input_ids"]:  # by which batches are padded
        raise ValueError(
            f"tokenizer: expected model_input_names that begin with 'input_ids' in {name}, got "
            f"{first!r:.100}"
        )
    return tokenizer


def fit_padding(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a model and its tokenizer agree on the pad token, in place; decoders often have none.

    Then the token that ends a text takes its place, as in transformers' scripts: decoders classify
    by the last token that is no pad. They get no cache, and every model padding on the right, as
    frozen blocks and what reads the results of a batch want it.

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
    tokenizer.padding_side = "right"
    if is_decoder:
        config.use_cache = False


def drop_unknown_inputs(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Let a tokenizer make what a model takes: some make types of tokens for models without."""
    known = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [n for n in tokenizer.model_input_names if n in known]


def fit_inputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """`fit_padding` and `drop_unknown_inputs`, for a model that is there already."""
    fit_padding(model.config, tokenizer)
    drop_unknown_inputs(tokenizer, model)


def _check_class(config: PretrainedConfig, task: Task) -> None:
    """Check that transformers has this encoder with the task's head, and what the encoder needs.

    Raises:
        ValueError: when it has not, or a default is missing that no task can give.
    """
    mapping, kind = getattr(transformers, task.model_class)._model_mapping, type(config)
    is_served = kind in mapping
    if is_served and config.model_type in FAMILIES:
        is_served = is_encoder(mapping[kind], config)
    if not is_served:
        raise ValueError(
            f"model: expected an encoder with a class for {task.model_class}, got the model_type "
            f"{config.model_type!r} (`ptv2-fast models` lists the heads)"
        )
    if getattr(config, "default_language", "") is None:
        raise ValueError(
            "model: expected a configuration with a default_language, which chooses the language "
            f"adapters of {config.model_type!r}, got None"
        )


def _is_of_encoder(name: str, model: PreTrainedModel) -> bool:
    """Whether a method may leave a weight frozen; many encoders come without a pooler."""
    return name.startswith(f"{model.base_model_prefix}.") and "pooler" not in name


def _require_complete(name: str, missing: list[str]) -> None:
    if missing:
        raise ValueError(
            f"model: expected every weight of the encoder in {name}, missing "
            f"{sorted(missing)!r:.200}"
        )


def require_finite_weights(model: PreTrainedModel, place: str | Path) -> None:
    """Raise a ValueError for infinite numbers or NaN among the weights of a model from `place`."""
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        raise ValueError(f"{place}: expected finite numbers, got infinite or NaN ones in {bad[:3]}")
