"""The ways to compute prefix attention that bench_attention puts side by side.

A way takes (query, key, value, prefix_key, prefix_value) and gives out [B, H, T, D]. Those that
concatenate expand the prefix to the batch first, as PEFT does; masks are made beforehand.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ptv2_fast import prefix_attention
from tests.inputs import Inputs

OURS = "ptv2-fast"
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
OTHERS = {
    "cpu": (*CONCATENATING["cpu"], "split"),
    "cuda": (*CONCATENATING["cuda"], "split", "flex"),
}

Way = Callable[..., Tensor]
Call = Callable[[], object]


def providers(inputs: Inputs, dropout_p: float) -> dict[str, Way]:
    """Every way that can serve these inputs, as far as that is known without a try."""
    device = inputs.query.device.type

    def ours(*tensors: Tensor) -> Tensor:
        return prefix_attention(*tensors, key_mask=inputs.key_mask, dropout_p=dropout_p)

    def split(*tensors: Tensor) -> Tensor:
        return prefix_attention(*tensors, key_mask=inputs.key_mask, backend="split")

    found = {
        OURS: ours,
        "concat+sdpa": _concat_sdpa(inputs, dropout_p),
        "concat+eager": _concat_eager(inputs, dropout_p),
    }
    if device == "cuda":
        for name, kernel in SDPA_KERNELS.items():
            if kernel != SDPBackend.FLASH_ATTENTION or inputs.key_mask is None:
                found[name] = _with_kernel(kernel, found["concat+sdpa"])
    if dropout_p == 0:
        found["split"] = split
        if device == "cuda":
            torch.compiler.reset()  # or dynamo gives up after eight shapes
            found["flex"] = torch.compile(flex(inputs), dynamic=False)
    return found


def _visible_columns(inputs: Inputs) -> Tensor | None:
    """Over prefix and tokens, bool [B, 1, 1, P + S]; None where every column is visible."""
    if inputs.key_mask is None:
        return None
    batch, prefix_length = inputs.query.shape[0], inputs.prefix_key.shape[1]
    prefix = inputs.key_mask.new_ones(batch, prefix_length)
    return torch.cat((prefix, inputs.key_mask), dim=1)[:, None, None]


def _concatenate(prefix: Tensor, tokens: Tensor) -> Tensor:
    """[H, P, D] and [B, H, S, D] to [B, H, P + S, D]."""
    return torch.cat((prefix.expand(tokens.shape[0], *prefix.shape), tokens), dim=2)


def _concat_sdpa(inputs: Inputs, dropout_p: float) -> Way:
    visible = _visible_columns(inputs)

    def concat_sdpa(query, key, value, prefix_key, prefix_value):
        keys, values = _concatenate(prefix_key, key), _concatenate(prefix_value, value)
        return F.scaled_dot_product_attention(query, keys, values, visible, dropout_p)

    return concat_sdpa


def _with_kernel(kernel: SDPBackend, attention: Way) -> Way:
    def forced(*tensors: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return attention(*tensors)

    return forced


def _concat_eager(inputs: Inputs, dropout_p: float) -> Way:
    """Transformers' eager attention."""
    scale = inputs.query.shape[-1] ** -0.5
    visible = _visible_columns(inputs)
    additive = None
    if visible is not None:
        additive = torch.zeros_like(visible, dtype=inputs.query.dtype)
        additive = additive.masked_fill(~visible, torch.finfo(additive.dtype).min)

    def concat_eager(query, key, value, prefix_key, prefix_value):
        keys, values = _concatenate(prefix_key, key), _concatenate(prefix_value, value)
        scores = torch.matmul(query, keys.transpose(2, 3)) * scale
        if additive is not None:
            scores = scores + additive
        probabilities = F.dropout(scores.softmax(dim=-1), dropout_p)
        return torch.matmul(probabilities, values).transpose(1, 2).contiguous().transpose(1, 2)

    return concat_eager


def flex(inputs: Inputs) -> Way:
    """FlexAttention over the prefix with batch-1 K/V, and over the tokens, merged by their lse."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    batch, _, queries, _ = inputs.query.shape
    tokens, prefix_length = inputs.key.shape[2], inputs.prefix_key.shape[1]
    device = inputs.query.device
    lengths = torch.full((batch,), tokens, device=device)
    if inputs.key_mask is not None:
        lengths = inputs.key_mask.sum(dim=1)  # right padding only

    def is_token(sequence, head, query_index, key_index):
        return key_index < lengths[sequence]

    def always(sequence, head, query_index, key_index):
        return key_index >= 0

    # Batch-1 K/V want a mask of the query's batch.
    prefix_mask = create_block_mask(always, batch, None, queries, prefix_length, device=device)
    token_mask = None
    if inputs.key_mask is not None:
        token_mask = create_block_mask(is_token, batch, None, queries, tokens, device=device)

    def segment(query, key, value, mask):
        out, auxiliary = flex_attention(
            query, key, value, block_mask=mask, return_aux=AuxRequest(lse=True)
        )
        return out, auxiliary.lse  # [B, H, T, D], [B, H, T]

    def flex_merged(query, key, value, prefix_key, prefix_value):
        prefix_out, prefix_lse = segment(query, prefix_key[None], prefix_value[None], prefix_mask)
        token_out, token_lse = segment(query, key, value, token_mask)
        weight = torch.sigmoid(prefix_lse - token_lse)[..., None]
        return (prefix_out * weight + token_out * (1 - weight)).to(query.dtype)

    return flex_merged


def timed_calls(inputs: Inputs, dropout_p: float, backward: bool) -> dict[str, Call]:
    """A call of every way: the forward alone, or with the gradients of all five inputs."""
    leaves = [tensor.requires_grad_(backward) for tensor in inputs.tensors]

    def call(way: Way) -> Call:
        if not backward:
            return lambda: (way(*leaves),)
        return lambda: torch.autograd.grad(way(*leaves), leaves, inputs.grad_out)

    return {name: call(way) for name, way in providers(inputs, dropout_p).items()}


def running_calls(
    calls: dict[str, Call], dropout_p: float
) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls that run, and for each other one the first line of its error.

    Without dropout a way is also left out when its result is far from ours, which tells another
    function, not another rounding.
    """
    expected = calls[OURS]()
    running, refusals = {OURS: calls[OURS]}, {}
    for name, call in calls.items():
        if name == OURS:
            continue
        try:
            results = call()
        except (RuntimeError, ValueError) as error:
            refusals[name] = (str(error).splitlines() or [type(error).__name__])[0]
            continue
        if dropout_p == 0 and not _agree(results, expected):
            refusals[name] = "its result is not ours"
            continue
        running[name] = call
    return running, refusals


def _agree(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(
        (actual - ours).abs().max().item() <= 0.05 * ours.abs().max().item()
        for actual, ours in zip(results, expected, strict=True)
    )
