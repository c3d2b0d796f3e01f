"""What the layers below the lowest prefix compute, kept across epochs by example.

Nothing in them is trained, so that without dropout an example's states at the lowest prefixed layer
are the same in every epoch. Keys are digests of the example and of the weights it went through.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ptv2_fast.frozen.layout import Layout


class LayerCache:
    """Tensors by key, in memory or as files in a folder.

    Args:
        directory: created when missing; None keeps them in memory.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory, self._memory = directory, dict[str, Tensor]()
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> Tensor | None:
        """The tensor of a key, on the CPU, or None."""
        if self._directory is None:
            return self._memory.get(key)
        path = self._path(key)
        return torch.load(path, weights_only=True) if path.exists() else None

    def put(self, key: str, tensor: Tensor) -> None:
        """Keep a copy; a file appears whole or not at all."""
        copy = tensor.detach().to("cpu", copy=True)
        if self._directory is None:
            self._memory[key] = copy
            return
        path = self._path(key)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        torch.save(copy, temporary)
        os.replace(temporary, path)

    def _path(self, key: str) -> Path:
        assert self._directory is not None
        return self._directory / f"{key}.pt"

    def __getstate__(self) -> dict:
        return {"_directory": self._directory, "_memory": {}}  # a copy of a model starts anew


class CachedForward:
    """The lower layers of one forward: they run for the sequences that the cache lacks.

    Args:
        cache: where states are looked up and put.
        keys: of the sequences.
        layout: of the batch.
    """

    def __init__(self, cache: LayerCache, keys: list[str], layout: Layout) -> None:
        self._cache, self._keys = cache, keys
        self._found = [cache.get(key) for key in keys]
        missing = [number for number, states in enumerate(self._found) if states is None]
        self._rows, self.layout = layout.select(missing)

    def begin(self, packed: Tensor) -> Tensor:
        """[N, hidden] of all sequences -> those of the missing ones."""
        return packed[self._rows]

    def finish(self, packed: Tensor) -> Tensor:
        """The states of the missing sequences, which are kept -> [N, hidden] of all."""
        lengths = self.layout.cu_seqlens.diff().tolist()
        computed = iter(packed.split(lengths))
        result = []
        for key, states in zip(self._keys, self._found, strict=True):
            if states is None:
                states = next(computed)
                self._cache.put(key, states)
            result.append(states.to(packed.device, packed.dtype))
        return torch.cat(result)


def digest(tensors: Iterable[Tensor], salt: str = "") -> str:
    """A hexadecimal digest of dtypes, shapes and values."""
    result = hashlib.blake2b(salt.encode(), digest_size=20)
    for tensor in tensors:
        result.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        values = tensor.detach().contiguous().cpu()
        result.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return result.hexdigest()
