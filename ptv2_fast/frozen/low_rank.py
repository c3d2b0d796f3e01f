"""Low-rank updates of a block's frozen matrices: LoRA (Hu et al. 2022)."""

from typing import NamedTuple

import torch
from torch import Tensor


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
        narrow = input @ self.down.t()
        for (first, last), up, columns in self._parts(narrow):
            out[:, first:last].addmm_(columns, up.t(), alpha=self.scale)

    def add_input_gradient(self, grad_input: Tensor, grad_out: Tensor) -> None:
        """grad_input [R, in] += grad_out [R, out] (scale B A)."""
        grad_input.addmm_(self._narrow_gradient(grad_out), self.down)

    def gradients(self, input: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        """Those of `down` and `up`, from the layer's input [R, in] and its output's gradient."""
        grad_down = self._narrow_gradient(grad_out).t() @ input
        narrow = input @ self.down.t()
        grad_up = [
            grad_out[:, first:last].t() @ columns
            for (first, last), _, columns in self._parts(narrow)
        ]
        return grad_down, torch.cat(grad_up) * self.scale

    def _narrow_gradient(self, grad_out: Tensor) -> Tensor:
        """Of input @ A^T, [R, parts * rank]."""
        narrow = grad_out.new_empty(len(grad_out), len(self.down))
        for (first, last), up, columns in self._parts(narrow):
            torch.mm(grad_out[:, first:last], up, out=columns)
        return narrow.mul_(self.scale)

    def _parts(self, narrow: Tensor) -> "list[tuple[tuple[int, int], Tensor, Tensor]]":
        """Of each part its outputs, its B, and its columns of a [R, parts * rank]."""
        sizes = [last - first for first, last in self.outputs]
        columns = narrow.split(self.up.shape[1], dim=1)
        return list(zip(self.outputs, self.up.split(sizes), columns, strict=True))
