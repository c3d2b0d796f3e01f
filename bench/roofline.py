"""How much work an attention call is, and what the machine could do at most."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.measure import time_interleaved
from bench.shapes import AttentionShape

GEMM_SIZE = {"cpu": 1024, "cuda": 4096}  # rows, columns and depth of the product
COPIED_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}  # beyond the caches
# Matrix products that a backward pass executes: the Triton kernels compute scores and dP twice.
BACKWARD_PRODUCTS = {"cpu": 5, "cuda": 7}


def rate_unit(device: torch.device) -> tuple[str, float]:
    """The unit of the flop rates, and flops per ms in it."""
    return ("TFLOP/s", 1e9) if device.type == "cuda" else ("GFLOP/s", 1e6)


def one_product(shape: AttentionShape, mask: Tensor) -> float:
    """Flops of one matrix product over the visible columns.

    Args:
        shape: of the inputs.
        mask: token columns that are no padding, bool [B, S].
    """
    pairs = shape.queries * (int(mask.sum()) + shape.batch * shape.prefix)
    if shape.window is not None:
        row = torch.arange(shape.queries)
        is_near = (row[:, None] - row).abs() <= shape.window
        pairs = int((is_near & mask[:, None]).sum()) + shape.queries * shape.batch * shape.prefix
    return 2 * shape.heads * shape.head_dim * pairs


def useful_products(backward: bool) -> int:
    """Two forward, four more backward: what is recomputed is not counted."""
    return 6 if backward else 2


def executed_products(backward: bool, device: torch.device) -> int:
    """Two forward, and in the backward the recomputed scores too."""
    return 2 + BACKWARD_PRODUCTS[device.type] * backward


def compulsory_bytes(
    shape: AttentionShape, visible_tokens: int, itemsize: int, backward: bool
) -> float:
    """Every input read once and every output written once; the prefix once for the whole batch.

    Keys and values of padding are not read; their gradients are written. A bias is read by each
    pass.
    """
    row = shape.heads * shape.head_dim * itemsize
    query_rows, token_rows = shape.batch * shape.queries, shape.batch * shape.tokens
    rows = 2 * query_rows + 2 * visible_tokens + 2 * shape.prefix
    if backward:
        rows += 4 * query_rows + 2 * visible_tokens + 2 * token_rows + 4 * shape.prefix
    bias = shape.heads * shape.queries * shape.tokens * itemsize * shape.has_bias
    return rows * row + bias * (1 + backward)


def gemm_flops(device: torch.device) -> float:
    return 2 * GEMM_SIZE[device.type] ** 3


def gemm_call(dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """A square matrix product of torch: the rate that attention is held against."""
    size = GEMM_SIZE[device.type]
    left, right, out = torch.randn(3, size, size, device=device).to(dtype)
    return lambda: torch.mm(left, right, out=out)


def copy_bytes_per_ms(device: torch.device) -> float:
    """Bytes read and written per ms by a copy from memory to memory."""
    source = torch.zeros(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    timing = time_interleaved({"copy": lambda: target.copy_(source)}, device, seconds=0.1)["copy"]
    return 2 * COPIED_BYTES[device.type] / timing.median
