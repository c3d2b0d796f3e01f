"""What trains beside the prefix of frozen blocks, and its gradients.

Biases and norm weights are few and their gradients are sums over rows of what the backward pass of
a block has anyway: of the gradients of its products and, for norms, of the sums that were
normalised. So are those of low-rank updates (low_rank.py), as products with the inputs. All are
float32 (float64 for a float64 model), whatever the products are.
"""

from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ptv2_fast.frozen.low_rank import LowRankUpdate
from ptv2_fast.frozen.modules import BlockModules, Norm
from ptv2_fast.ops import elementwise
from ptv2_fast.ops.layout import widened

# A linear layer or a norm -> the module whose parameters of the same names stand in for its own.
StandIns = Mapping[nn.Module, nn.Module]


class BlockVectors(NamedTuple):
    """What trains of one block, beside the prefix; None = nothing.

    Args:
        query_key_value, up: biases of layers that share an input, one behind the other.
        attention_output, down: biases.
        query_norm, key_norm: weights of the norms of their heads.
        attention_norm_weight, attention_norm_beta, output_norm_weight, output_norm_beta: of the
            norms behind the two sums, [hidden]. Behind the second sum of a pre-norm block stands
            the first norm of the block above.
        *_down, *_up: of the low-rank updates of the four products (low_rank.py).
    """

    query_key_value: Tensor | None = None
    attention_output: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    attention_norm_weight: Tensor | None = None
    attention_norm_beta: Tensor | None = None
    output_norm_weight: Tensor | None = None
    output_norm_beta: Tensor | None = None
    query_key_value_down: Tensor | None = None
    query_key_value_up: Tensor | None = None
    attention_output_down: Tensor | None = None
    attention_output_up: Tensor | None = None
    up_down: Tensor | None = None
    up_up: Tensor | None = None
    down_down: Tensor | None = None
    down_up: Tensor | None = None


NO_VECTORS = BlockVectors()
LAYERS = ("query_key_value", "attention_output", "up", "down")  # the products of a block
_OF_INPUT_MATRIX = ("query_key_value_down", "query_key_value_up")
_OF_PROJECTIONS = ("query_key_value", "query_norm", "key_norm", *_OF_INPUT_MATRIX)


def read_updates(modules: BlockModules, stand_ins: StandIns) -> dict[str, LowRankUpdate]:
    """The low-rank updates of a block's products, those that there are, by name."""
    updates = (_joined_update(linears, stand_ins) for linears in modules.products())
    found = zip(LAYERS, updates, strict=True)
    return {name: update for name, update in found if update is not None}


def _joined_update(linears: tuple[nn.Linear, ...], stand_ins: StandIns) -> LowRankUpdate | None:
    """Of layers that share an input."""
    parts, outputs, scale, first = [], [], 0.0, 0
    for linear in linears:
        last = first + linear.out_features
        if _of(linear, "lora_A", stand_ins) is not None:
            part: Any = stand_ins[linear]
            parts.append((part.lora_A, part.lora_B))
            outputs.append((first, last))
            scale = part.scale
        first = last
    if not parts:
        return None
    down, up = (each[0] if len(each) == 1 else torch.cat(each) for each in zip(*parts, strict=True))
    return LowRankUpdate(down, up, tuple(outputs), scale)


def read_vectors(
    modules: BlockModules,
    output_norm: nn.Module | None,
    stand_ins: StandIns,
    updates: Mapping[str, LowRankUpdate],
) -> BlockVectors:
    """The vectors of one block.

    Args:
        modules: of the block.
        output_norm: behind its second sum, or None.
        stand_ins: of the encoder's modules that have one.
        updates: of `read_updates`.
    """
    if not stand_ins:
        return NO_VECTORS
    pairs = (
        (updates[name].down, updates[name].up) if name in updates else (None, None)
        for name in LAYERS
    )
    attention_norm = modules.second_norm if modules.spec.pre_norm else modules.first_norm
    query_norm, key_norm = modules.head_norms or (None, None)
    return BlockVectors(
        _joined_bias(modules.inputs, stand_ins),
        _joined_bias((modules.attention_output,), stand_ins),
        _joined_bias(modules.up, stand_ins),
        _joined_bias((modules.down,), stand_ins),
        _of(query_norm, "weight", stand_ins),
        _of(key_norm, "weight", stand_ins),
        _of(attention_norm, "weight", stand_ins),
        _of(attention_norm, "bias", stand_ins),
        _of(output_norm, "weight", stand_ins),
        _of(output_norm, "bias", stand_ins),
        *(tensor for pair in pairs for tensor in pair),
    )


