"""The only factory of operator inputs: outliers, large logits, HF's strides, every kind of mask."""

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = ("causal", "context", "window", "both")  # what rows see, beside the mask
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

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value, self.prefix_key, self.prefix_value


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
    device: str = "cpu",
    rows: str = "all",
    lse: bool = False,
) -> Inputs:
    """Inputs with HF's transposed strides, or "sliced" ones that are views into a larger buffer.

    `rows`: "all" tokens are seen by every row, or one of ROWS. `lse`: with a gradient of lse.
    """
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
    made = (query, key, value, *prefix, key_mask, dropout_seed, grad_out, context_lengths)
    placed = [None if tensor is None else tensor.to(device) for tensor in made]
    return Inputs(*placed, window, None if grad_lse is None else grad_lse.to(device))
