"""Adapters of other packages into models."""

import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.adapters.convert.adapter_hub import read_adapter_hub
from ptv2_fast.adapters.convert.foreign import FIRST_TOKEN_DENSE, ForeignAdapter, head_of
from ptv2_fast.adapters.convert.peft_layout import CONFIG_NAME, read_peft
from ptv2_fast.adapters.convert.rotation import rotates, turn_keys, warn_of_windows
from ptv2_fast.adapters.convert.state_dicts import read_state_dict
from ptv2_fast.adapters.convert.tensor_files import Stored, check_inside
from ptv2_fast.encoders.adapter_content import select_tensors
from ptv2_fast.encoders.adapter_tensors import ENCODER_NAME, find_saved_names
from ptv2_fast.encoders.attaching import attach_uninitialised
from ptv2_fast.encoders.families import find_family
from ptv2_fast.encoders.family import Family
from ptv2_fast.files import read_json_object
from ptv2_fast.prefix import PTuningV2Config

# Of a backbone: what some versions stored, and what some heads do not read.
_UNUSED = ("position_ids", "token_type_ids")


def import_adapter(
    model: PreTrainedModel,
    source: str | os.PathLike,
    allow_pickle: bool = False,
    is_trainable: bool = False,
) -> PreTrainedModel:
    """Attach to a model what another package trained; `save_adapter` then writes it as ours.

    The logits are those that the other package computes, to rounding: positions are counted as
    there, and where keys rotate, those of the prefix are turned instead. Served are prefixes of
    PEFT; state dicts of P-Tuning v2's own code (`prefix_encoder.*`) and ChatGLM's
    (`transformer.prefix_encoder.*`); and prefixes of the package `adapters`.

    Args:
        model: plain, with the backbone and the head that the adapter was trained on. What the
            adapter leaves as it was (BERT's pooler, with PEFT) stays that of the model.
        source: the adapter's folder, or the file of a state dict.
        allow_pickle: also read pickles (.bin, .pt, .pth), as weights only; else safetensors only.
        is_trainable: continue training it.

    Returns:
        The same object.

    Raises:
        ValueError: for files that are missing, corrupt, truncated or links out of the folder; for
            an adapter of another kind, model, size or head, naming what was expected and what is
            there; for tensors that are missing, unexpected, infinite or NaN. The model stays plain.
    """
    return load_foreign(model, read_foreign(source, allow_pickle), is_trainable)


def read_foreign(source: str | os.PathLike, allow_pickle: bool = False) -> ForeignAdapter:
    """Find out what another package wrote; the numbers stay where they are.

    Raises:
        ValueError: as `import_adapter`.
    """
    source = Path(source)
    path = source / CONFIG_NAME
    if source.is_dir() and path.exists():
        check_inside(path)
        content = read_json_object(path)
        if "peft_type" in content:
            return read_peft(source, content, allow_pickle)
        if "config" in content:
            return read_adapter_hub(source, content, allow_pickle)
        raise ValueError(
            f"{path}: expected an adapter of PEFT (key 'peft_type') or of the package adapters "
            f"(key 'config'), got the keys {sorted(content)!r:.200}"
        )
    return read_state_dict(source, allow_pickle)


def load_foreign(
    model: PreTrainedModel, foreign: ForeignAdapter, is_trainable: bool = False
) -> PreTrainedModel:
    """The second half of `import_adapter`."""
    family = find_family(model.config)
    _check_facts(model, family, foreign)
    others = named_for(model, foreign)
    config = _config(model, family, foreign, others)
    saved = find_saved_names(model, family, config.modules_to_save)
    _check_shapes(model, family, foreign, config)
    _check_others(model, foreign, others, saved)
    tensors = {
        f"{ENCODER_NAME}.{name}": stored.load(torch.float32)
        for name, stored in foreign.prefix.items()
    }
    own = model.state_dict()
    tensors |= {name: others[name].load(own[name].dtype) for name in saved if name in others}
    if foreign.counts_prefix and rotates(family):
        table = f"{ENCODER_NAME}.embedding.weight"
        length = config.num_virtual_tokens
        tensors[table] = turn_keys(tensors[table], model.base_model, family, -length)
        warn_of_windows(model.config)
    attachment = attach_uninitialised(model, config)
    with torch.no_grad():
        for name, target in select_tensors(attachment).items():
            if name in tensors:
                target.copy_(tensors[name])
    attachment.set_trainable(is_trainable)
    if not is_trainable:
        model.eval()
    if foreign.labels is not None and len(foreign.labels) == model.config.num_labels:
        model.config.id2label = dict(enumerate(foreign.labels))
        model.config.label2id = {label: number for number, label in enumerate(foreign.labels)}
    return model


def named_for(model: PreTrainedModel, foreign: ForeignAdapter) -> dict[str, Stored]:
    """What lies beside the prefix, by the names that the model's class has for it.

    The authors' RoBERTa and the heads of `adapters` have a classifier behind a dense layer and
    tanh on the first token. So has RoBERTa's head, and BERT with its pooler.
    """
    found, own = dict(foreign.others), model.state_dict()
    base = "" if model.base_model is model else f"{model.base_model_prefix}."
    pooler, of_head = f"{base}pooler.dense", "classifier.dense"
    # In these families it is tanh between the two; in ELECTRA's it is another function.
    has_own_dense = (
        find_family(model.config).pads_keep_position and "classifier.out_proj.weight" in own
    )
    if has_own_dense and "classifier.weight" in found:
        _rename(found, "classifier", "classifier.out_proj")
        _rename(found, pooler, of_head)
        _rename(found, FIRST_TOKEN_DENSE, of_head)
    elif f"{pooler}.weight" in own:
        _rename(found, FIRST_TOKEN_DENSE, pooler)
    return found


