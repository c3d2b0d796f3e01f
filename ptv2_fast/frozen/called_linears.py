"""Frozen linear layers that are called and not opened: quantised ones, whatever their format is."""

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge


class CalledLinears:
    """Layers side by side on one input, with the interface of `FrozenLinear`.

    The gradient of the input is that of the layers' own backward pass: a call leaves the edges of
    its graph here, under the number of its chunk of rows, for `input_gradient` to find. One object
    serves one forward.
    """

    bias = None  # added by the layers themselves
    update = None

    def __init__(self, modules: tuple[nn.Linear, ...]) -> None:
        self._modules = modules
        self._edges: dict[int, tuple[GradientEdge, GradientEdge]] = {}

    def for_forward(self) -> "CalledLinears":
        """The same layers for another forward."""
        return CalledLinears(self._modules)

    def biased(self, input: Tensor, chunk_index: int = 0) -> Tensor:
        """[R, in] -> [R, the layers' outputs side by side]."""
        with torch.enable_grad():
            leaf = input.detach().requires_grad_()
            outputs = [module(leaf).to(input.dtype) for module in self._modules]
            result = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
            self._edges[chunk_index] = (get_gradient_edge(result), get_gradient_edge(leaf))
        return result.detach()

    unbiased = biased

    def input_gradient(
        self, grad_out: Tensor, chunk_index: int = 0, narrow_gradient: Tensor | None = None
    ) -> Tensor:
        """[R, outputs side by side] -> [R, in], of the last call with this number."""
        result, leaf = self._edges[chunk_index]
        # Kept, since the caller's own graph may be kept as well.
        (gradient,) = torch.autograd.grad((result,), (leaf,), grad_out, retain_graph=True)
        return gradient