def _of(module: nn.Module | None, name: str, stand_ins: StandIns) -> Tensor | None:
    stand_in = None if module is None else stand_ins.get(module)
    return None if stand_in is None else getattr(stand_in, name, None)


def _joined_bias(linears: tuple[nn.Linear, ...], stand_ins: StandIns) -> Tensor | None:
    """One behind the other; zeros where a layer has none."""
    biases = [_of(linear, "bias", stand_ins) for linear in linears]
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None
    if len(biases) == 1:
        return given[0]
    return torch.cat(
        [
            given[0].new_zeros(linear.out_features) if bias is None else bias
            for linear, bias in zip(linears, biases, strict=True)
        ]
    )


def trains_projections(modules: BlockModules, stand_ins: Container[nn.Module]) -> bool:
    """Whether a block trains something of query, key and value, or the norms of their heads."""
    return any(module in stand_ins for module in (*modules.inputs, *modules.head_norms))


def trains_input_matrix(modules: BlockModules, stand_ins: StandIns) -> bool:
    """Whether a block trains an update of a matrix of query, key and value."""
    return any(_of(linear, "lora_A", stand_ins) is not None for linear in modules.inputs)


def trains_input_norm(modules: BlockModules, stand_ins: Container[nn.Module]) -> bool:
    """Whether a block trains a norm in front of its attention."""
    return modules.spec.pre_norm and modules.first_norm in stand_ins


def norm_with(norm: Norm, weight: Tensor | None, beta: Tensor | None) -> Norm:
    """A norm with other values, where there are any; they leave their graph."""
    if weight is not None:
        norm = norm._replace(weight=weight.detach())
    return norm if beta is None else norm._replace(beta=beta.detach())


class VectorGradients:
    """Sums over the rows of one backward pass, in a fixed order.

    Args:
        wanted: fields of `BlockVectors`; of others nothing is computed.
        tokens: rows that belong to a token; those behind them do not count.
        chunk: rows that are summed at a time.
    """

    def __init__(self, wanted: frozenset[str], tokens: int, chunk: int) -> None:
        self.wanted, self._tokens, self._chunk = wanted, tokens, chunk
        self.sums: dict[str, Tensor] = {}

    @property
    def want_projections(self) -> bool:
        """Whether gradients of query, key and value are needed."""
        return not self.wanted.isdisjoint(_OF_PROJECTIONS)

    @property
    def want_input_matrix(self) -> bool:
        """Whether the input of query, key and value is needed."""
        return not self.wanted.isdisjoint(_OF_INPUT_MATRIX)

    def want_update(self, name: str) -> bool:
        """Whether the low-rank update of a product trains."""
        return not self.wanted.isdisjoint((f"{name}_down", f"{name}_up"))

    def add_update(
        self,
        name: str,
        update: LowRankUpdate | None,
        input: Tensor,
        gradient: Tensor,
        first_row: int = 0,
    ) -> Tensor | None:
        """Add what rows give for a low-rank update; what it computes for the input's gradient, too.

        Args:
            name: of the product.
            update: of it, in the products' dtype.
            input: [R, in], of the product.
            gradient: [R, out], of its result.
            first_row: number of the first row.

        Returns:
            `LowRankUpdate.narrow_gradient` of the rows, for `FrozenLinear.input_gradient`; None
            where the update does not train.
        """
        if update is None or not self.want_update(name):
            return None
        rows = max(self._tokens - first_row, 0)
        narrow = update.narrow_gradient(gradient)
        grad_down, grad_up = update.gradients(input[:rows], gradient[:rows], narrow[:rows])
        self._add(f"{name}_down", widened(grad_down))
        self._add(f"{name}_up", widened(grad_up))
        return narrow

    def add_bias(self, name: str, *gradients: Tensor, first_row: int = 0) -> None:
        """Add the sums of the rows of [R, C] for a bias.

        Args:
            name: of the bias.
            gradients: of what it was added to; of several the columns are side by side.
            first_row: number of the first row.
        """
        if name in self.wanted:
            rows = max(self._tokens - first_row, 0)
            sums = [_column_sums(each[:rows]) for each in gradients]
            self._add(name, sums[0] if len(sums) == 1 else torch.cat(sums))

    def add_norm(
        self,
        name: str,
        gradients: tuple[Tensor | None, ...],
        total: Tensor | None,
        statistics: Tensor | None,
    ) -> None:
        """Add what rows give for the weight and the bias of a norm.

        Args:
            name: of the norm.
            gradients: of its output [R, C], which are added; None = nothing.
            total: [R, C], what was normalised; None without a norm.
            statistics: [R, 2], mean and 1 / deviation of its rows.
        """
        given = [each for each in gradients if each is not None]
        if self.wanted.isdisjoint((f"{name}_weight", f"{name}_beta")) or not given:
            return
        assert total is not None and statistics is not None
        for first in range(0, min(len(total), self._tokens), self._chunk):
            rows = slice(first, min(first + self._chunk, self._tokens))
            parts = [widened(each[rows]) for each in given]
            gradient = sum(parts[1:], parts[0])
            if f"{name}_beta" in self.wanted:
                self._add(f"{name}_beta", _column_sums(gradient))
            if f"{name}_weight" in self.wanted:
                self._add(
                    f"{name}_weight",
                    _column_sums(gradient * _normal(total[rows], statistics[rows])),
                )

    def add_head_norm(self, name: str, gradient: Tensor, heads: Tensor, statistics: Tensor) -> None:
        """Add what [R, heads, head_dim] give for the weight of the norm of each head.

        Args:
            name: of the weight.
            gradient: of the normalised heads.
            heads: that were normalised.
            statistics: [R * heads, 2].
        """
        if name in self.wanted:
            normal = _normal(heads.flatten(0, 1), statistics).view(heads.shape)
            product = (widened(gradient) * normal)[: self._tokens]
            self._add(name, _column_sums(product.flatten(0, 1)))

    def _add(self, name: str, part: Tensor) -> None:
        self.sums[name] = self.sums[name] + part if name in self.sums else part


