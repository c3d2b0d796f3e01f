"""Low-rank updates of a block's frozen matrices: LoRA (Hu et al. 2022)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ptv2_fast.frozen.linear import linear


class LowRankUpdate(NamedTuple):
    """scale * B A, added to the matrix of a layer, or of several that share an input.

    Args:
        down: A of every part, one behind the other, [parts * rank, in].
        up: B of every part, likewise, [outputs of the parts, rank].
        outputs: of each part the first one in the joined layer, and that behind its last.
        scale: alpha / rank.
    """

    down: Tensor
    up: Tensor
    outputs: tuple[tuple[int, int], ...]
    scale: float

    def to(self, dtype: torch.dtype) -> "LowRankUpdate":
        """The same with tensors of a dtype, without a graph."""
        down, up = self.down.detach().to(dtype), self.up.detach().to(dtype)
        return self._replace(down=down, up=up)

    def rows(self, first: int, last: int) -> "LowRankUpdate | None":
        """That of the outputs first to last - 1; None where these have none."""
        rank, above = self.up.shape[1], 0
        down, up, outputs = [], [], []
        for index, (begin, end) in enumerate(self.outputs):
            lower, upper = max(begin, first), min(end, last)
            if lower < upper:
                down.append(self.down[index * rank : (index + 1) * rank])
                up.append(self.up[above + lower - begin : above + upper - begin])
                outputs.append((lower - first, upper - first))
            above += end - begin
        if not outputs:
            return None
        return LowRankUpdate(torch.cat(down), torch.cat(up), tuple(outputs), self.scale)

    def add_output(self, out: Tensor, input: Tensor) -> None:
        """out [R, out] += input [R, in] (scale B A)^T."""
        narrow = linear(input, self.down).split(self.up.shape[1], dim=1)
        for columns, ((first, last), up) in zip(narrow, self._parts(), strict=True):
            out[:, first:last].addmm_(columns, up.t(), alpha=self.scale)

    def narrow_gradient(self, grad_out: Tensor) -> Tensor:
        """That of input @ A^T, [R, parts * rank], from that of the layer's output [R, out]."""
        narrow = [linear(grad_out[:, first:last], up.t()) for (first, last), up in self._parts()]
        return torch.cat(narrow, dim=1).mul_(self.scale)

    def add_input_gradient(self, grad_input: Tensor, narrow_gradient: Tensor) -> None:
        """grad_input [R, in] += what the update adds to it."""
        grad_input.addmm_(narrow_gradient, self.down)

    def gradients(
        self, input: Tensor, grad_out: Tensor, narrow_gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Those of `down` and `up`, from the layer's input [R, in] and its output's gradient."""
        grad_down = narrow_gradient.t() @ input
        narrow = linear(input, self.down).split(self.up.shape[1], dim=1)
        # The few rows first: MKL takes up to 4 times as long for the transposed product.
        grad_up = [
            columns.t() @ grad_out[:, first:last]
            for columns, (first, last) in zip(narrow, self.outputs, strict=True)
        ]
        return grad_down, torch.cat(grad_up, dim=1).t() * self.scale

    def _parts(self) -> list[tuple[tuple[int, int], Tensor]]:
        """Of each part its outputs and its B."""
        sizes = [last - first for first, last in self.outputs]
        return list(zip(self.outputs, self.up.split(sizes), strict=True))
