"""Save and load adapters: the prefix, the head and whatever else was trained."""

import os
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.encoders.adapter_content import (
    describe_adapter,
    select_tensors,
    written_tensors,
)
from ptv2_fast.encoders.adapter_files import read_adapter, write_adapter
from ptv2_fast.encoders.adapter_tensors import ENCODER_NAME
from ptv2_fast.encoders.attaching import attach_uninitialised, require_attachment
from ptv2_fast.encoders.attachment import Attachment, find_attachment
from ptv2_fast.encoders.families import find_family
from ptv2_fast.encoders.hooks import KNOWN_CODE
from ptv2_fast.encoders.vocabulary import (
    ROWS_NAME,
    check_vocabulary,
    resize_vocabulary,
    restore_rows,
    vocabulary_size,
)
from ptv2_fast.files import find_description
from ptv2_fast.prefix import EXECUTION_FIELDS, PTuningV2Config

# Fields that an adapter and an attached model must share: they decide what the tensors mean.
MATCHED_FIELDS = (
    "num_virtual_tokens",
    "prefix_projection",
    "encoder_hidden_size",
    "layers",
    "position_offset",
    "prefix_gate",
    "modules_to_save",
    "train_biases",
    "train_norms",
    "low_rank",
    "low_rank_alpha",
    "low_rank_targets",
)
_PROBLEM_TYPES = (
    None, "regression", "single_label_classification", "multi_label_classification"
)  # fmt: skip
_SWITCHING = (
    ". An adapter holds the head of its task: a model switches between adapters of one class and "
    "number of labels; for another task load another model, as ptv2_fast.load(folder) does"
)
_MATCHED_SIZES = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads")


