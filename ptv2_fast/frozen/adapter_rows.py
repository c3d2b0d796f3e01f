"""Biases, norms and low-rank updates of several adapters in one batch, without a gradient.

The sequences of an adapter stand together, so that what it has is added to a slice of the rows: the
large product, of the frozen matrix, is one for all.
"""

import copy
import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ptv2_fast.frozen.low_rank import LowRankUpdate
from ptv2_fast.frozen.modules import BlockModules, Norm, NormPart, read_norm
from ptv2_fast.frozen.vectors import LAYERS, StandIns, read_updates, read_vectors
from ptv2_fast.frozen.weights import BlockWeights, FrozenLinear

Bounds = list[tuple[int, int]]  # of each adapter its first row, and that behind its last


# Of the products of a block, by name, a bias and an update; None = the encoder's, or none.
BlockValues = dict[str, tuple[Tensor | None, LowRankUpdate | None]]


class AdapterValues:
    """What one adapter has inside of the blocks, read when it has changed.

    Args:
        stand_ins: of modules of the encoder; empty = nothing.
    """

    def __init__(self, stand_ins: StandIns) -> None:
        self._stand_ins = stand_ins
        self._read: dict[tuple[BlockModules, torch.dtype], tuple[int, BlockValues]] = {}
        self._parameters = [p for each in stand_ins.values() for p in each.parameters()]
        self._version = 0

    def look(self) -> None:
        """In front of a forward: whatever was changed in place since the last one is read anew."""
        self._version = sum(parameter._version for parameter in self._parameters)

    def of_block(self, modules: BlockModules, dtype: torch.dtype) -> BlockValues:
        """Those of one block, for products in `dtype`."""
        version, found = self._read.get((modules, dtype), (self._version, None))
        if found is None or version != self._version:
            updates = read_updates(modules, self._stand_ins)
            vectors = read_vectors(modules, None, self._stand_ins, updates)
            found = {}
            for name in LAYERS:
                bias, update = getattr(vectors, name), updates.get(name)
                bias = None if bias is None else bias.detach()
                found[name] = bias, None if update is None else update.to(dtype)
            self._read[modules, dtype] = self._version, found
        return found

    def of_norm(self, module: nn.Module, norm: Norm) -> Norm:
        """Its own values of a norm; those of the encoder where it has none."""
        stand_in = self._stand_ins.get(module)
        return norm if stand_in is None else read_norm(stand_in, norm.subtract_mean)


class RowsLinear(FrozenLinear):
    """A linear layer to which each adapter adds its own bias and update.

    Args:
        layer: without them.
        values: of each adapter its bias [out], None = the layer's, and its update, or None.
        bounds: of the rows that come.
        chunk: of those that come at a time.
    """

    def __init__(
        self,
        layer: FrozenLinear,
        values: list[tuple[Tensor | None, LowRankUpdate | None]],
        bounds: Bounds,
        chunk: int,
    ) -> None:
        has_biases = any(bias is not None for bias, _ in values)
        super().__init__(layer.weight, None if has_biases else layer.bias)
        if has_biases:
            values = [(layer.bias if bias is None else bias, update) for bias, update in values]
        self._values, self._bounds, self._chunk = values, bounds, chunk

    def rows(self, first: int, last: int) -> "RowsLinear":
        """As that of `FrozenLinear`."""
        values = [
            (
                None if bias is None else bias[first:last],
                None if update is None else update.rows(first, last),
            )
            for bias, update in self._values
        ]
        return RowsLinear(super().rows(first, last), values, self._bounds, self._chunk)

    def on(self, bounds: Bounds) -> "RowsLinear":
        """The same layer for other rows."""
        copied = copy.copy(self)
        copied._bounds = bounds
        return copied

    def biased(self, input: Tensor, chunk_index: int = 0) -> Tensor:
        """As that of `FrozenLinear`."""
        return self._added(super().biased(input), input, chunk_index)

    def unbiased(self, input: Tensor, chunk_index: int = 0) -> Tensor:
        """As that of `FrozenLinear`; biases of adapters are added all the same."""
        return self._added(super().unbiased(input), input, chunk_index)

    def input_gradient(
        self, grad_out: Tensor, chunk_index: int = 0, narrow_gradient: Tensor | None = None
    ) -> Tensor:
        """Not served."""
        raise RuntimeError("several adapters in one pass have no backward pass")

    def _added(self, out: Tensor, input: Tensor, chunk_index: int) -> Tensor:
        start = chunk_index * self._chunk
        for (first, last), (bias, update) in zip(self._bounds, self._values, strict=True):
            rows = slice(max(first - start, 0), max(last - start, 0))
            part = out[rows]
            if len(part) == 0:
                continue
            if bias is not None:
                part += bias.to(out.dtype)
            if update is not None:
                update.add_output(part, input[rows])
        return out


