"""Tensors in files of others: the sizes are known before the first number is read."""

import contextlib
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ptv2_fast.files import leads_out

_LONGEST_HEADER = 10_000_000  # bytes; 100 bytes a tensor are usual
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PICKLES = (".bin", ".pt", ".pth")
# Where a training framework puts the state dict beside other things.
_NESTED = ("state_dict", "model", "module")


@dataclass(frozen=True)
class TensorFile:
    """A file with tensors.

    Attributes:
        path: for messages.
        shapes: by name.
        read: one tensor by its name, on the CPU.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
        file: where.
        name: in the file.
        rows: of a table that is stored as one row; None = as it is stored.
    """

    file: TensorFile
    name: str
    rows: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes, as the file says."""
        shape = self.file.shapes[self.name]
        if self.rows is None:
            return shape
        count = math.prod(shape)
        return (self.rows, count // self.rows) if count % self.rows == 0 else shape

    def check(self, shape: tuple[int, ...], meaning: str) -> None:
        """Compare the shape.

        Args:
            shape: the expected one.
            meaning: what the tensor becomes, for the message.

        Raises:
            ValueError: when it is another.
        """
        if self.shape != shape:
            raise ValueError(
                f"{self.file.path}: expected {self.name} of shape {list(shape)}, as {meaning}, "
                f"got {list(self.shape)}"
            )

    def load(self, dtype: torch.dtype) -> Tensor:
        """The numbers.

        Raises:
            ValueError: for others than floating-point numbers of 16 to 64 bits, and infinite or
                NaN ones.
        """
        place = f"{self.file.path}: expected"
        tensor = self.file.read(self.name)
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{place} one of {_DTYPES} in {self.name}, got {tensor.dtype}")
        if not tensor.isfinite().all():
            raise ValueError(
                f"{place} finite numbers in {self.name}, got some that are infinite or NaN"
            )
        cast = tensor.to(dtype)
        if not cast.isfinite().all():
            raise ValueError(f"{place} numbers within the range of {dtype} in {self.name}, got "
                             f"{tensor.abs().max().item():g}")  # fmt: skip
        return cast.reshape(self.shape)


def find_tensors(folder: Path, *stems: str) -> Path:
    """The file of one of these names, of safetensors rather than a pickle.

    Raises:
        ValueError: when there is none.
    """
    for ending in (".safetensors", *_PICKLES):
        for stem in stems:
            path = folder / f"{stem}{ending}"
            if path.is_symlink() or path.is_file():
                return path
    names = [f"{stem}.safetensors" for stem in stems]
    raise ValueError(f"{folder}: expected one of the files {names}, got none")


def open_tensors(path: Path, allow_pickle: bool = False) -> TensorFile:
    """Read the names and sizes of the tensors in a file.

    Args:
        path: of a .safetensors file, or of a pickle, as torch.save writes it.
        allow_pickle: read a pickle, as weights only.

    Raises:
        ValueError: for a file that is missing, corrupt, truncated, or lies outside of its folder; a
            pickle without `allow_pickle`; and one that holds more than tensors, or compressed ones.
    """
    check_inside(path)
    if path.suffix not in _PICKLES:
        return _open_safetensors(path)
    if not allow_pickle:
        raise ValueError(
            f"{path}: expected a .safetensors file, got a pickle; allow_pickle=True, or "
            "--allow-pickle, reads it, as weights only"
        )
    return _open_pickle(path)


def check_inside(path: Path) -> None:
    """Check that a path is a file, and that no link leads out of its folder.

    Raises:
        ValueError: for another one.
    """
    if leads_out(path, path.absolute().parent):
        raise ValueError(f"{path}: expected a file in its folder, got a link to {path.resolve()}")
    if not path.is_file():
        raise ValueError(f"{path}: expected a file, got none")


def _open_safetensors(path: Path) -> TensorFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size < 8 or header > min(size - 8, _LONGEST_HEADER):
        raise ValueError(
            f"{path}: corrupt or truncated safetensors file: expected a header of at most "
            f"{max(0, min(size - 8, _LONGEST_HEADER))} bytes, got {header} in a file of {size}"
        )
    try:
        handle = safe_open(path, framework="pt", device="cpu")
        names = list(handle.keys())
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: corrupt or truncated safetensors file ({error})") from error
    return TensorFile(path, shapes, handle.get_tensor)


def _open_pickle(path: Path) -> TensorFile:
    problem = f"{path}: expected a state dict as torch.save writes it"
    with contextlib.suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # torch compresses nothing: what is compressed may become of any size.
        packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError(f"{problem}, got compressed entries {packed!r:.100}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{problem} since its version 1.6, got something else")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of any type, from a file of any content
        # Around that torch writes how to load it in a way that runs code.
        words = " ".join(str(error.__context__ or error).split())
        raise ValueError(f"{problem}, as weights only, got {words:.200}") from error
    for key in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"{problem}, got a {type(content).__name__}")
    tensors = {name: value for name, value in content.items() if _is_plain(name, value)}
    return TensorFile(path, {name: tuple(t.shape) for name, t in tensors.items()}, tensors.get)  # type: ignore[arg-type]


def _is_plain(name: object, value: object) -> bool:
    """Whether an entry is a named tensor, each of whose numbers is in the file."""
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()
