"""Small encoders of every kind of frozen block, run by the engine and, padded, by definition."""

import torch
from torch import Tensor, nn

from ptv2_fast.frozen.call import AttentionInputs
from ptv2_fast.frozen.engine import Block, FrozenRun
from ptv2_fast.frozen.layout import masked_layout
from ptv2_fast.frozen.modules import BlockModules, DropoutSource
from ptv2_fast.frozen.spec import BlockSpec
from ptv2_fast.frozen.weights import WeightReader
from ptv2_fast.ops.dropout import (
    ACTIVATION_STREAM,
    ATTENTION_OUTPUT_STREAM,
    FEED_FORWARD_STREAM,
    dropout_multiplier,
)
from ptv2_fast.ops.options import AttentionOptions
from ptv2_fast.ops.reference import reference_attention
from ptv2_fast.prefix import LayerPrefix

HIDDEN, HEADS, HEAD_DIM, INTERMEDIATE, LAYERS, P = 24, 4, 8, 40, 3, 5
ACTIVATIONS = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "silu": nn.functional.silu,
    "relu": nn.functional.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class RMSNorm(nn.Module):
    """As transformers has it."""

    def __init__(self, width: int = HIDDEN) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.variance_epsilon = 1e-5

    def forward(self, hidden: Tensor) -> Tensor:
        square = hidden.square().mean(-1, keepdim=True)
        return hidden * torch.rsqrt(square + self.variance_epsilon) * self.weight


