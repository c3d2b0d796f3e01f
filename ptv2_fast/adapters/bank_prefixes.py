"""The prefixes of a mixed batch, one above the other as the operator reads them."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ptv2_fast.prefix import BankPrefix, LayerPrefix

Layers = Mapping[int, LayerPrefix]


class StackedPrefixes(Mapping[int, BankPrefix]):
    """Layer index -> the prefixes of a batch there, stacked when a layer asks for them.

    So the copies of one layer take memory at a time, not those of all.

    Args:
        adapters: layer index -> prefix, of each; lengths may differ, and layers.
        rows: the number of the adapter that each row of the batch reads.
        device: of the rows.
        dtype: of a stack without a gradient.
    """

    def __init__(
        self,
        adapters: Sequence[Layers],
        rows: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._adapters, self._dtype = adapters, dtype
        layers = sorted({layer for each in adapters for layer in each})
        sizes = [[each[n].key.shape[1] if n in each else 0 for each in adapters] for n in layers]
        # One copy to the device for all layers.
        numbers = torch.tensor([*rows, *(size for each in sizes for size in each)]).int()
        numbers = numbers.to(device)
        self._index = numbers[: len(rows)]
        lengths = numbers[len(rows) :].view(len(layers), len(adapters)).unbind(0)
        self._lengths = dict(zip(layers, lengths, strict=True))

    def __getitem__(self, layer: int) -> BankPrefix:
        lengths = self._lengths[layer]
        prefixes = [each.get(layer) for each in self._adapters]
        key, value = (_stacked([p and p[part] for p in prefixes], self._dtype) for part in (0, 1))
        return BankPrefix(key, value, _gates(prefixes), self._index, lengths)

    def __contains__(self, layer: object) -> bool:
        return layer in self._lengths

    def __iter__(self) -> Iterator[int]:
        return iter(self._lengths)

    def __len__(self) -> int:
        return len(self._lengths)


def stack_prefixes(
    adapters: Sequence[Layers], rows: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Mapping[int, LayerPrefix] | Mapping[int, BankPrefix]:
    """The prefixes of each layer that has one; one that all rows read stays as it is.

    The arguments are those of `StackedPrefixes`.
    """
    if len(adapters) == 1:
        return adapters[0]
    stacked = StackedPrefixes(adapters, rows, device, dtype)
    trains = any(prefix.key.requires_grad for each in adapters for prefix in each.values())
    return dict(stacked) if trains else stacked  # a step reads what it has kept


def _stacked(parts: list[Tensor | None], dtype: torch.dtype) -> Tensor:
    """[H, P, D] each -> [R, H, the largest P, D], zeros behind the columns of a shorter one."""
    present = [part for part in parts if part is not None]
    first, longest = present[0], max(part.shape[1] for part in present)
    shape = (len(parts), len(first), longest, first.shape[2])
    trains = any(part.requires_grad for part in present)
    if len(present) == len(parts) and all(part.shape[1] == longest for part in present):
        stack = torch.stack(present)
        return stack if trains else stack.to(dtype)
    if trains:
        zeros = first.new_zeros(shape[1], 0, shape[3])
        whole = (zeros if part is None else part for part in parts)
        return torch.stack([nn.functional.pad(p, (0, 0, 0, longest - p.shape[1])) for p in whole])
    stack = torch.zeros(shape, dtype=dtype, device=first.device)
    for row, part in zip(stack, parts, strict=True):
        if part is not None:
            row[:, : part.shape[1]] = part
    return stack


def _gates(prefixes: list[LayerPrefix | None]) -> Tensor | None:
    """[R, H], 1 for a prefix without a gate; None when none has one."""
    gates = [None if prefix is None else prefix.gate for prefix in prefixes]
    first = next((gate for gate in gates if gate is not None), None)
    if first is None:
        return None
    return torch.stack([torch.ones_like(first) if gate is None else gate for gate in gates])
