"""Our adapters for others: in PEFT's layout, and with the projection of the prefix folded."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.adapters.convert.foreign import head_of
from ptv2_fast.adapters.convert.importing import check_has_cache
from ptv2_fast.adapters.convert.peft_layout import (
    BASE,
    CONFIG_NAME,
    LORA_BASE,
    TABLE_NAME,
    TASKS,
    WEIGHTS_NAME,
)
from ptv2_fast.adapters.convert.rotation import rotates, turn_keys, warn_of_windows
from ptv2_fast.adapters.loading import check_tensors, read_config
from ptv2_fast.encoders.adapter_content import written_tensors
from ptv2_fast.encoders.adapter_files import (
    FORMAT_KEY,
    WEIGHTS_KEY,
    read_adapter,
    write_adapter,
    write_files,
)
from ptv2_fast.encoders.adapter_tensors import ENCODER_NAME
from ptv2_fast.encoders.attaching import require_attachment
from ptv2_fast.encoders.attachment import Attachment
from ptv2_fast.encoders.vocabulary import ROWS_NAME

_PARTS = ("embedding.weight", "projection.0.weight", "projection.0.bias", "projection.2.weight",
          "projection.2.bias")  # fmt: skip


def export_peft(model: PreTrainedModel, target: str | os.PathLike) -> None:
    """Write the adapter of a model so that PEFT loads it, with the same logits.

    A prefix becomes PEFT's PREFIX_TUNING, its projection folded; low-rank updates alone become
    LORA.

    Args:
        model: attached.
        target: folder; created when missing.

    Raises:
        ValueError: for what PEFT cannot hold or computes in another way: a model that it runs no
            prefix on, positions without the prefix, a prefix in some layers, a gate, several kinds
            of adapters in one, added tokens, multiple choice.
    """
    attachment = require_attachment(model)
    config = attachment.config
    tensors = written_tensors(attachment)
    if ROWS_NAME in tensors:
        raise ValueError(
            "model: expected the vocabulary of the base model for PEFT, got added tokens"
        )
    head = head_of(model)
    if head not in TASKS:
        raise ValueError(
            f"model: expected one of the heads {[*TASKS]} for PEFT, got a {type(model).__name__}"
        )
    for name in ("prefix_gate", "train_biases", "train_norms"):
        if getattr(config, name):
            raise ValueError(f"{name}: expected none of it for PEFT, got {getattr(config, name)!r}")
    if config.low_rank is not None:
        content, exported = _low_rank(attachment)
    else:
        content, exported = _prefix(attachment)
    base = LORA_BASE if config.low_rank is not None else BASE
    trained = [name for name in tensors if not name.startswith(f"{ENCODER_NAME}.")]
    modules = list(config.modules_to_save or ())
    rest = [name for name in trained if not any(f".{m}." in f".{name}" for m in modules)]
    content |= {
        "base_model_name_or_path": model.config.name_or_path or None,
        "inference_mode": True,
        "modules_to_save": sorted({*modules, *(_module_of(name, model) for name in rest)}) or None,
        "revision": None,
        "task_type": TASKS[head],
    }
    exported |= {f"{base}{name}": tensors[name] for name in trained}
    write_files(target, {CONFIG_NAME: content}, WEIGHTS_NAME, exported)


def fold_adapter(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Write an adapter anew, with its projection folded into the prefix's table.

    It computes the same and is smaller; training cannot go on with the projection.

    Args:
        source: folder of an adapter of ours; one without a projection is written as it is.
        target: folder; created when missing.

    Raises:
        ValueError: for files that are missing or corrupt, sizes that contradict each other, a
            projection of another dtype, and infinite or NaN numbers.
    """
    description, tensors = read_adapter(source)
    config = read_config(description, source)
    check_tensors(tensors, tensors, str(source))
    names = [f"{ENCODER_NAME}.{part}" for part in _PARTS]
    if config.prefix_projection:
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"{source}: expected the tensors of a projection, missing {missing}")
        rows, down, down_bias, up, up_bias = (tensors.pop(name) for name in names)
        (width, hidden), (out, _) = (_sizes(matrix, source) for matrix in (down, up))
        expected = [(config.num_virtual_tokens, hidden), (width, hidden), (width,), (out, width),
                    (out,)]  # fmt: skip
        got = [tuple(tensor.shape) for tensor in (rows, down, down_bias, up, up_bias)]
        if got != expected:
            raise ValueError(f"{source}: expected a projection of the shapes {expected}, got {got}")
        for name, tensor in zip(names, (rows, down, down_bias, up, up_bias), strict=True):
            if tensor.dtype != rows.dtype or tensor.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{source}: expected {name} of dtype torch.float32, got "
                                 f"{tensor.dtype}")  # fmt: skip
        states = nn.functional.linear(rows, down, down_bias).tanh()
        tensors[names[0]] = nn.functional.linear(states, up, up_bias)
    shape = list(tensors[names[0]].shape) if names[0] in tensors else None
    if shape is None or len(shape) != 2 or shape[0] != config.num_virtual_tokens:
        length = config.num_virtual_tokens
        raise ValueError(f"{source}: expected a table of {length} virtual tokens as {names[0]}, "
                         f"got {shape}")  # fmt: skip
    fields = {**description["prefix_config"], "prefix_projection": False,
              "encoder_hidden_size": None}  # fmt: skip
    kept = {
        name: value for name, value in description.items() if name not in (FORMAT_KEY, WEIGHTS_KEY)
    }
    write_adapter(target, {**kept, "prefix_config": fields}, tensors)


