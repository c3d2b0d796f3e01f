"""The ways to compute prefix attention that the benchmarks put side by side.

A way takes (query, key, value, prefix_key, prefix_value) and gives out, all padded [B, H, T, D] or
all packed [N, H, D]. Those that concatenate per sequence expand the prefix to the batch first, as
PEFT does; masks and index tensors are made beforehand.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ptv2_fast import disentangled_prefix_attention, prefix_attention
from tests.inputs import Inputs

OURS, OURS_PACKED = "ptv2-fast", "ptv2-fast packed"
SDPA_KERNELS = {  # each forced, beside the one that torch chooses for "concat+sdpa"
    "concat+flash": SDPBackend.FLASH_ATTENTION,
    "concat+cudnn": SDPBackend.CUDNN_ATTENTION,
    "concat+efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# The torch paths that a speed-up "over best" is taken over.
CONCATENATING = {
    "cpu": ("concat+sdpa", "concat+eager"),
    "cuda": ("concat+sdpa", "concat+eager", *SDPA_KERNELS),
}
PACKED = ("flex", "varlen", "flash-attn varlen")
LIKE = dict.fromkeys(PACKED, OURS_PACKED)  # what a way is compared with, where not OURS

Way = Callable[..., Tensor]


@dataclass(frozen=True)
class Call:
    """One way on its inputs.

    Args:
        run: computes its results: out, or the gradients of its five inputs.
        is_packed: which layout they have.
    """

    run: Callable[[], tuple[Tensor, ...]]
    is_packed: bool


def ways_of(device: torch.device) -> tuple[str, ...]:
    """Every way on a kind of device, ours first."""
    if device.type == "cpu":
        return (OURS, OURS_PACKED, *CONCATENATING["cpu"], "split")
    return (OURS, OURS_PACKED, *CONCATENATING["cuda"], "split", *PACKED)


def providers(packed: Inputs, dropout_p: float, backend: str | None = None) -> dict[str, Way]:
    """Every way that can serve these inputs, as far as that is known without a try.

    Args:
        packed: inputs in the packed layout; their `padded` is the other one.
        dropout_p: of the probabilities.
        backend: of ours.
    """
    padded = packed.padded
    on_gpu = packed.query.device.type == "cuda"
    scores = {"window": packed.window, "bias": packed.bias}
    options = {"dropout_p": dropout_p, "backend": backend}
    attention: Way = functools.partial(prefix_attention, **scores)
    if packed.positions is not None:
        names = ("position_key", "position_query", "position_slots")
        tables = dict(zip(names, packed.positions, strict=True))
        attention = functools.partial(disentangled_prefix_attention, **tables)

    def ours(*tensors: Tensor) -> Tensor:
        return attention(*tensors, key_mask=padded.key_mask, **options)

    def ours_packed(*tensors: Tensor) -> Tensor:
        lengths = {"cu_seqlens": packed.cu_seqlens, "max_seqlen": packed.max_seqlen}
        return attention(*tensors, **lengths, **options)

    def split(*tensors: Tensor) -> Tensor:
        return prefix_attention(*tensors, key_mask=padded.key_mask, backend="split", **scores)

    found = {
        OURS: ours,
        OURS_PACKED: ours_packed,
        "concat+sdpa": _concat_sdpa(padded, dropout_p),
        "concat+eager": _concat_eager(padded, dropout_p),
    }
    if packed.positions is not None:
        return found
    if on_gpu:
        has_mask = any(x is not None for x in (padded.key_mask, padded.window, padded.bias))
        for name, kernel in SDPA_KERNELS.items():
            if kernel != SDPBackend.FLASH_ATTENTION or not has_mask:
                found[name] = _with_kernel(kernel, found["concat+sdpa"])
    if dropout_p == 0:
        found["split"] = split
    if on_gpu:
        found |= _packed_peers(packed, dropout_p)
    return found


def _packed_peers(packed: Inputs, dropout_p: float) -> dict[str, Way]:
    """Variable-length attention has no columns that a window or a bias leaves alone."""
    found: dict[str, Way] = {}
    if packed.bias is not None:
        return found
    if dropout_p == 0:
        torch.compiler.reset()  # or dynamo gives up after eight shapes
        found["flex"] = flex(packed, lambda function: torch.compile(function, dynamic=False))
    if packed.window is not None:
        return found
    if dropout_p == 0 and importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        found["varlen"] = _varlen(packed, _torch_varlen())
    if importlib.util.find_spec("flash_attn") is not None:
        found["flash-attn varlen"] = _varlen(packed, _flash_attn_varlen(dropout_p))
    return found


def _visible_columns(inputs: Inputs) -> Tensor | None:
    """Over prefix and tokens, bool [1|B, 1, 1|T, P + S]; None where every column is visible."""
    visible = None if inputs.key_mask is None else inputs.key_mask[:, None, None]
    if inputs.window is not None:
        row = torch.arange(inputs.query.shape[2], device=inputs.query.device)
        is_near = (row[:, None] - row).abs() <= inputs.window
        visible = is_near[None, None] if visible is None else visible & is_near
    return None if visible is None else F.pad(visible, (inputs.prefix_key.shape[1], 0), value=True)


def _added_scores(inputs: Inputs, hidden: float = float("-inf")) -> Tensor | None:
    """What is added to the scores, [1|B, 1|H, 1|T, P + S], `hidden` for columns out of sight.

    None where nothing is.
    """
    visible, bias = _visible_columns(inputs), inputs.bias
    if bias is not None:
        bias = F.pad(bias, (inputs.prefix_key.shape[1], 0))
    if visible is None:
        return bias
    if bias is None:
        bias = torch.zeros_like(visible, dtype=inputs.query.dtype)
    return bias.masked_fill(~visible, hidden)


def _concatenate(prefix: Tensor, tokens: Tensor) -> Tensor:
    """[H, P, D] and [B, H, S, D] to [B, H, P + S, D]."""
    return torch.cat((prefix.expand(tokens.shape[0], *prefix.shape), tokens), dim=2)


def _concat_sdpa(inputs: Inputs, dropout_p: float) -> Way:
    """With a mask of booleans where there is no bias."""
    mask = _visible_columns(inputs) if inputs.bias is None else _added_scores(inputs)
    by_distance = _position_scores(inputs)

    def concat_sdpa(query, key, value, prefix_key, prefix_value):
        keys, values = _concatenate(prefix_key, key), _concatenate(prefix_value, value)
        added = mask
        if by_distance is not None:
            added = by_distance(query, key) * inputs.scale
            if mask is not None:
                added = added.masked_fill(~mask, float("-inf"))
        return F.scaled_dot_product_attention(
            query, keys, values, added, dropout_p, scale=inputs.scale
        )

    return concat_sdpa


def _position_scores(inputs: Inputs) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What DeBERTa adds to unscaled scores, of query and key: [B, H, T, P + S]; None without."""
    if inputs.positions is None:
        return None
    tables, row = inputs.positions, torch.arange(inputs.query.shape[2])
    slots = tables.slots.long()[
        (row[:, None] - row + len(tables.slots) // 2).to(tables.slots.device)
    ]
    shape = (*inputs.query.shape[:2], *slots.shape)
    prefix_length = inputs.prefix_key.shape[1]

    def by_distance(query: Tensor, key: Tensor) -> Tensor:
        of_queries = torch.matmul(query, tables.key.transpose(1, 2)).gather(-1, slots.expand(shape))
        of_keys = torch.matmul(key, tables.query.transpose(1, 2)).gather(-1, slots.T.expand(shape))
        return F.pad(of_queries + of_keys.transpose(2, 3), (prefix_length, 0))

    return by_distance


def _with_kernel(kernel: SDPBackend, attention: Way) -> Way:
    def forced(*tensors: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return attention(*tensors)

    return forced


def _concat_eager(inputs: Inputs, dropout_p: float) -> Way:
    """Transformers' eager attention, for DeBERTa its own."""
    by_distance = _position_scores(inputs)
    additive = _added_scores(inputs, torch.finfo(inputs.query.dtype).min)

    def concat_eager(query, key, value, prefix_key, prefix_value):
        keys, values = _concatenate(prefix_key, key), _concatenate(prefix_value, value)
        scores = torch.matmul(query, keys.transpose(2, 3)) * inputs.scale
        if by_distance is not None:
            scores = scores + by_distance(query, key) * inputs.scale
        if additive is not None:
            scores = scores + additive
        probabilities = F.dropout(scores.softmax(dim=-1), dropout_p)
        return torch.matmul(probabilities, values).transpose(1, 2).contiguous().transpose(1, 2)

    return concat_eager


def _sequence_of_row(packed: Inputs) -> Tensor:
    """int64 [N]"""
    lengths = packed.cu_seqlens.diff().long()
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def flex(packed: Inputs, compiled: Callable[[Callable], Callable]) -> Way:
    """FlexAttention over the batch as one sequence: a mask shows each row the prefix and its own.

    `compiled` is applied to flex_attention.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, prefix_length = packed.query.shape[0], packed.prefix_key.shape[1]
    sequence = _sequence_of_row(packed)

    def is_seen(batch, head, query_index, key_index):
        token = (key_index - prefix_length).clamp(min=0)
        is_own = sequence[token] == sequence[query_index]
        if packed.window is not None:
            is_own = is_own & ((token - query_index).abs() <= packed.window)
        return (key_index < prefix_length) | is_own

    mask = create_block_mask(
        is_seen, None, None, rows, prefix_length + rows, device=packed.query.device
    )
    attention = compiled(flex_attention)

    def flex_packed(query, key, value, prefix_key, prefix_value):
        keys = torch.cat((prefix_key, key.transpose(0, 1)), dim=1)[None]
        values = torch.cat((prefix_value, value.transpose(0, 1)), dim=1)[None]
        out = attention(query.transpose(0, 1)[None], keys, values, block_mask=mask)
        return out[0].transpose(0, 1)

    return flex_packed


def _varlen(packed: Inputs, attention: Callable[..., Tensor]) -> Way:
    """Attention over sequences of unequal length, each with a copy of the prefix in front."""
    prefix_length = packed.prefix_key.shape[1]
    lengths = packed.cu_seqlens.diff()
    first = torch.arange(prefix_length, device=lengths.device)
    rows = torch.arange(packed.query.shape[0], device=lengths.device) + prefix_length
    # Rows of [prefix ; tokens], the prefix again before every sequence.
    parts = rows.split(lengths.tolist())
    index = torch.cat([row for part in parts for row in (first, part)])
    steps = prefix_length * torch.arange(len(lengths) + 1, device=lengths.device)
    cu_keys = (packed.cu_seqlens + steps).int()
    longest = packed.max_seqlen

    def varlen(query, key, value, prefix_key, prefix_value):
        keys = torch.cat((prefix_key.transpose(0, 1), key))[index]
        values = torch.cat((prefix_value.transpose(0, 1), value))[index]
        ends = (packed.cu_seqlens, cu_keys, longest, longest + prefix_length)
        return attention(query, keys, values, *ends)

    return varlen


def _torch_varlen() -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def _flash_attn_varlen(dropout_p: float) -> Callable[..., Tensor]:
    from flash_attn import flash_attn_varlen_func

    return lambda *arguments: flash_attn_varlen_func(*arguments, dropout_p=dropout_p)


def timed_calls(
    packed: Inputs, dropout_p: float, backward: bool, backend: str | None = None
) -> dict[str, Call]:
    """A call of every way: the forward alone, or with the gradients of all five inputs."""

    def make(name: str, way: Way) -> Call:
        is_packed = name == OURS_PACKED or name in PACKED
        inputs = packed if is_packed else packed.padded
        leaves = [tensor.requires_grad_(backward) for tensor in inputs.tensors]
        if not backward:
            return Call(lambda: (way(*leaves),), is_packed)
        return Call(lambda: torch.autograd.grad(way(*leaves), leaves, inputs.grad_out), is_packed)

    return {name: make(name, way) for name, way in providers(packed, dropout_p, backend).items()}


def running_calls(
    calls: dict[str, Call], dropout_p: float
) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls that run, and for each other one the first line of its error.

    Without dropout a way is also left out when its result is far from ours in the same layout,
    which tells another function, not another rounding.
    """
    ours = (OURS, OURS_PACKED)
    expected = {calls[name].is_packed: calls[name].run() for name in ours}
    running, refusals = {name: calls[name] for name in ours}, {}
    for name, call in calls.items():
        if name in ours:
            continue
        try:
            results = call.run()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            refusals[name] = (str(error).splitlines() or [type(error).__name__])[0]
            continue
        if dropout_p == 0 and not _agree(results, expected[call.is_packed]):
            refusals[name] = "its result is not ours"
            continue
        running[name] = call
    return running, refusals


def _agree(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(
        (actual - ours).abs().max().item() <= 0.05 * ours.abs().max().item()
        for actual, ours in zip(results, expected, strict=True)
    )
