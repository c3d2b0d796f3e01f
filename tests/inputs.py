"""The only factory of operator inputs: outliers, large logits, HF's strides, every kind of mask."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ptv2_fast.ops.attention import Positions
from ptv2_fast.ops.disentangled import position_slots
from ptv2_fast.ops.options import AttentionOptions

ROWS = ("causal", "context", "window", "both")  # what is visible to rows, beside the mask
BIASES = ("none", "shared", "holes")  # shared by the batch; or its own, in fp32, hiding columns
POSITIONS = ("both", "c2p", "p2c")  # of disentangled attention
GATES = ("open", "closed")  # on the prefix: of very different sizes; or some of 0 among them
MASKS = ("none", "right padding", "random", "single token", "empty rows")


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int  # of the query
    queries: int
    tokens: int
    prefix: int
    head_dim: int
    group: int = 1  # query heads to a key/value head

    def __str__(self) -> str:
        return (
            f"b{self.batch}-h{self.heads}-t{self.queries}-s{self.tokens}"
            f"-p{self.prefix}-d{self.head_dim}" + f"-g{self.group}" * (self.group > 1)
        )

    @property
    def kv_heads(self) -> int:
        return self.heads // self.group


@dataclass(frozen=True)
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    key_mask: Tensor | None
    seed: Tensor
    grad_out: Tensor
    context_lengths: Tensor | None = None  # int32 [B]
    window: int | None = None
    grad_lse: Tensor | None = None  # [B, H, T]
    prefix_index: Tensor | None = None  # int32 [B]: the prefixes are a bank
    prefix_lengths: Tensor | None = None  # int32 [R]
    bias: Tensor | None = None  # [1|B, H, T, S]
    cu_seqlens: Tensor | None = None  # int32 [B + 1]: query, key, value, grad_out are packed
    max_seqlen: int | None = None
    position_key: Tensor | None = None  # [H, slots, D]
    position_query: Tensor | None = None
    position_slots: Tensor | None = None  # int32 [2 M - 1]
    prefix_gate: Tensor | None = None  # [H], of a bank [R, H]
    padded: Inputs | None = None  # of packed inputs: the same call in the padded layout

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value, self.prefix_key, self.prefix_value

    @property
    def positions(self) -> Positions | None:
        if self.position_slots is None:
            return None
        return Positions(self.position_key, self.position_query, self.position_slots)

    @property
    def scale(self) -> float:
        terms = 1 + (self.position_key is not None) + (self.position_query is not None)
        return (self.query.shape[-1] * terms) ** -0.5

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of the public operator, dropout apart."""
        names = (
            "key_mask", "context_lengths", "window", "seed", "prefix_index", "prefix_lengths",
            "bias", "cu_seqlens", "max_seqlen", "prefix_gate",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def raw_options(self, p: float = 0.0, prefix_p: float = 0.0) -> AttentionOptions:
        """The options of the raw operators, whose prefixes have four dimensions."""
        window = -1 if self.window is None else self.window
        gate = self.prefix_gate
        if gate is not None and gate.dim() == 1:
            gate = gate[None]
        return AttentionOptions(
            self.key_mask, self.seed, self.scale, p, prefix_p,
            self.context_lengths, window, self.prefix_index, self.prefix_lengths,
            self.cu_seqlens, self.max_seqlen or 0, self.bias,
            self.position_key, self.position_query, self.position_slots, gate,
        )  # fmt: skip

    @property
    def raw_tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return *self.tensors[:3], *(
            prefix if prefix.dim() == 4 else prefix[None] for prefix in self.tensors[3:]
        )

    def pack_rows(self, padded: Tensor) -> Tensor:
        """[B, H, T, ...] of the padded call -> [N, H, ...]."""
        return padded.transpose(1, 2)[self.padded.key_mask]


def _values(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal values with one in fifty four times as large: logits up to about 20."""
    values = torch.randn(shape, generator=generator)
    outliers = torch.rand(shape, generator=generator) < 0.02
    return torch.where(outliers, values * 4, values).to(dtype)


def _mask(kind: str, batch: int, tokens: int, generator: torch.Generator) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "right padding":
        lengths = torch.randint(min(tokens, 1), tokens + 1, (batch, 1), generator=generator)
        return torch.arange(tokens) < lengths
    if kind == "random":
        return torch.rand(batch, tokens, generator=generator) < 0.5
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    if kind == "single token":
        mask[:, tokens // 2 : tokens // 2 + 1] = True
    elif kind == "empty rows":
        mask[1:] = True
    else:
        raise ValueError(f"kind: expected one of {MASKS}, got {kind!r}")
    return mask


def make_inputs(
    shape: Shape,
    dtype: torch.dtype,
    mask: str = "none",
    seed: int = 0,
    strides: str = "hf",
    device: torch.device | str = "cpu",
    rows: str = "all",
    lse: bool = False,
    bank: int = 0,
    bias: str = "none",
    packed: bool = False,
    positions: str = "none",
    gate: str = "none",
) -> Inputs:
    """Inputs with HF's transposed strides, or "sliced" ones that are views into a larger buffer.

    `rows`: "all" tokens are visible to every row, or one of ROWS. `lse`: with a gradient of lse.
    `bank`: rows of a prefix bank of unequal lengths, 0 = one shared prefix. `bias`: one of BIASES.
    `packed`: the packed layout of right-padded sequences. `positions`: one of POSITIONS.
    `gate`: one of GATES.
    """
    if packed:
        mask = "right padding"
    generator = torch.Generator().manual_seed(seed)

    def token_major(tokens: int, heads: int) -> Tensor:
        head_dim = shape.head_dim
        if strides == "sliced":
            packed = _values((shape.batch, tokens, heads, 3 * head_dim), dtype, generator)
            return packed[..., head_dim : 2 * head_dim].transpose(1, 2)
        return _values((shape.batch, tokens, heads, head_dim), dtype, generator).transpose(1, 2)

    query = token_major(shape.queries, shape.heads)
    key, value = (token_major(shape.tokens, shape.kv_heads) for _ in range(2))
    prefix = [
        _values((shape.kv_heads, shape.prefix, shape.head_dim), dtype, generator) for _ in range(2)
    ]
    grad_out = _values(query.shape, dtype, generator)
    if strides == "sliced":
        grad_out = grad_out[:, :, :, :1].expand(query.shape)  # stride 0, as .sum().backward() gives
    key_mask = _mask(mask, shape.batch, shape.tokens, generator)
    dropout_seed = torch.tensor([seed * 2654435761 + (seed << 34) + 12345])
    context_lengths = grad_lse = None
    if rows == "causal":
        context_lengths = torch.zeros(shape.batch, dtype=torch.int32)
    elif rows in ("context", "both"):
        context_lengths = torch.randint(
            shape.tokens + 1, (shape.batch,), generator=generator, dtype=torch.int32
        )
    window = shape.tokens // 4 if rows in ("window", "both") else None
    if lse:
        grad_lse = torch.randn(query.shape[:3], generator=generator)
    prefix_index = prefix_lengths = None
    if bank:
        prefix = [
            _values((bank, shape.kv_heads, shape.prefix, shape.head_dim), dtype, generator)
            for _ in range(2)
        ]
        prefix_index = torch.randint(bank, (shape.batch,), generator=generator, dtype=torch.int32)
        prefix_lengths = torch.randint(
            shape.prefix + 1, (bank,), generator=generator, dtype=torch.int32
        )
    prefix_gate = None
    if gate != "none":
        size = (bank, shape.heads) if bank else (shape.heads,)
        prefix_gate = torch.exp(4 * torch.randn(size, generator=generator) - 4)
        if gate == "closed":
            prefix_gate[torch.rand(size, generator=generator) < 0.5] = 0.0
    made = Inputs(
        query, key, value, *prefix, key_mask, dropout_seed, grad_out, context_lengths, window,
        grad_lse, prefix_index, prefix_lengths, _bias(bias, shape, dtype, generator),
        **_positions(positions, shape, dtype, generator), prefix_gate=prefix_gate,
    )  # fmt: skip
    return packed_inputs(made, device, strides) if packed else _to(made, device)


def _bias(kind: str, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor | None:
    if kind == "none":
        return None
    batch = 1 if kind == "shared" else shape.batch
    bias = _values((batch, shape.heads, shape.queries, shape.tokens), dtype, generator)
    if kind == "holes":  # in fp32, with columns that it hides
        bias = bias.float()
        bias[torch.rand(bias.shape, generator=generator) < 0.1] = float("-inf")
    return bias


def _positions(
    kind: str, shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """Distances that clamp; with one table, logarithmic buckets and a longer list of slots."""
    if kind == "none":
        return {}
    span = max(2, shape.tokens // 3)
    table = (shape.heads, 2 * span, shape.head_dim)
    of_key, of_query = (_values(table, dtype, generator) for _ in range(2))
    if kind == "both":
        slots = position_slots(max(1, shape.tokens), span)
    else:
        slots = position_slots(shape.tokens + 3, span, span, max_position=max(span, shape.tokens))
    made = {"position_key": of_key, "position_query": of_query, "position_slots": slots}
    made.pop({"c2p": "position_query", "p2c": "position_key"}.get(kind, ""), None)
    return made


def packed_inputs(padded: Inputs, device: str, strides: str = "hf") -> Inputs:
    """Right-padded inputs in the packed layout, on a device; pad rows get no gradient."""
    inside = padded.key_mask[:, None, :, None]
    padded = dataclasses.replace(
        padded,
        grad_out=padded.grad_out * inside,
        grad_lse=None if padded.grad_lse is None else padded.grad_lse * inside[..., 0],
    )
    lengths = padded.key_mask.sum(dim=1)
    made = dataclasses.replace(
        padded,
        key_mask=None,
        cu_seqlens=torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int(),
        max_seqlen=padded.key_mask.shape[1],
        padded=padded,
    )

    def pack(tensor: Tensor) -> Tensor:
        rows = made.pack_rows(tensor)
        if strides != "sliced":
            return rows
        buffer = torch.cat((rows, torch.full_like(rows, float("nan"))), dim=-1)
        return buffer[..., : rows.shape[-1]]

    changed = {name: pack(getattr(made, name)) for name in ("query", "key", "value", "grad_out")}
    if made.grad_lse is not None:
        changed["grad_lse"] = made.pack_rows(made.grad_lse)
    return _to(dataclasses.replace(made, **changed), device)


def _to(inputs: Inputs, device: torch.device | str) -> Inputs:
    moved = {}
    for field in dataclasses.fields(inputs):
        value = getattr(inputs, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = _moved(value, torch.device(device))
        elif isinstance(value, Inputs):
            moved[field.name] = _to(value, device)
    return dataclasses.replace(inputs, **moved)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The same view of a copy of its memory: Tensor.to makes a slice or an expansion contiguous."""
    if tensor.device == device:
        return tensor
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    memory = tensor.as_strided((elements,), (1,), 0).to(device)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