def _column_sums(rows: Tensor) -> Tensor:
    return rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))


def _normal(total: Tensor, statistics: Tensor) -> Tensor:
    return (widened(total) - statistics[:, :1]) * statistics[:, 1:]


class _TrainedNorm(torch.autograd.Function):
    """A norm that stands alone, [N, hidden]; nothing is kept but its input."""

    @staticmethod
    def forward(ctx, hidden, weight, beta, normalise, norm, tokens, chunk):
        ctx.save_for_backward(hidden, weight, beta)
        ctx.norm, ctx.tokens, ctx.chunk = norm, tokens, chunk
        return normalise(hidden, norm_with(norm, weight, beta))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        hidden, weight, beta = ctx.saved_tensors
        norm, wide = norm_with(ctx.norm, weight, beta), widened(hidden)
        if norm.subtract_mean:
            variance, mean = torch.var_mean(wide, dim=1, correction=0)
        else:
            variance = wide.square().mean(1)
            mean = torch.zeros_like(variance)
        statistics = torch.stack((mean, torch.rsqrt(variance + norm.epsilon)), dim=1)
        names = ("hidden", "norm_weight", "norm_beta")
        wanted = frozenset(n for n, need in zip(names, ctx.needs_input_grad, strict=False) if need)
        gradients = VectorGradients(wanted, ctx.tokens, ctx.chunk)
        gradients.add_norm("norm", (grad_out,), hidden, statistics)
        grad_hidden = None
        if "hidden" in wanted:
            grad_hidden, _ = elementwise.dropout_add_norm_backward(
                grad_out.contiguous(), None, None, hidden, statistics, norm.weight,
                norm.subtract_mean, None, None, 0.0, 0, hidden.dtype,
            )  # fmt: skip
        sums = (gradients.sums.get(name) for name in names[1:])
        return grad_hidden, *sums, None, None, None, None


def trained_norm(
    hidden: Tensor,
    module: nn.Module,
    norm: Norm,
    stand_ins: StandIns,
    normalise: Callable[[Tensor, Norm], Tensor],
    tokens: int,
    chunk: int,
) -> Tensor:
    """The norm of a residual stream that comes from outside of the blocks, differentiable.

    Args:
        hidden: [N, hidden].
        module: the norm.
        norm: its own values.
        stand_ins: of the encoder's modules that have one; this one has.
        normalise: (hidden, norm) -> normalised rows.
        tokens, chunk: as for `VectorGradients`.
    """
    weight, beta = (_of(module, name, stand_ins) for name in ("weight", "bias"))
    return _TrainedNorm.apply(hidden, weight, beta, normalise, norm, tokens, chunk)
