"""The frozen weights of a post-LN encoder block, in the dtype and the form its products want."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ptv2_fast.frozen.called import CalledLinears


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

    def parameters(self) -> list[nn.Parameter]:
        """All weights and biases."""
        modules = (*self.linears().values(), self.attention_norm, self.output_norm)
        return [parameter for module in modules for parameter in module.parameters()]


class BlockWeights:
    """The weights of a block for products in one dtype.

    Query, key and value are one matrix: in the modules' own dtype their parameters become views of
    it, so that the fused matrix takes no memory. Layers that are no plain `nn.Linear` are called.
    """

    def __init__(self, modules: BlockModules, dtype: torch.dtype) -> None:
        inputs = (modules.query, modules.key, modules.value)
        self.qkv: AnyLinear
        self.query: AnyLinear
        self.key_value: AnyLinear
        if all(is_plain(linear) for linear in inputs):
            fused = FrozenLinear(_join_weights(inputs, dtype), _join_biases(inputs))
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

    def with_vectors_of(self, modules: BlockModules) -> "BlockWeights":
        """The same matrices with the biases and norms of now, which `.data` may have changed."""
        renewed = copy.copy(self)
        if isinstance(self.qkv, FrozenLinear):
            inputs = (modules.query, modules.key, modules.value)
            fused = FrozenLinear(self.qkv.weight, _join_biases(inputs))
            hidden = modules.query.out_features
            renewed.qkv = fused
            renewed.query, renewed.key_value = fused.rows(0, hidden), fused.rows(hidden, 3 * hidden)
        for name in ("attention_output", "intermediate", "output"):
            linear, bias = getattr(self, name), getattr(modules, name).bias
            if isinstance(linear, FrozenLinear) and bias is not None:
                setattr(renewed, name, FrozenLinear(linear.weight, bias.detach()))
        renewed.attention_norm = _norm(modules.attention_norm)
        renewed.output_norm = _norm(modules.output_norm)
        return renewed

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


class WeightCache:
    """The `BlockWeights` of a block, made again whenever one of its parameters has changed."""

    def __init__(self, modules: BlockModules) -> None:
        self._modules = modules
        self._made: dict[torch.dtype, tuple[tuple, BlockWeights]] = {}

    def get(self, dtype: torch.dtype) -> BlockWeights:
        """The weights for products in `dtype`."""
        key, weights = self._made.get(dtype, (None, None))
        if weights is None or key != self._key():
            # Parameters must not become inference tensors: they may be trained on afterwards.
            with torch.inference_mode(False), torch.no_grad():
                weights = BlockWeights(self._modules, dtype)
            # After the making, which moves the parameters of query, key and value.
            self._made[dtype] = (self._key(), weights)
            return weights
        return weights.with_vectors_of(self._modules)

    def _key(self) -> tuple:
        return versions_of(self._modules.parameters())

    def __getstate__(self) -> dict:
        return {"_modules": self._modules, "_made": {}}


def versions_of(parameters: Iterable[nn.Parameter]) -> tuple:
    """Changes whenever a parameter is moved, converted or written in place (not by `.data`)."""
    return tuple((p.data_ptr(), p._version, p.dtype) for p in parameters)


def separate(modules: BlockModules) -> None:
    """Give the parameters of query, key and value memory of their own again."""
    for linear in (modules.query, modules.key, modules.value):
        if is_plain(linear):
            linear.weight.data = linear.weight.data.clone()


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


def _join_weights(linears: tuple[nn.Linear, ...], dtype: torch.dtype) -> Tensor:
    parts = [linear.weight.detach() for linear in linears]
    joined = torch.cat(parts)
    if joined.dtype != dtype:
        return joined.to(dtype)
    for linear, part in zip(linears, joined.split([part.shape[0] for part in parts]), strict=True):
        linear.weight.data = part
    return joined


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
