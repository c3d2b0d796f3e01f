"""Published weights of GLM (2021): files of THUDM, and those of the code on the hub."""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

# In the order in which a folder is searched.
_NAMES = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json",
    "pytorch_model.bin", "mp_rank_00_model_states.pt",
)  # fmt: skip
_SECOND_PART = "mp_rank_01_model_states.pt"
_PREFIXES = ("glm.", "module.")  # of backbones inside of a model, in files
# What training scripts have written beside the weights; none of it runs code when it is read.
_INERT: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    np.empty(0).__reduce__()[0],
    *(type(np.dtype(name)) for name in ("uint32", "uint64", "int64", "float64")),
]


@torch.no_grad()
def fill_from_checkpoint(model: PreTrainedModel, path: str | os.PathLike) -> list[str]:
    """Copy the tensors of a file into a model, one by one, in the dtype that the model has.

    The backbone has to be there as a whole. Heads are taken where the file has them, and parts of
    others (of another head) are left out.

    Args:
        model: of modeling.py.
        path: as for `from_checkpoint`.

    Returns:
        The names of the modules that the file lacks: those of a head.

    Raises:
        ValueError: for a file that cannot be read, and for one of another size or model, naming the
            first tensor of the model that differs.
    """
    path = Path(path)
    inside = "" if model.base_model is model else f"{model.base_model_prefix}."
    targets = model.state_dict()
    found: dict[str, tuple[Path, str]] = {}
    shapes: dict[str, list[int]] = {}
    for file in _files(path):
        for name, tensor in _tensors(file):
            own = _own_name(name, targets, inside)
            found[own], shapes[own] = (file, name), list(tensor.shape)
    _check(targets, shapes, inside, path)
    for file in dict.fromkeys(file for file, _ in found.values()):
        for name, tensor in _tensors(file):
            own = _own_name(name, targets, inside)
            if own in targets:
                targets[own].copy_(tensor)
    missing = [name for name in targets if name not in found]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in missing))


def _own_name(name: str, targets: dict[str, Tensor], inside: str) -> str:
    """A tensor's name in the model: of its backbone with that prefix, or of its head."""
    bare = name
    for prefix in _PREFIXES:
        bare = bare.removeprefix(prefix)
    return name if name in targets and name == bare else inside + bare


def _check(
    targets: dict[str, Tensor], shapes: dict[str, list[int]], inside: str, path: Path
) -> None:
    """Check that a file holds what a model needs.

    Raises:
        ValueError: as `fill_from_checkpoint`.
    """
    for name, target in targets.items():
        expected, is_of_head = list(target.shape), not name.startswith(inside)
        if name in shapes and shapes[name] != expected:
            raise ValueError(f"{path}: expected {name} of shape {expected}, got {shapes[name]}")
        if name not in shapes and not is_of_head:
            raise ValueError(
                f"{path}: expected the weights of a GLM (2021) with {name} of shape {expected}, "
                f"got none of that name, but {', '.join(sorted(shapes)[:3]) or 'no tensor'}, ..."
            )
    for name in sorted(shapes):
        if name not in targets and name.startswith(f"{inside}transformer.layers."):
            raise ValueError(
                f"{path}: expected no tensor behind the last layer of the configuration, got "
                f"{name} of shape {shapes[name]}"
            )


def _files(path: Path) -> list[Path]:
    """The files that a path stands for.

    Raises:
        ValueError: for a folder without one, or with a model in several parts.
    """
    if path.is_dir():
        file = next((path / name for name in _NAMES if (path / name).is_file()), None)
        if file is None:
            raise ValueError(f"{path}: expected a folder with one of {', '.join(_NAMES)}, got none")
        if (path / _SECOND_PART).is_file():
            raise ValueError(
                f"{path}: expected a model in one part, got {_SECOND_PART} as well: join them by "
                "THUDM's change_mp.py"
            )
        path = file
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of weights, got none")
    if path.suffix != ".json":
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("a name outside of the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected an index of weights, got {error!r:.100}") from error
    return [path.parent / name for name in names]


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of one file, read from the disk as they are asked for.

    Raises:
        ValueError: when it cannot be read.
    """
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                yield from ((name, opened.get_tensor(name)) for name in opened.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: corrupt or missing safetensors file ({error})") from error
        return
    content = _unpickled(file)
    if isinstance(content, dict) and isinstance(content.get("module"), dict):
        content = content["module"]
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected named tensors, got a {type(content).__name__}")
    yield from ((str(name), part) for name, part in content.items() if isinstance(part, Tensor))


def _unpickled(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_INERT):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except Exception as error:  # what a foreign file makes of it
        words = " ".join(str(error).split())
        raise ValueError(f"{file}: expected a file of tensors, got one that cannot be read "
                         f"without running code ({words:.200})") from error  # fmt: skip


def _is_zip(file: Path) -> bool:
    """Whether torch can map a file; it has written such files since 1.6."""
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"