def save_adapter(
    model: PreTrainedModel,
    directory: str | os.PathLike,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write ptv2_config.json and ptv2_adapter.safetensors; old files are replaced whole.

    The tensors are

    - the prefix, with its MLP, so that training can go on, and with the biases, norms and low-rank
      updates that train beside it;
    - everything outside the embeddings and encoder layers (head, pooler), and `modules_to_save`;
    - the embeddings of tokens that were added to the vocabulary of the base model.

    Args:
        model: an attached model.
        directory: created when missing.
        state_dict: take the tensors from here, as gathered by a distributed trainer.

    Raises:
        ValueError: when the model is not attached, `directory` is a file or a tensor is missing.
    """
    attachment = require_attachment(model)
    write_adapter(directory, describe_adapter(attachment), written_tensors(attachment, state_dict))


def load_adapter(
    model: PreTrainedModel, directory: str | os.PathLike, is_trainable: bool = False
) -> PreTrainedModel:
    """Load an adapter, or a checkpoint of an attached model, into a model of the same kind.

    A model without a prefix is attached as the adapter's configuration says, with nothing
    trainable and in eval mode unless `is_trainable`. On an attached model the configurations must
    match; what is trainable there, and the mode, stay. The model's configuration takes over
    id2label, label2id and problem_type. Tokens that were added for the adapter are added here too,
    with their embeddings. When anything is wrong the model stays as it was.

    Args:
        model: plain or attached; its backbone must hold the weights the adapter was trained on.
        directory: the folder `save_adapter` or Trainer wrote.
        is_trainable: continue training a model attached here.

    Returns:
        The same object.

    Raises:
        ValueError: for missing, corrupt or truncated files, an unknown format, an adapter of
            another model (naming each difference), class or number of labels, fields that say how a
            model runs, and tensors that are missing, unexpected, of another shape or dtype,
            infinite or NaN.
    """
    description, tensors = read_adapter(directory)
    return put_adapter(model, description, tensors, directory, is_trainable)


def put_adapter(
    model: PreTrainedModel,
    description: dict[str, Any],
    tensors: dict[str, Tensor],
    directory: str | os.PathLike,
    is_trainable: bool = False,
) -> PreTrainedModel:
    """As `load_adapter`, of what was read.

    Args:
        model: see there.
        description: what the adapter says about itself.
        tensors: of the adapter, by name; those of added tokens are taken out.
        directory: where it is from, for messages.
        is_trainable: see there.
    """
    config = read_config(description, directory)
    labels = read_labels(description, directory)
    check_same_model(description, model, with_head=True)
    rows = _take_added_rows(description, tensors, model)
    attachment, size = find_attachment(model), vocabulary_size(model)
    if attachment is not None:
        _check_same_config(config, attachment.config)
    else:
        _check_prefix(config, tensors, model)
    resize_vocabulary(model, description.get("vocab_size", size))
    try:
        if attachment is not None:
            _load_tensors(attachment, tensors, description)
        else:
            attachment = _attach_loaded(model, config, tensors, description, is_trainable)
    except BaseException:
        resize_vocabulary(model, size)
        raise
    restore_rows(model, rows)
    if rows is not None:
        attachment.base_vocabulary_size = description["base_vocab_size"]
    model.config.id2label = labels
    model.config.label2id = {label: index for index, label in labels.items()}
    model.config.problem_type = description["problem_type"]
    return model


def _attach_loaded(
    model: PreTrainedModel,
    config: PTuningV2Config,
    tensors: dict[str, Tensor],
    description: dict[str, Any],
    is_trainable: bool,
) -> Attachment:
    """Attach a prefix to a plain model and load an adapter, or leave the model plain."""
    attachment = attach_uninitialised(model, config)
    try:
        first = f"{ENCODER_NAME}.embedding.weight"
        if tensors[first].dtype == model.dtype == torch.float64:  # as model.double() makes it
            attachment.encoder.double()
        _load_tensors(attachment, tensors, description)
        attachment.set_trainable(is_trainable)
    except BaseException:
        attachment.undo()
        raise
    if not is_trainable:
        model.eval()
    return attachment


def load_prefix(model: PreTrainedModel, directory: str | os.PathLike) -> PreTrainedModel:
    """Copy the prefix of an adapter into an attached model of the same encoder, whatever its head.

    What else the adapter holds of the backbone (a pooler, `modules_to_save`) is copied too, where
    the model trains it.

    Args:
        model: attached with the adapter's configuration; what is trainable stays.
        directory: the folder `save_adapter` or Trainer wrote.

    Returns:
        The same object.

    Raises:
        ValueError: for missing or corrupt files, another encoder or configuration (naming each
            difference), or a model that is not attached.
    """
    attachment = require_attachment(model)
    description, tensors = read_adapter(directory)
    config = read_config(description, directory)
    check_same_model(description, model, with_head=False)
    _check_same_config(config, attachment.config)
    rows = _take_added_rows(description, tensors, model, may_resize=False)
    inside = (f"{ENCODER_NAME}.", f"{model.base_model_prefix}.")
    targets = {
        name: target
        for name, target in select_tensors(attachment).items()
        if name.startswith(inside) and (name in tensors or name.startswith(inside[0]))
    }
    _copy({name: tensors[name] for name in targets if name in tensors}, targets)
    restore_rows(model, rows)
    return model


def read_config(description: dict[str, Any], directory: str | os.PathLike) -> PTuningV2Config:
    """The prefix of an adapter.

    Args:
        description: what the adapter says about itself.
        directory: where, for messages.

    Raises:
        ValueError: for a key that is missing or bad.
    """
    needed = ("prefix_config", "model_class", "num_labels", "id2label", "problem_type")
    missing = [name for name in (*needed, *_MATCHED_SIZES) if name not in description]
    path = find_description(directory)
    if missing:
        raise ValueError(f"{path}: expected the keys {missing}")
    for name in ("prefix_config", "id2label"):
        if not isinstance(description[name], dict):
            raise ValueError(f"{path}: {name}: expected an object, got {description[name]!r}")
    execution = sorted(set(description["prefix_config"]) & set(EXECUTION_FIELDS))
    if execution:
        raise ValueError(
            f"{path}: prefix_config: expected what the adapter is, got {execution}, which say how "
            "a model runs (where it writes, how much memory it takes); attach with them instead"
        )
    return PTuningV2Config.from_dict(description["prefix_config"])


def read_labels(description: dict[str, Any], directory: str | os.PathLike) -> dict[int, str]:
    """The labels of an adapter by their number, one for each.

    Raises:
        ValueError: for others, and for a problem type that transformers does not know.
    """
    path = find_description(directory)
    given, count = description["id2label"], description["num_labels"]
    if set(given) != {str(number) for number in range(len(given))} or len(given) != count:
        raise ValueError(
            f"{path}: id2label: expected a label for each number below num_labels {count!r}, got "
            f"the numbers {list(given)!r:.100}"
        )
    if not all(isinstance(label, str) for label in given.values()):
        raise ValueError(f"{path}: id2label: expected text as labels, got {given!r:.100}")
    problem = description["problem_type"]
    if problem not in _PROBLEM_TYPES:
        raise ValueError(
            f"{path}: problem_type: expected one of {_PROBLEM_TYPES}, got {problem!r:.100}"
        )
    return {int(number): label for number, label in given.items()}


def _check_prefix(
    config: PTuningV2Config, tensors: dict[str, Tensor], model: PreTrainedModel
) -> None:
    """Compare the sizes that a configuration names with the tensors, before any is allocated."""
    heads, head_dim = find_family(model.config).key_shape(model.config)
    shapes = config.tensor_shapes(
        num_layers=model.config.num_hidden_layers, num_heads=heads, head_dim=head_dim
    )
    named = {f"{ENCODER_NAME}.{name}": shape for name, shape in shapes.items()}
    missing = sorted(set(named) - set(tensors))
    if missing:
        raise ValueError(f"adapter: expected the tensors of its prefix, missing {missing}")
    for name, shape in named.items():
        _check_shape(name, tensors[name], shape)
    narrow = {"lora_A": 0, "lora_B": -1}
    ranks = {
        tensor.shape[narrow[kind]]
        for name, tensor in tensors.items()
        if (kind := name.rpartition(".")[2]) in narrow
        if name.startswith(f"{ENCODER_NAME}.") and tensor.dim() == 2
    }
    if config.low_rank is not None and ranks != {config.low_rank}:
        raise ValueError(
            f"adapter: expected updates of low_rank {config.low_rank}, got {sorted(ranks)}"
        )


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], place: str = "adapter") -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{place}: expected {name} of shape {list(shape)}, got {list(tensor.shape)}"
        )


def check_same_model(description: dict[str, Any], model: PreTrainedModel, with_head: bool) -> None:
    """Compare sizes and, with the head, its class and number of labels.

    Raises:
        ValueError: naming each that differs.
    """
    differences = _differences(description, model, _MATCHED_SIZES)
    size, own = description.get("vocab_size"), vocabulary_size(model)
    # Where it alone differs, `check_vocabulary` says what to do.
    if differences and size is not None and own not in (size, description.get("base_vocab_size")):
        differences.append(f"vocab_size {size!r} against {own}")
    heads = _head_differences(description, model) if with_head else []
    if differences or heads:
        raise ValueError(
            "model: expected the model the adapter was trained on, a "
            f"{description['model_class']!s:.100}; adapter against model: "
            f"{', '.join([*differences, *heads])}{_SWITCHING if heads else ''}"
        )


def _differences(
    description: dict[str, Any], model: PreTrainedModel, fields: tuple[str, ...]
) -> list[str]:
    return [
        f"{name} {description[name]!r} against {getattr(model.config, name)!r}"
        for name in fields
        if description[name] != getattr(model.config, name)
    ]


def _head_differences(description: dict[str, Any], model: PreTrainedModel) -> list[str]:
    """Number of labels, and class where both are transformers' own; of others the tensors decide.

    Heads of several tasks have tensors of the same names and shapes.
    """
    if model.base_model is model:  # which has no labels, whatever its configuration says
        found = []
    else:
        found = _differences(description, model, ("num_labels",))
    made_for, own = str(description["model_class"]), type(model)
    library = own.__module__.startswith(KNOWN_CODE) and sys.modules[own.__module__]
    if hasattr(library, made_for) and made_for not in [base.__name__ for base in own.__mro__]:
        found.append(f"class {made_for} against {own.__name__}")
    return found


def _check_same_config(adapter: PTuningV2Config, attached: PTuningV2Config) -> None:
    same = adapter.alpha == attached.alpha
    differences = [
        f"{name} {getattr(adapter, name)!r} against {getattr(attached, name)!r}"
        for name in MATCHED_FIELDS
        if getattr(adapter, name) != getattr(attached, name)
        and not (name == "low_rank_alpha" and same)
    ]
    if differences:
        raise ValueError(
            "model: expected the prefix configuration of the adapter; adapter against model: "
            + ", ".join(differences)
        )


def _take_added_rows(
    description: dict[str, Any],
    tensors: dict[str, Tensor],
    model: PreTrainedModel,
    may_resize: bool = True,
) -> Tensor | None:
    """Remove the rows of added tokens from an adapter's tensors, checked against a model."""
    rows = tensors.pop(ROWS_NAME, None)
    check_vocabulary(description, rows, model, may_resize)
    if rows is not None:
        weight: Any = model.get_input_embeddings().weight
        check_tensors({ROWS_NAME: rows}, {ROWS_NAME: weight[:1].expand_as(rows)})
    return rows


def _load_tensors(
    attachment: Attachment, tensors: dict[str, Tensor], description: dict[str, Any]
) -> None:
    """Copy all tensors, or raise before the first."""
    targets = select_tensors(attachment)
    attachment.drop_guard(tensors)
    missing, unexpected = sorted(set(targets) - set(tensors)), sorted(set(tensors) - set(targets))
    if missing or unexpected:
        raise ValueError(
            f"adapter: expected the tensors of {type(attachment.model).__name__}, got those of "
            f"{description['model_class']}: missing {missing}, unexpected {unexpected}"
        )
    _copy(tensors, targets)


def _copy(tensors: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    """Copy tensors of the same names, or raise before the first."""
    check_tensors(tensors, targets)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def check_tensors(
    tensors: dict[str, Tensor], targets: dict[str, Tensor], place: str = "adapter"
) -> None:
    """Check that tensors can take the place of others without a change.

    Args:
        tensors: name -> tensor, as read from a file.
        targets: those that they replace.
        place: where they are from, for the message.

    Raises:
        ValueError: naming one that is missing, of another shape or dtype, infinite or NaN.
    """
    for name, target in targets.items():
        if name not in tensors:
            raise ValueError(f"{place}: expected a tensor {name}, got none")
        tensor = tensors[name]
        _check_shape(name, tensor, tuple(target.shape), place)
        if tensor.dtype != target.dtype:
            raise ValueError(
                f"{place}: expected {name} of dtype {target.dtype}, as in the model, got "
                f"{tensor.dtype}; load into a model of that dtype, then convert the model"
            )
        if not tensor.isfinite().all():
            raise ValueError(
                f"{place}: expected finite numbers in {name}, got some that are infinite or NaN"
            )
