"""Backward pass from the saved lse: probabilities are recomputed, nothing of size T x S is stored.

    delta = rowsum(out * grad_out) - grad_lse
    dP = keep * (grad_out @ value^T) / (1 - p);  dS = P * (dP - delta)

One kernel per owner of a result (query tile, key tile, prefix tile), so that every result is
written once, without atomics: the bits are the same from run to run.
"""

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ptv2_kernels.arguments import (
    LOG2_E,
    Extras,
    describe_call,
    empty_statistics,
    empty_token_major,
    strided,
    tile_grid,
)
from ptv2_kernels.backward_key_value import _grad_key_value_kernel
from ptv2_kernels.backward_prefix import launch_backward_prefix
from ptv2_kernels.backward_query import _grad_query_kernel
from ptv2_kernels.configs import COMPILER_OPTIONS, launch_options, tile_widths
from ptv2_kernels.launching import Launcher
from ptv2_kernels.places import ProgramPlace, locate_tile, row_pointers
from ptv2_kernels.tiles import load_queries, sum_rows


@triton.jit(do_not_specialize=["queries"])
def _delta_kernel(
    out,
    grad_out,
    grad_lse_ptr,
    delta_ptr,
    extras,
    heads,
    queries,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
):
    """rowsum(out * grad_out) - grad_lse; grid (row tiles * batch, heads), packed: one sequence."""
    first_row, sequence = locate_tile(queries, BLOCK_QUERIES)
    head = tl.program_id(1)
    place = ProgramPlace(
        sequence=sequence, start=sequence, row_count=queries, column_count=0,
        head=head, kv_head=head, heads=heads, kv_heads=heads, queries=queries, tokens=0,
        context=0, seed=0,
    )  # fmt: skip
    out_tile = load_queries(out, place, first_row, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIMS)
    grad_out_tile = load_queries(grad_out, place, first_row, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIMS)
    delta = tl.zeros((BLOCK_QUERIES,), tl.float32)
    for chunk in tl.static_range(len(BLOCK_DIMS)):
        product = out_tile[chunk].to(tl.float32) * grad_out_tile[chunk].to(tl.float32)
        delta += sum_rows(product)
    inside = tl.arange(0, BLOCK_QUERIES) < queries - first_row
    if grad_lse_ptr is not None:
        grad_lse_ptrs = row_pointers(grad_lse_ptr, extras, place, first_row, BLOCK_QUERIES)
        delta -= tl.load(grad_lse_ptrs, mask=inside, other=0.0)
    delta_ptrs = row_pointers(delta_ptr, extras, place, first_row, BLOCK_QUERIES)
    tl.store(delta_ptrs, delta, mask=inside)


_delta = Launcher(_delta_kernel)
_grad_query = Launcher(_grad_query_kernel)
_grad_key_value = Launcher(_grad_key_value_kernel)


def _launch_delta(extras: Extras, out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    delta = empty_statistics(out)
    if delta.numel() == 0:
        return delta
    heads, head_dim = out.shape[1], out.shape[-1]
    # The sequences of the packed layout need not be told apart here.
    batch, rows = (1, out.shape[0]) if out.dim() == 3 else (out.shape[0], out.shape[2])
    options = _delta_options(head_dim)
    _delta(
        (-(-rows // options["BLOCK_QUERIES"]) * batch, heads, 1),
        options,
        strided(out),
        strided(grad_out),
        None if grad_lse is None else grad_lse.contiguous(),
        delta,
        extras,
        heads,
        rows,
    )
    return delta


@functools.cache
def _delta_options(head_dim: int) -> dict[str, Any]:
    widths = tile_widths(head_dim)
    return {"HEAD_DIM": head_dim, "BLOCK_DIMS": widths, "BLOCK_QUERIES": 64, **COMPILER_OPTIONS}


def launch_backward(
    grad_out: Tensor,  # [B, H, T, D], any strides; packed: [N, H, D]
    query: Tensor,  # [B, H, T, D]; packed: [N, H, D]
    key: Tensor,  # [B, H_kv, S, D]; packed: [N, H_kv, D]
    value: Tensor,
    prefix_key: Tensor,  # [R, H_kv, P, D]
    prefix_value: Tensor,
    out: Tensor,  # as query
    lse: Tensor,  # [B, H, T]; packed: [N, H]
    grad_lse: Tensor | None,
    needs_query: bool,
    needs_key_value: bool,
    needs_prefix: bool,
    joint: bool,
    *call_options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients that are needed; an empty(0) stands for one that is not.

    `joint`: the first result holds those of query, key and value along the heads, and the next two
    are empty(0). `call_options`: those of `describe_call`, from key_mask on.
    """
    call = describe_call(query, key, prefix_key, *call_options)
    heads, kv_heads = query.shape[1], key.shape[1]
    if joint:
        together = empty_token_major(query, heads + 2 * kv_heads)
        targets = together.split((heads, kv_heads, kv_heads), dim=1)
        results = (together, query.new_empty(0), query.new_empty(0))
    else:
        grad_query = empty_token_major(query, heads) if needs_query else query.new_empty(0)
        grad_key, grad_value = (
            empty_token_major(key, kv_heads) if needs_key_value else query.new_empty(0)
            for _ in range(2)
        )
        results = targets = (grad_query, grad_key, grad_value)
    extras_of_prefix = call.extras.of_prefix()
    lse, delta = lse.contiguous(), _launch_delta(extras_of_prefix, out, grad_out, grad_lse)
    tokens = (strided(query), strided(key), strided(value))
    shared = (lse, delta, call.extras)
    of_tokens = (lse, delta, call.extras.of_tokens())
    if needs_query and targets[0].numel():
        options = launch_options("query", query, call.extras, prefix_key.shape[2])
        _grad_query(
            tile_grid(call, call.longest, options["BLOCK_QUERIES"], heads),
            options,
            *tokens,
            strided(prefix_key),
            strided(prefix_value),
            strided(grad_out),
            strided(targets[0]),
            *shared,
            *call.sizes.values(),
            call.scale * LOG2_E,
        )
    if needs_key_value and targets[1].numel():
        options = launch_options("key_value", query, call.extras)
        _grad_key_value(
            tile_grid(call, call.longest_key, options["BLOCK_KEYS"], kv_heads),
            options,
            *tokens,
            strided(grad_out),
            strided(targets[1]),
            strided(targets[2]),
            *of_tokens,
            *call.sizes.values(),
            call.scale * LOG2_E,
        )
    if needs_prefix:
        of_prefix = launch_backward_prefix(
            call._replace(extras=extras_of_prefix),
            query,
            prefix_key,
            prefix_value,
            grad_out,
            lse,
            delta,
        )
    else:
        of_prefix = (prefix_key.new_empty(0), prefix_key.new_empty(0), lse.new_empty(0))
    return *results, *of_prefix
