"""The files of an adapter: ptv2_config.json, one safetensors file, and a word to other readers.

The word is config.json, so that `from_pretrained` and `pipeline` of transformers say what to call.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptv2_fast.files import (
    ADAPTER_CONFIG_NAMES,
    NO_MODEL,
    find_description,
    plain_name,
    read_json_object,
)

CONFIG_NAME = ADAPTER_CONFIG_NAMES[0]
WEIGHTS_NAME = "ptv2_adapter.safetensors"
_OLD_WEIGHTS_NAME = "adapter_model.safetensors"  # PEFT's, as adapters of version 0.1 have
# Trainer reloads a checkpoint from a file of this name only.
CHECKPOINT_WEIGHTS_NAME = "model.safetensors"
# Beside them in the checkpoints of a run that scores an average: the average.
AVERAGE_NAME = "average.safetensors"
FORMAT_KEY = "ptv2_format"
FORMAT_VERSION = 1
WEIGHTS_KEY = "weights"
_MODELS_CONFIG_NAME = "config.json"


def write_adapter(
    directory: str | os.PathLike,
    description: dict[str, Any],
    tensors: dict[str, Tensor],
    weights_name: str = WEIGHTS_NAME,
) -> None:
    """Write the files, each under a temporary name that then replaces the old file.

    A config.json that is there already, of a model perhaps, stays.

    Args:
        directory: created when missing.
        description: what ptv2_config.json says, JSON-ready; the format version and the name of
            the tensor file are added.
        tensors: name -> tensor, on any device.
        weights_name: file name of the tensors.

    Raises:
        ValueError: when `directory` is a file.
    """
    content = {FORMAT_KEY: FORMAT_VERSION, WEIGHTS_KEY: weights_name, **description}
    write_files(directory, {CONFIG_NAME: content}, weights_name, tensors)
    path = Path(directory) / _MODELS_CONFIG_NAME
    with contextlib.suppress(FileExistsError), path.open("x") as file:
        file.write(json.dumps(NO_MODEL) + "\n")


def write_files(
    directory: str | os.PathLike,
    contents: dict[str, dict[str, Any]],
    weights_name: str,
    tensors: dict[str, Tensor],
) -> None:
    """Write tensors and JSON files, each under a temporary name that then replaces the old file.

    Args:
        directory: created when missing.
        contents: name of a file -> what it says.
        weights_name: name of the tensors' file.
        tensors: name -> tensor, on any device.

    Raises:
        ValueError: when `directory` is a file.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory: expected a folder, got the file {directory}")
    directory.mkdir(parents=True, exist_ok=True)
    # Clones: safetensors refuses tensors that share memory, and a state dict may hold such.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    paths = [directory / name for name in (weights_name, *contents)]
    temporary = [path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in paths]
    try:
        save_file(copies, temporary[0], metadata={"format": "pt"})
        for path, content in zip(temporary[1:], contents.values(), strict=True):
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for new, old in zip(temporary, paths, strict=True):
            os.replace(new, old)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def read_description(directory: str | os.PathLike) -> dict[str, Any]:
    """What the adapter in a folder says about itself.

    Raises:
        ValueError: when there is none of this package and format version, or it cannot be read.
    """
    config = find_description(directory)
    if config is None:
        raise ValueError(f"directory: expected an adapter with {CONFIG_NAME}, got {directory}")
    description = read_json_object(config)
    if FORMAT_KEY not in description:
        raise ValueError(f"{config}: expected an adapter of ptv2-fast (key {FORMAT_KEY!r})")
    if description[FORMAT_KEY] != FORMAT_VERSION:
        raise ValueError(
            f"{config}: expected {FORMAT_KEY} {FORMAT_VERSION}, got {description[FORMAT_KEY]!r}"
        )
    # An adapter cannot point at files outside its folder.
    weights = WEIGHTS_NAME if config.name == CONFIG_NAME else _OLD_WEIGHTS_NAME
    plain_name(description.setdefault(WEIGHTS_KEY, weights), f"{config}: {WEIGHTS_KEY}")
    return description


def read_adapter(directory: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the description and the tensors; of a checkpoint, the average where it has one.

    Returns:
        What ptv2_config.json says, and name -> tensor on the CPU.

    Raises:
        ValueError: as `read_description`; when the tensors are missing, corrupt or truncated.
    """
    description = read_description(directory)
    weights = Path(directory) / description[WEIGHTS_KEY]
    if not weights.is_file():
        raise ValueError(
            f"directory: expected the adapter's tensors in {weights}, got no such file"
        )
    tensors = read_tensors(weights)
    if weights.name == CHECKPOINT_WEIGHTS_NAME:
        average = read_average(directory)
        tensors |= {name: tensor for name, tensor in average.items() if name in tensors}
    return description, tensors


def read_average(checkpoint: str | os.PathLike) -> dict[str, Tensor]:
    """The average in a checkpoint, which is what its run scored; {} where there is none.

    Raises:
        ValueError: when it is corrupt or truncated.
    """
    file = Path(checkpoint) / AVERAGE_NAME
    return read_tensors(file) if file.is_file() else {}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Name -> tensor on the CPU.

    Raises:
        ValueError: when the file is missing, corrupt or truncated.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: corrupt or truncated safetensors file ({error})") from error