def _rename(found: dict[str, Stored], old: str, new: str) -> None:
    for kind in ("weight", "bias"):
        if f"{old}.{kind}" in found:
            found[f"{new}.{kind}"] = found.pop(f"{old}.{kind}")


def _check_facts(model: PreTrainedModel, family: Family, foreign: ForeignAdapter) -> None:
    """Compare what the adapter says about its model, and whether its package runs such a model."""
    config = model.config
    heads, width = family.key_shape(config)
    own = {
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "token_dim": heads * width,
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
    }
    differences = [
        f"{name} {value!r:.100} against {own[name]!r}"
        for name, value in foreign.facts.items()
        if value != own[name]
    ]
    if differences:
        raise ValueError(
            f"model: expected the model that the adapter {foreign.place} was trained on; adapter "
            f"against model: {', '.join(differences)}"
        )
    head = head_of(model)
    if None not in (head, foreign.head) and head != foreign.head:
        raise ValueError(
            f"model: expected one with the head of the adapter {foreign.place}, "
            f"{foreign.head!r}, got a {type(model).__name__}"
        )
    if foreign.needs_cache:
        check_has_cache(model)


def check_has_cache(model: PreTrainedModel) -> None:
    """Check that PEFT can run a prefix on a model.

    Raises:
        ValueError: when the backbone takes no past keys and values.
    """
    backbone = model.base_model
    names = inspect.signature(backbone.forward).parameters
    if not {"cache", "past_key_values"} & set(names):
        raise ValueError(
            "model: expected a backbone that takes past keys and values, as PEFT's prefixes are, "
            f"got a {type(backbone).__name__}"
        )


def _config(
    model: PreTrainedModel, family: Family, foreign: ForeignAdapter, others: dict[str, Stored]
) -> PTuningV2Config:
    frozen = set(model.state_dict()) - set(find_saved_names(model, family, None))
    modules = sorted(
        module
        for module in set(foreign.trained)
        if any(f".{module}." in f".{name}" for name in frozen & set(others))
    )
    shifts = (
        foreign.counts_prefix
        and not family.keeps_positions
        and family.has_position_table(model.config)
    )
    fields: dict[str, Any] = {
        **foreign.fields,
        "position_offset": "prefix" if shifts else "none",
        "modules_to_save": modules or None,
    }
    if foreign.left_out:
        count = model.config.num_hidden_layers
        fields["layers"] = [index for index in range(count) if index not in foreign.left_out]
    config = PTuningV2Config(**fields)
    if foreign.counts_prefix and rotates(family) and config.prefix_projection:
        raise ValueError(
            f"{foreign.place}: expected the table of a prefix for a {type(model).__name__}, whose "
            "keys rotate, got a projection; save it by PEFT's save_pretrained"
        )
    return config


def _check_shapes(
    model: PreTrainedModel, family: Family, foreign: ForeignAdapter, config: PTuningV2Config
) -> None:
    """Compare the sizes of the prefix's tensors, before any is allocated."""
    heads, head_dim = family.key_shape(model.config)
    shapes = config.tensor_shapes(
        num_layers=model.config.num_hidden_layers, num_heads=heads, head_dim=head_dim
    )
    missing = sorted(set(shapes) - set(foreign.prefix))
    unexpected = sorted(set(foreign.prefix) - set(shapes))
    if missing or unexpected:
        raise ValueError(
            f"{foreign.place}: expected a prefix's table or a whole projection, missing {missing}, "
            f"unexpected {unexpected}"
        )
    for name, shape in shapes.items():
        foreign.prefix[name].check(shape, f"the prefix {name} of this {type(model).__name__}")


def _check_others(
    model: PreTrainedModel, foreign: ForeignAdapter, others: dict[str, Stored], saved: list[str]
) -> None:
    """Compare names and sizes of what lies beside the prefix, and the backbone's own numbers."""
    own, kind = model.state_dict(), type(model).__name__
    base = "" if model.base_model is model else f"{model.base_model_prefix}."
    heads = [name for name in saved if base and not name.startswith(base)]
    missing = sorted(name for name in heads if name not in others)
    unexpected = sorted(name for name in others if name not in own and not _is_unused(name, base))
    if missing or unexpected:
        raise ValueError(
            f"{foreign.place}: expected the adapter of a {kind}, missing {missing!r:.300}, "
            f"unexpected {unexpected!r:.300}"
        )
    for name, stored in others.items():
        if name in own:
            stored.check(tuple(own[name].shape), f"{name} of this {kind}")
    frozen = set(own) - set(saved)
    for name, stored in others.items():
        if name in frozen and not _holds(stored, own[name]):
            raise ValueError(
                f"{stored.file.path}: expected the frozen weights of the model, got others in "
                f"{stored.name}; the adapter was trained on another model"
            )


def _is_unused(name: str, base: str) -> bool:
    """Whether a class of transformers may lack a tensor of the authors' models."""
    in_backbone = bool(base) and name.startswith(base)
    return in_backbone and (name.startswith(f"{base}pooler.") or name.endswith(_UNUSED))


def _holds(stored: Stored, own: Tensor) -> bool:
    """Whether a file has the numbers that a model has, which may be wider or narrower."""
    tensor = stored.file.read(stored.name)
    narrow = min(tensor.dtype, own.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(tensor.to(narrow), own.cpu().to(narrow))