class AdapterRows:
    """The adapters of a batch.

    Args:
        adapters: in the order of their sequences; None has nothing inside of the blocks.
        counts: how many sequences each has.
    """

    def __init__(self, adapters: Sequence[AdapterValues | None], counts: Sequence[int]) -> None:
        self._adapters = [AdapterValues({}) if each is None else each for each in adapters]
        for each in self._adapters:
            each.look()
        ends = [0]
        for count in counts:
            ends.append(ends[-1] + count)
        self._ends = ends
        self.sequences: Bounds = list(itertools.pairwise(ends))
        self._tokens: tuple[Tensor, Bounds] | None = None

    def tokens(self, cu_seqlens: Tensor) -> Bounds:
        """The packed rows of each adapter.

        Args:
            cu_seqlens: int32 [B + 1] of all sequences.
        """
        if self._tokens is None or self._tokens[0] is not cu_seqlens:
            ends = cu_seqlens[self._ends].tolist()
            self._tokens = cu_seqlens, list(itertools.pairwise(ends))
        return self._tokens[1]

    def of_norm(self, norm: Norm, module: nn.Module, bounds: Bounds) -> Norm:
        """A norm with the weight and the beta of each adapter, where some has any of its own.

        Args:
            norm: its values in the encoder.
            module: the norm.
            bounds: of the rows that it gets.
        """
        own = [each.of_norm(module, norm) for each in self._adapters]
        if all(each is norm for each in own):
            return norm
        parts = (NormPart(rows, n.weight, n.beta) for rows, n in zip(bounds, own, strict=True))
        return norm._replace(weight=torch.ones_like(norm.weight), beta=None, parts=tuple(parts))

    def of_block(
        self,
        weights: BlockWeights,
        output_norm: nn.Module | None,
        next_norm: Norm | None,
        cu_seqlens: Tensor,
        chunk: int,
        first_token_only: bool,
    ) -> tuple[BlockWeights, Norm | None]:
        """The weights of a block, and the norm in front of the attention above.

        Args:
            weights: of the encoder.
            output_norm: behind the block's second sum, or None.
            next_norm: its values in a pre-norm block.
            cu_seqlens: int32 [B + 1] of all sequences.
            chunk: rows that go through the feed-forward network at a time.
            first_token_only: behind the attention each sequence has one row.
        """
        modules, tokens = weights.modules, self.tokens(cu_seqlens)
        rows = self.sequences if first_token_only else tokens
        found = [each.of_block(modules, weights.dtype) for each in self._adapters]
        copied = copy.copy(weights)
        for name in LAYERS:
            own = [values[name] for values in found]
            if any(each != (None, None) for each in own):
                bounds = tokens if name == "query_key_value" else rows
                setattr(copied, name, RowsLinear(getattr(weights, name), own, bounds, chunk))
        if first_token_only:  # else the layers of queries alone are not read
            copied._split_inputs()
            if isinstance(copied.query, RowsLinear):
                copied.query = copied.query.on(rows)
        copied.second_norm = self.of_norm(weights.second_norm, modules.second_norm, rows)
        if not weights.spec.pre_norm:
            first_norm = cast(nn.Module, modules.first_norm)
            copied.first_norm = self.of_norm(cast(Norm, weights.first_norm), first_norm, rows)
        elif next_norm is not None:
            next_norm = self.of_norm(next_norm, cast(nn.Module, output_norm), rows)
        return copied, next_norm