def _sizes(matrix: Tensor, place: object) -> tuple[int, int]:
    if matrix.dim() != 2:
        raise ValueError(f"{place}: expected matrices in a projection, got {list(matrix.shape)}")
    return matrix.shape[0], matrix.shape[1]


def _module_of(name: str, model: PreTrainedModel) -> str:
    """The module that PEFT saves whole for a tensor: a part of the model or of its backbone."""
    base = "" if model.base_model is model else f"{model.base_model_prefix}."
    return name.removeprefix(base).partition(".")[0]


def _prefix(attachment: Attachment) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What PEFT's configuration says of a prefix, and its tensors."""
    config, family, model = attachment.config, attachment.family, attachment.model
    check_has_cache(model)
    encoder = attachment.model.get_submodule(ENCODER_NAME)
    if config.layers is not None and len(config.layers) < len(attachment.layers):
        raise ValueError(
            f"layers: expected a prefix in all layers for PEFT, got {list(config.layers)}"
        )
    has_table = family.has_position_table(model.config) and not family.keeps_positions
    if has_table and config.position_offset != "prefix":
        raise ValueError(
            "position_offset: expected 'prefix' for PEFT, which counts the prefix in the positions "
            f"of tokens, got {config.position_offset!r}; train with position_offset='prefix'"
        )
    with torch.no_grad():
        table = encoder.table().float().cpu()  # type: ignore[operator]
    if rotates(family):
        length = config.num_virtual_tokens
        table = turn_keys(table, attachment.backbone, family, length)
        warn_of_windows(model.config)
    content = {
        "peft_type": "PREFIX_TUNING",
        "encoder_hidden_size": None,
        "num_attention_heads": encoder.num_heads,
        "num_layers": len(attachment.layers),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": config.num_virtual_tokens,
        "prefix_projection": False,
        "token_dim": encoder.num_heads * encoder.head_dim,  # type: ignore[operator]
    }
    return content, {TABLE_NAME: table}


def _low_rank(attachment: Attachment) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What PEFT's configuration says of low-rank updates, and their tensors."""
    config = attachment.config
    if config.num_virtual_tokens > 0:
        raise ValueError(
            "low_rank: expected low-rank updates or a prefix for PEFT, got both; PEFT has one kind "
            "in an adapter"
        )
    names = {module: name for name, module in attachment.model.named_modules()}
    targets, exported = [], {}
    for module, stand_in in attachment.vectors.stand_ins.items():
        name = names[module]
        targets.append(name)
        for part in ("lora_A", "lora_B"):
            exported[f"{LORA_BASE}{name}.{part}.weight"] = getattr(stand_in, part)
    rank = config.low_rank
    content = {
        "peft_type": "LORA",
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "r": rank,
        "target_modules": targets,
    }
    return content, exported
