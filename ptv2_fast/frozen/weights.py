"""The frozen weights of a post-LN encoder block, in the dtype and the form its products want."""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ptv2_fast.frozen.called import CalledLinears

_SHARING_DEVICES = ("cpu", "cuda", "xpu")  # whose memory torch takes from others


class FrozenLinear:
    """A linear layer without a gradient of its own.

    Args:
        weight: [out, in] in the dtype of the products.
        bias: [out], any dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = None if bias is None else _wide(bias)  # for what is fused with the bias
        self._bias = None if bias is None else bias.to(weight.dtype)
        # Straight to oneDNN: torch sends fp32 to MKL, which is slower on processors of AMD, and
        # adds the bias of bf16 in a pass of its own.
        self._by_onednn = (
            weight.device.type == "cpu"
            and weight.dtype in (torch.float32, torch.bfloat16)
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        )

    def rows(self, first: int, last: int) -> "FrozenLinear":
        """The part that computes the outputs first to last - 1, sharing memory."""
        bias = None if self.bias is None else self.bias[first:last]
        return FrozenLinear(self.weight[first:last], bias)

    def biased(self, input: Tensor, slot: int = 0) -> Tensor:
        """input @ weight^T + bias, [R, in] -> [R, out]; `slot` is for `CalledLinears`."""
        return self._product(input, self.weight, self._bias)

    def unbiased(self, input: Tensor, slot: int = 0) -> Tensor:
        """input @ weight^T, for a caller that fuses the bias with what follows."""
        return self._product(input, self.weight, None)

    def input_gradient(self, grad_out: Tensor, slot: int = 0) -> Tensor:
        """grad_out @ weight, [R, out] -> [R, in]."""
        return self._product(grad_out, self.weight.t(), None)

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._by_onednn and input.shape[0] > 0:
            return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
        return nn.functional.linear(input, weight, bias)


AnyLinear = FrozenLinear | CalledLinears


class Norm(NamedTuple):
    """The affine part of a LayerNorm, [hidden], float32 (float64 for a float64 model)."""

    weight: Tensor
    beta: Tensor
    epsilon: float


@dataclass(frozen=True)
class BlockModules:
    """The modules of one block, and its number of heads."""

    heads: int
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_dropout: nn.Dropout
    attention_output: nn.Linear
    attention_output_dropout: nn.Dropout
    attention_norm: nn.LayerNorm
    intermediate: nn.Linear
    output: nn.Linear
    output_dropout: nn.Dropout
    output_norm: nn.LayerNorm

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream; quantised layers have none."""
        return self.output_norm.weight.dtype

    def linears(self) -> dict[str, nn.Linear]:
        """Name -> linear layer."""
        names = ("query", "key", "value", "attention_output", "intermediate", "output")
        return {name: getattr(self, name) for name in names}

    def inputs(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """The layers of query, key and value, which have the same shape."""
        return self.query, self.key, self.value

    def parameters(self) -> list[nn.Parameter]:
        """All weights and biases."""
        modules = (*self.linears().values(), self.attention_norm, self.output_norm)
        return [parameter for module in modules for parameter in module.parameters()]


class BlockWeights:
    """The weights of a block, as they are now, for products in one dtype.

    Args:
        modules: of the block.
        dtype: of the products. Matrices that have it are used where they are.
        joined: [3 * hidden, hidden], the weights of query, key and value in one; None where these
            are no plain `nn.Linear`. Such layers are called.
    """

    def __init__(self, modules: BlockModules, dtype: torch.dtype, joined: Tensor | None) -> None:
        inputs = modules.inputs()
        self.qkv: AnyLinear
        self.query: AnyLinear
        self.key_value: AnyLinear
        if joined is not None:
            fused = FrozenLinear(joined.to(dtype), _join_biases(inputs))
            hidden = modules.query.out_features
            self.qkv = fused
            self.query, self.key_value = fused.rows(0, hidden), fused.rows(hidden, 3 * hidden)
        else:
            self.qkv = CalledLinears(inputs)
            self.query, self.key_value = CalledLinears(inputs[:1]), CalledLinears(inputs[1:])
        self.attention_output = _frozen(modules.attention_output, dtype)
        self.intermediate = _frozen(modules.intermediate, dtype)
        self.output = _frozen(modules.output, dtype)
        self.attention_norm = _norm(modules.attention_norm)
        self.output_norm = _norm(modules.output_norm)
        self.dtype = dtype

    def bind(self) -> "BlockWeights":
        """The weights for one forward: called layers leave their graph in a copy."""
        called = {
            name: part.bind()
            for name, part in vars(self).items()
            if isinstance(part, CalledLinears)
        }
        if not called:
            return self
        bound = copy.copy(self)
        vars(bound).update(called)
        return bound


class WeightReader:
    """Reads the `BlockWeights` of a block at each forward, whoever wrote them and however.

    The weights of query, key and value become views of one matrix, so that their one product needs
    no memory; for products in another dtype than theirs all matrices are converted each time.
    """

    def __init__(self, modules: BlockModules) -> None:
        self._modules = modules
        self._joined: Tensor | None = None

    def read(self, dtype: torch.dtype) -> BlockWeights:
        """The weights of now, for products in `dtype`."""
        # Parameters must not become inference tensors: they may be trained on afterwards.
        with torch.inference_mode(False), torch.no_grad():
            return BlockWeights(self._modules, dtype, self._join())

    def separate(self) -> None:
        """Give the parameters of query, key and value memory of their own again."""
        if self._joined is not None:
            for linear in self._modules.inputs():
                linear.weight.data = linear.weight.data.clone()
            self._joined = None

    def _join(self) -> Tensor | None:
        inputs = self._modules.inputs()
        if not all(is_plain(linear) for linear in inputs):
            return None
        weights = [linear.weight.detach() for linear in inputs]
        if self._joined is None or not _are_parts(weights, self._joined):
            self._joined = torch.cat(weights)
            for linear, part in zip(inputs, self._joined.chunk(3), strict=True):
                linear.weight.data = _with_own_storage(part)
        return self._joined

    def __getstate__(self) -> dict:
        return {"_modules": self._modules, "_joined": None}


def _are_parts(weights: list[Tensor], joined: Tensor) -> bool:
    def place(tensor: Tensor) -> tuple:
        return tensor.data_ptr(), tensor.dtype, tensor.stride()

    return [place(weight) for weight in weights] == [place(part) for part in joined.chunk(3)]


def _with_own_storage(view: Tensor) -> Tensor:
    """The same memory as a storage that holds no more than this view.

    Whoever saves a model tells tensors that are one by their storages (safetensors, accelerate),
    or writes the storage whole (torch.save).
    """
    return torch.from_dlpack(view) if view.device.type in _SHARING_DEVICES else view


def is_plain(linear: nn.Module) -> bool:
    """Whether a layer is its weight and bias and no more."""
    return type(linear) is nn.Linear


def _frozen(linear: nn.Linear, dtype: torch.dtype) -> AnyLinear:
    if not is_plain(linear):
        return CalledLinears((linear,))
    bias = None if linear.bias is None else linear.bias.detach()
    return FrozenLinear(linear.weight.detach().to(dtype), bias)


def _norm(module: nn.LayerNorm) -> Norm:
    return Norm(_wide(module.weight.detach()), _wide(module.bias.detach()), module.eps)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _join_biases(linears: tuple[nn.Linear, ...]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat(
        [
            linear.weight.new_zeros(linear.out_features)
            if linear.bias is None
            else linear.bias.detach()
            for linear in linears
        ]
    )