class TinyBlock(nn.Module):
    """One layer; `is_first` leaves the norm in front of a pre-norm block out."""

    def __init__(
        self,
        spec: BlockSpec,
        p: float,
        key_value_heads: int,
        has_bias: bool,
        is_fused: bool,
        is_first: bool,
        has_head_norms: bool = False,
        has_context: bool = False,
    ) -> None:
        super().__init__()
        self.spec, self.key_value_heads, self.has_context = spec, key_value_heads, has_context

        def linears(inputs: int, *outputs: int) -> nn.ModuleList:
            outputs = (sum(outputs),) if is_fused else outputs
            return nn.ModuleList(nn.Linear(inputs, width, bias=has_bias) for width in outputs)

        queries, keys = HEADS * HEAD_DIM, key_value_heads * HEAD_DIM
        self.inputs = linears(HIDDEN, queries, keys, keys)
        self.attention_output = nn.Linear(queries, HIDDEN, bias=has_bias)
        self.up = linears(HIDDEN, *(INTERMEDIATE,) * (1 if spec.gate is None else 2))
        self.down = nn.Linear(INTERMEDIATE, HIDDEN, bias=has_bias)
        self.first_norm = None if is_first and spec.pre_norm else self._norm(has_bias)
        self.second_norm = self._norm(has_bias)
        self.dropout = nn.Dropout(p)
        head_norms = (RMSNorm(HEAD_DIM), RMSNorm(HEAD_DIM)) if has_head_norms else ()
        self.head_norms = nn.ModuleList(head_norms)

    def _norm(self, has_bias: bool) -> nn.Module:
        if not self.spec.subtract_mean:
            return RMSNorm()
        norm = nn.LayerNorm(HIDDEN, bias=has_bias)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        return norm

    def modules_by_role(self) -> BlockModules:
        source = DropoutSource(self.dropout)
        return BlockModules(
            self.spec, self.key_value_heads, HEAD_DIM, tuple(self.inputs), self.attention_output,
            tuple(self.up), self.down, self.first_norm, self.second_norm, source, source, source,
            source, head_norms=tuple(self.head_norms),
        )  # fmt: skip

    def forward(
        self, hidden: Tensor, prefix: Tensor, mask: Tensor, inputs: AttentionInputs, seed: Tensor
    ) -> Tensor:
        """By definition, [B, T, hidden]; prefix [2, key_value_heads, P, head_dim]."""
        norms = [norm if norm is not None else nn.Identity() for norm in self._norms()]
        pre, post = (
            (norms, [nn.Identity()] * 2) if self.spec.pre_norm else ([nn.Identity()] * 2, norms)
        )
        attended = self._attend(pre[0](hidden), prefix, mask, inputs, seed)
        hidden = post[0](hidden + self._drop(attended, ATTENTION_OUTPUT_STREAM, seed))
        expanded = torch.cat([linear(pre[1](hidden)) for linear in self.up], dim=-1)
        activate = ACTIVATIONS[self.spec.activation]
        if self.spec.gate is None:
            activated = activate(expanded)
        else:
            first, second = expanded.chunk(2, dim=-1)
            activated = activate(first) * second
            if self.spec.gate == "second":
                activated = first * activate(second)
        output = self.down(self._drop(activated, ACTIVATION_STREAM, seed))
        return post[1](hidden + self._drop(output, FEED_FORWARD_STREAM, seed))

    def _norms(self) -> tuple[nn.Module | None, nn.Module]:
        return self.first_norm, self.second_norm

    def _drop(self, hidden: Tensor, stream: int, seed: Tensor) -> Tensor:
        batch, tokens, width = hidden.shape
        shape = (batch, 1, tokens, width)
        return hidden * dropout_multiplier(shape, self.dropout.p, seed, stream, hidden.dtype)[:, 0]

    def _attend(
        self, hidden: Tensor, prefix: Tensor, mask: Tensor, inputs: AttentionInputs, seed: Tensor
    ) -> Tensor:
        joined = torch.cat([linear(hidden) for linear in self.inputs], dim=-1)
        query, key, value = joined.unflatten(-1, (-1, HEAD_DIM)).split(
            (HEADS, self.key_value_heads, self.key_value_heads), dim=2
        )
        if self.head_norms:
            query, key = self.head_norms[0](query), self.head_norms[1](key)
        if self.spec.rotary is not None:
            query, key = (self._rotate(part, inputs) for part in (query, key))
        context = hidden.new_zeros(len(hidden), dtype=torch.int32) if self.spec.is_causal else None
        context = context_of(hidden) if self.has_context else context
        options = AttentionOptions(
            mask, seed, HEAD_DIM**-0.5 if self.spec.scale is None else self.spec.scale,
            self.dropout.p, self.dropout.p, context_lengths=context,
            window=-1 if self.spec.window is None else self.spec.window, bias=inputs.bias,
        )  # fmt: skip
        heads = (part.transpose(1, 2) for part in (query, key, value))
        out, _ = reference_attention(*heads, prefix[:1], prefix[1:], options)
        return self.attention_output(out.to(hidden.dtype).transpose(1, 2).flatten(2))

    def _rotate(self, part: Tensor, inputs: AttentionInputs) -> Tensor:
        """By complex numbers, whose multiplication is a rotation."""
        angles = torch.complex(inputs.cosine.double(), inputs.sine.double())[:, :, None]
        x = part.double()
        if self.spec.rotary == "half":
            first, second = x.chunk(2, dim=-1)
            turned = torch.complex(first, second) * angles[..., : HEAD_DIM // 2]
            x = torch.cat((turned.real, turned.imag), dim=-1)
        else:
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            x = torch.view_as_real(pairs * angles[..., ::2]).flatten(-2)
        return x.to(part.dtype)


class TinyEncoder(nn.ModuleList):
    """Three blocks of one kind; the windows of a windowed one are on every other layer."""

    def __init__(self, spec: BlockSpec, p: float = 0.0, **kind: bool | int) -> None:
        super().__init__(TinyBlock(spec, p, is_first=i == 0, **kind) for i in range(LAYERS))
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.3)

    def run(
        self, hidden: Tensor, prefixes: Tensor, mask: Tensor, inputs: AttentionInputs,
        lowest: int = 0, **options: object,
    ) -> Tensor:  # fmt: skip
        """By the engine; prefixes [layers, 2, key_value_heads, P, head_dim]."""
        if self[0].has_context:
            options["context_lengths"] = context_of(hidden)
        run = FrozenRun(masked_layout(mask), LAYERS, lowest, self[0].dropout.p, **options)
        blocks = [Block(modules, WeightReader(modules)) for modules in self._roles()]
        for i, block in enumerate(blocks):
            prefix = LayerPrefix(*prefixes[i]) if i >= lowest else None
            above = blocks[i + 1].modules if i + 1 < LAYERS else None
            hidden = run.run_layer(i, hidden, prefix, block, above, inputs)
        return hidden

    def _roles(self) -> list[BlockModules]:
        return [block.modules_by_role() for block in self]

    def define(
        self, hidden: Tensor, prefixes: Tensor, mask: Tensor, inputs: AttentionInputs, seeds: Tensor
    ) -> Tensor:
        """By definition, zeros where nothing is attended."""
        for i, block in enumerate(self):
            hidden = block(hidden, prefixes[i], mask, inputs, seeds[i : i + 1])
        return hidden * mask[..., None]


def context_of(hidden: Tensor) -> Tensor:
    """Rows visible to all of a sequence, int32 [B]: 0, 5, 2, ..."""
    return torch.arange(0, 5 * len(hidden), 5, dtype=torch.int32, device=hidden.device) % 8


def made_inputs(
    spec: BlockSpec, tokens: int, has_bias: bool, device: torch.device | None = None
) -> AttentionInputs:
    """Angles of positions twice each, and an additive bias."""
    angle = torch.arange(tokens)[:, None] / torch.tensor([1.0, 3.0, 10.0, 30.0])
    angle = torch.cat((angle, angle), 1) if spec.rotary == "half" else angle.repeat_interleave(2, 1)
    angle, bias = angle[None], torch.randn(1, HEADS, tokens, tokens) if has_bias else None
    inputs = (angle.cos(), angle.sin(), bias)
    return AttentionInputs(*(None if each is None else each.to(device) for each in inputs))
