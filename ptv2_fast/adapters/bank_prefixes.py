"""The prefixes of a mixed batch, one above the other as the operator reads them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ptv2_fast.prefix import BankPrefix, LayerPrefix

Layers = dict[int, LayerPrefix]


def stack_prefixes(
    adapters: Sequence[Layers], rows: Sequence[int], device: torch.device, dtype: torch.dtype
) -> dict[int, LayerPrefix] | dict[int, BankPrefix]:
    """The prefixes of each layer that has one; one that all rows read stays as it is.

    Args:
        adapters: layer index -> prefix, of each; lengths may differ, and layers.
        rows: the number of the adapter that each row of the batch reads.
        device: of the rows.
        dtype: of the stack, where nothing has a gradient.
    """
    if len(adapters) == 1:
        return dict(adapters[0])
    layers = sorted({layer for each in adapters for layer in each})
    sizes = [[each[n].key.shape[1] if n in each else 0 for each in adapters] for n in layers]
    # One copy to the device for all layers.
    numbers = torch.tensor([*rows, *(size for row in sizes for size in row)], dtype=torch.int32)
    index, lengths = numbers.to(device).split([len(rows), len(numbers) - len(rows)])
    found: dict[int, BankPrefix] = {}
    for layer, own in zip(layers, lengths.view(len(layers), -1).unbind(0), strict=True):
        prefixes = [each.get(layer) for each in adapters]
        key, value = (_stacked([p and p[part] for p in prefixes], dtype) for part in (0, 1))
        found[layer] = BankPrefix(key, value, _gates(prefixes), index, own)
    return found


def _stacked(parts: list[Tensor | None], dtype: torch.dtype) -> Tensor:
    """[H, P, D] each -> [R, H, the largest P, D], zeros behind the columns of a shorter one."""
    present = [part for part in parts if part is not None]
    first, longest = present[0], max(part.shape[1] for part in present)
    shape = (len(parts), len(first), longest, first.shape[2])
    if any(part.requires_grad for part in present):
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
