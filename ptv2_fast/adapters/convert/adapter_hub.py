"""The layout of the package `adapters` (AdapterHub): its prefixes, and the heads beside them.

A prefix is a table in one row, `...prefix_tunings.<name>.<place>.control_trans`, or an embedding
`wte` with the projection `control_trans.0`, tanh, `control_trans.2`. The positions of tokens are
those without a prefix.
"""

import re
from pathlib import Path
from typing import Any

from ptv2_fast.adapters.convert.foreign import (
    FIRST_TOKEN_DENSE,
    ForeignAdapter,
    head_of_class,
    labels_of,
    projection_fields,
    read_count,
)
from ptv2_fast.adapters.convert.tensor_files import (
    Stored,
    TensorFile,
    check_inside,
    find_tensors,
    open_tensors,
)
from ptv2_fast.files import read_json_object

_NAME = re.compile(r"(?:.*\.)?prefix_tunings\.[^.]+\.([^.]+)\.(.+)")
_PLACES = ("self_prefix", "encoder_prefix", "self")  # of an encoder's own attention
_PARTS = {
    "wte.weight": "embedding.weight",
    **{f"control_trans.{i}.{kind}": f"projection.{i}.{kind}" for i in (0, 2) for kind in
       ("weight", "bias")},
}  # fmt: skip
_TABLE = "control_trans"
_HEAD_CONFIG = "head_config.json"
_HEAD_NAME = re.compile(r"heads\.[^.]+\.(\d+)\.(weight|bias)")
_HEAD_TYPES = {
    "classification": "sequence",
    "multiple_choice": "choice",
    "question_answering": "question",
    "tagging": "token",
}


def read_adapter_hub(folder: Path, content: dict[str, Any], allow_pickle: bool) -> ForeignAdapter:
    """Read a prefix of `adapters`, and its head where one lies beside it.

    Args:
        folder: of the adapter.
        content: of its adapter_config.json.
        allow_pickle: read a .bin.

    Raises:
        ValueError: for another kind of adapter, an option that a prefix here does not have, and
            files that are missing, corrupt or contradict each other.
    """
    place = folder / "adapter_config.json"
    config = content["config"]
    if not isinstance(config, dict) or config.get("architecture") != "prefix_tuning":
        raise ValueError(f"{place}: config.architecture: expected 'prefix_tuning', of an adapter "
                         f"of the package adapters, got {config!r:.100}")  # fmt: skip
    is_flat = config.get("flat", False)
    for name, expected, applies in (
        ("use_gating", False, True),
        ("non_linearity", "tanh", not is_flat),
    ):
        if applies and config.get(name, expected) != expected:
            raise ValueError(f"{place}: config.{name}: expected {expected!r}, got "
                             f"{config[name]!r:.100}")  # fmt: skip
    length = read_count(config, "prefix_length", place)
    file = open_tensors(find_tensors(folder, "adapter", "pytorch_adapter"), allow_pickle)
    prefix = _read_prefix(file, length)
    head, labels, others = _read_head(folder, allow_pickle)
    base = content.get("model_name")
    return ForeignAdapter(
        kind="adapters",
        place=folder,
        prefix=prefix,
        others=others,
        fields={
            "num_virtual_tokens": length,
            "prefix_dropout": config.get("dropout", 0.0),
            **projection_fields(prefix),
        },
        facts={name: content[name] for name in ("model_type", "hidden_size") if name in content},
        counts_prefix=False,
        left_out=_left_out(config, place),
        head=head,
        labels=labels,
        base_model=base if isinstance(base, str) and base else None,
    )


def _read_prefix(file: TensorFile, length: int) -> dict[str, Stored]:
    prefix = {}
    for name in file.shapes:
        match = _NAME.fullmatch(name)
        if match is None or match[1] not in _PLACES or match[2] not in (_TABLE, *_PARTS):
            raise ValueError(f"{file.path}: expected the tensors of a prefix of an encoder, got "
                             f"{name!r:.200}")  # fmt: skip
        is_table = match[2] == _TABLE
        part = "embedding.weight" if is_table else _PARTS[match[2]]
        prefix[part] = Stored(file, name, length if is_table else None)
    return prefix


def _left_out(config: dict[str, Any], place: Path) -> tuple[int, ...]:
    """The layers without a prefix."""
    layers = config.get("leave_out") or []
    if not isinstance(layers, list) or not all(type(index) is int for index in layers):
        raise ValueError(f"{place}: config.leave_out: expected a list of layers, got "
                         f"{layers!r:.100}")  # fmt: skip
    return tuple(layers)


def _read_head(
    folder: Path, allow_pickle: bool
) -> tuple[str | None, tuple[str, ...] | None, dict[str, Stored]]:
    """Which head lies beside a prefix, its labels, and its tensors by their names in a model.

    With two layers the head of classes is what BERT's pooler and classifier are.
    """
    path = folder / _HEAD_CONFIG
    if not path.exists():
        return "bare", None, {}
    check_inside(path)
    description = read_json_object(path)
    file = open_tensors(find_tensors(folder, "model_head", "pytorch_model_head"), allow_pickle)
    config = description.get("config")
    if not isinstance(config, dict):  # of a class of transformers, by whose names it is stored
        labels = labels_of(_inverse(description.get("label2id"), path), path)
        head = head_of_class(str(description.get("model_class")))
        return head, labels, {name: Stored(file, name) for name in file.shapes}
    head, layers = _HEAD_TYPES.get(str(config.get("head_type"))), config.get("layers")
    is_dense = layers == 2 and config.get("activation_function") == "tanh"
    pools = head in ("sequence", "choice")
    if head is None or (layers != 1 and not (is_dense and pools)):
        raise ValueError(f"{path}: config: expected a head of the types {[*_HEAD_TYPES]} with one "
                         "layer, or two with a tanh between them for classification and multiple "
                         f"choice, got {config!r:.200}")  # fmt: skip
    if pools and bool(config.get("use_pooler")) != (layers == 1):
        raise ValueError(
            f"{path}: config.use_pooler: expected a pooler with one layer, or none with two, got "
            f"{config.get('use_pooler')!r:.100} with {layers}"
        )
    out = "qa_outputs" if head == "question" else "classifier"
    names = {1: FIRST_TOKEN_DENSE, 4: out} if layers == 2 else {1: out}
    others = {}
    for name in file.shapes:
        match = _HEAD_NAME.fullmatch(name)
        if match is None or int(match[1]) not in names:
            raise ValueError(f"{file.path}: expected the tensors of a head with {layers} layers, "
                             f"got {name!r:.200}")  # fmt: skip
        others[f"{names[int(match[1])]}.{match[2]}"] = Stored(file, name)
    return head, labels_of(_inverse(config.get("label2id"), path), path), others


def _inverse(label2id: object, path: Path) -> dict[object, object] | None:
    if label2id is None:
        return None
    if not isinstance(label2id, dict):
        raise ValueError(f"{path}: label2id: expected an object, got {label2id!r:.100}")
    return {str(number): label for label, number in label2id.items()}
