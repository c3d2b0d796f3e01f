"""The two files of an adapter: adapter_config.json and one safetensors file beside it."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptv2_fast.files import plain_name, read_json_object

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# Trainer reloads a checkpoint from a file of this name only.
CHECKPOINT_WEIGHTS_NAME = "model.safetensors"
FORMAT_KEY = "ptv2_format"
FORMAT_VERSION = 1
_WEIGHTS_KEY = "weights"


def write_adapter(
    directory: str | os.PathLike,
    description: dict[str, Any],
    tensors: dict[str, Tensor],
    weights_name: str = WEIGHTS_NAME,
) -> None:
    """Write both files, each under a temporary name that then replaces the old file.

    Args:
        directory: created when missing.
        description: what adapter_config.json says, JSON-ready; the format version and the name of
            the tensor file are added.
        tensors: name -> tensor, on any device.
        weights_name: file name of the tensors.

    Raises:
        ValueError: when `directory` is a file.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory: expected a folder, got the file {directory}")
    directory.mkdir(parents=True, exist_ok=True)
    content = {FORMAT_KEY: FORMAT_VERSION, _WEIGHTS_KEY: weights_name, **description}
    text = json.dumps(content, indent=2, sort_keys=False) + "\n"
    # Clones: safetensors refuses tensors that share memory, and a state dict may hold such.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}

    weights, config = directory / weights_name, directory / CONFIG_NAME
    temporary_weights, temporary_config = (
        path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in (weights, config)
    )
    try:
        save_file(copies, temporary_weights, metadata={"format": "pt"})
        temporary_config.write_text(text, encoding="utf-8")
        os.replace(temporary_weights, weights)
        os.replace(temporary_config, config)
    finally:
        temporary_weights.unlink(missing_ok=True)
        temporary_config.unlink(missing_ok=True)


def read_adapter(directory: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read both files.

    Returns:
        What adapter_config.json says, and name -> tensor on the CPU.

    Raises:
        ValueError: when a file is missing, is not an adapter of this package and format version,
            or is corrupt or truncated.
    """
    directory = Path(directory)
    config = directory / CONFIG_NAME
    if not config.is_file():
        raise ValueError(f"directory: expected an adapter with {CONFIG_NAME}, got {directory}")
    description = read_json_object(config)
    if FORMAT_KEY not in description:
        raise ValueError(f"{config}: expected an adapter of ptv2-fast (key {FORMAT_KEY!r})")
    if description[FORMAT_KEY] != FORMAT_VERSION:
        raise ValueError(
            f"{config}: expected {FORMAT_KEY} {FORMAT_VERSION}, got {description[FORMAT_KEY]!r}"
        )

    # An adapter cannot point at files outside its folder.
    name = plain_name(description.get(_WEIGHTS_KEY, WEIGHTS_NAME), f"{config}: {_WEIGHTS_KEY}")
    weights = directory / name
    if not weights.is_file():
        raise ValueError(
            f"directory: expected the adapter's tensors in {weights}, got no such file"
        )
    try:
        return description, load_file(weights)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights}: corrupt or truncated safetensors file ({error})") from error
