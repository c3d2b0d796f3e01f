"""The modules of a block by their roles, and its norms as tensors."""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ptv2_fast.frozen.spec import BlockShape, BlockSpec
from ptv2_fast.ops.layout import widened


class NormPart(NamedTuple):
    """The rows first to last - 1 of a norm's output, and what scales and shifts them, [hidden]."""

    rows: tuple[int, int]
    weight: Tensor
    beta: Tensor | None


class Norm(NamedTuple):
    """A norm's weights, [hidden], float32 (float64 for a float64 model).

    With `parts` the weight is 1, there is no beta, and they follow.
    """

    weight: Tensor
    beta: Tensor | None
    epsilon: float
    subtract_mean: bool  # a LayerNorm; else an RMSNorm
    parts: tuple[NormPart, ...] = ()

    def scale_parts(self, normal: Tensor) -> None:
        """Scale and shift the rows of each part, in place."""
        for (first, last), weight, beta in self.parts:
            rows = normal[first:last]
            rows.mul_(weight)
            if beta is not None:
                rows.add_(beta)


class DropoutSource(NamedTuple):
    """Where a probability of dropout stands, and whether its module trains; None = without."""

    module: nn.Module | None
    name: str = "p"

    @property
    def probability(self) -> float:
        """0 outside training."""
        is_active = self.module is not None and self.module.training
        return getattr(self.module, self.name) if is_active else 0.0


NO_DROPOUT = DropoutSource(None)


class BiasSource(NamedTuple):
    """Biases of query, key and value that lie beside their linear layer, [heads * head_dim]."""

    module: nn.Module
    names: tuple[str | None, str | None, str | None]

    def parameters(self) -> list[nn.Parameter]:
        """Those that there are."""
        return [getattr(self.module, name) for name in self.names if name is not None]


@dataclass(frozen=True)
class BlockModules:
    """The modules of one block by their roles.

    Args:
        spec: the form of the block.
        key_value_heads, head_dim: of its attention.
        inputs: query, key and value, or one linear layer that gives them one behind the other.
        attention_output: the output projection.
        up: the first product of the feed-forward network; of a gated one in two parts, the half
            that is activated stands first.
        down: the second.
        first_norm: in front of the attention (pre-norm, None where a block has none), or behind it.
        second_norm: in front of the feed-forward network, or behind it.
        attention_dropout, attention_output_dropout, activation_dropout, output_dropout: of the
            attention's probabilities, of its output, inside and behind the feed-forward network.
        head_norms: RMSNorms of each head's query and key, in front of their rotation, or none.
        input_biases: of a plain layer that gives query, key and value and has none of its own.
    """

    spec: BlockSpec
    key_value_heads: int
    head_dim: int
    inputs: tuple[nn.Linear, ...]
    attention_output: nn.Linear
    up: tuple[nn.Linear, ...]
    down: nn.Linear
    first_norm: nn.Module | None
    second_norm: nn.Module
    attention_dropout: DropoutSource = NO_DROPOUT
    attention_output_dropout: DropoutSource = NO_DROPOUT
    activation_dropout: DropoutSource = NO_DROPOUT
    output_dropout: DropoutSource = NO_DROPOUT
    head_norms: tuple[nn.Module, ...] = ()
    input_biases: BiasSource | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream; quantised layers have none."""
        return cast(Tensor, self.second_norm.weight).dtype

    @property
    def is_training(self) -> bool:
        """Whether dropout is active."""
        return self.second_norm.training

    @property
    def heads(self) -> int:
        """Of the queries."""
        heads = self.inputs[0].out_features // self.head_dim
        return heads - 2 * self.key_value_heads if len(self.inputs) == 1 else heads

    def products(self) -> tuple[tuple[nn.Linear, ...], ...]:
        """The linear layers; those that share an input, whose product is one, stand together."""
        return self.inputs, (self.attention_output,), self.up, (self.down,)

    def linears(self) -> dict[str, nn.Linear]:
        """Name -> linear layer."""
        inputs = ("query_key_value",) if len(self.inputs) == 1 else ("query", "key", "value")
        up = ("up",) if len(self.up) == 1 else ("gate", "up")
        named = zip((*inputs, *up), (*self.inputs, *self.up), strict=True)
        return {**dict(named), "attention_output": self.attention_output, "down": self.down}

    def norms(self) -> tuple[nn.Module, ...]:
        """All norms."""
        norms = (self.first_norm, self.second_norm, *self.head_norms)
        return tuple(norm for norm in norms if norm is not None)

    def parameters(self) -> list[nn.Parameter]:
        """All weights and biases."""
        modules = (*self.linears().values(), *self.norms())
        beside = [] if self.input_biases is None else self.input_biases.parameters()
        return [parameter for module in modules for parameter in module.parameters()] + beside

    def shape(self, dtype: torch.dtype) -> BlockShape:
        """The sizes, for products in `dtype`."""
        return BlockShape(
            hidden=self.down.out_features,
            intermediate=self.down.in_features,
            heads=self.heads,
            key_value_heads=self.key_value_heads,
            head_dim=self.head_dim,
            is_gated=self.spec.gate is not None,
            element_bytes=dtype.itemsize,
            residual_bytes=self.dtype.itemsize,
        )


def read_norm(module: nn.Module, subtract_mean: bool) -> Norm:
    """A norm's weights as they are now."""
    weight, bias = cast(Tensor, module.weight), getattr(module, "bias", None)
    # transformers' RMSNorms have the second name.
    epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
    beta = None if bias is None else widened(bias.detach())
    return Norm(widened(weight.detach()), beta, cast(float, epsilon), subtract_mean)
