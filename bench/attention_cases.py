"""The cases of the attention benchmarks: inputs, the numerics gate, and a row of the table.

density            share of token columns that are no padding; 1.0 is measured without a mask
best torch path    the fastest of those that concatenate; the others stand on their own
speed-up over ...  their median time divided by ours in the same layout, padded or packed
useful             flop rate of ours over visible columns: 2 products forward, 4 more backward;
                   those with the tables of positions are not counted
executed           the same with the recomputed scores: 5 products backward (Triton: 7)
GEMM               flop rate of the matrix product, same dtype
share of GEMM      executed / GEMM
GB/s               inputs read once and outputs written once, in 10^9 bytes a second
copy GB/s          read and written by a copy from memory to memory
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import roofline
from bench.attention_providers import CONCATENATING, LIKE, OURS, ways_of
from bench.cases import spread_lengths
from bench.measure import Timing
from bench.shapes import MOST_DISTANT, POSITION_BUCKETS, AttentionShape
from ptv2_fast.ops.disentangled import position_slots
from tests.attention_checks import check_inputs
from tests.inputs import Inputs, make_inputs, packed_inputs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DENSITIES = (0.5, 1.0)
DROPOUTS = (0.0, 0.1)
GEMM = "GEMM"


@dataclass(frozen=True)
class Case:
    """What one row of the table measures; `backend`: of ours, None = the device's own."""

    name: str
    shape: AttentionShape
    dtype_name: str
    density: float
    dropout_p: float
    backward: bool
    device: torch.device
    backend: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]


def padding_mask(shape: AttentionShape, density: float) -> Tensor:
    """Right padding with evenly spread lengths whose mean is density * tokens, bool [B, S]."""
    lengths = torch.tensor(spread_lengths(shape.batch, shape.tokens, density))
    return torch.arange(shape.tokens) < lengths[:, None]


def inputs_of(case: Case) -> Inputs:
    """Packed inputs; their `padded` has a mask where there is padding."""
    padded = replace(_made(case.shape, case.dtype), key_mask=padding_mask(case.shape, case.density))
    packed = packed_inputs(padded, str(case.device))
    if case.density == 1.0:
        packed = replace(packed, padded=replace(packed.padded, key_mask=None))
    return packed


def _made(shape: AttentionShape, dtype: torch.dtype, **options: object) -> Inputs:
    """`options`: of make_inputs."""
    bias = "shared" if shape.has_bias else "none"
    made = replace(make_inputs(shape, dtype, bias=bias, **options), window=shape.window)
    if not shape.has_positions:
        return made
    generator = torch.Generator().manual_seed(0)
    size = (shape.heads, 2 * POSITION_BUCKETS, shape.head_dim)
    of_key, of_query = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    slots = position_slots(
        shape.tokens, POSITION_BUCKETS, POSITION_BUCKETS, max_position=MOST_DISTANT
    )
    tables = {"position_key": of_key, "position_query": of_query, "position_slots": slots}
    on_device = {name: tensor.to(made.query.device) for name, tensor in tables.items()}
    return replace(made, **on_device)


def check_numerics(case: Case, backend: str) -> None:
    """The rule of the tests, on two heads of two sequences."""
    small = replace(case.shape, batch=2, heads=2)
    mask = "none" if case.density == 1.0 else "right padding"
    inputs = _made(small, case.dtype, mask=mask, device=case.device)
    check_inputs([backend], inputs, case.dropout_p, 0.0)


def row_of(case: Case, timings: dict[str, Timing], copy_bytes_per_ms: float) -> dict[str, object]:
    row: dict[str, object] = {
        "shape": case.name,
        "dtype": case.dtype_name,
        "dropout": case.dropout_p,
        "pass": "forward+backward" if case.backward else "forward",
        "density": case.density,
    }
    names = ways_of(case.device)
    for way in names:
        for column in ("median", "p20", "p80"):
            timed = way in timings
            row[f"{way} {column} ms"] = round(getattr(timings[way], column), 4) if timed else ""
    for way in names:
        ours = LIKE.get(way, OURS)
        if not way.startswith(OURS):
            both = way in timings and ours in timings
            ratio = round(timings[way].median / timings[ours].median, 2) if both else ""
            row[f"speed-up over {way}"] = ratio
    best = min(
        (way for way in CONCATENATING[case.device.type] if way in timings),
        key=lambda way: timings[way].median,
    )
    row["best torch path"] = best
    row["speed-up over best"] = round(timings[best].median / timings[OURS].median, 2)
    return row | _rates(case, timings, copy_bytes_per_ms)


def _rates(case: Case, timings: dict[str, Timing], copy_bytes_per_ms: float) -> dict[str, object]:
    shape, ours = case.shape, timings[OURS].median
    mask = padding_mask(shape, case.density)
    visible = int(mask.sum())
    unit, flops_per_ms = roofline.rate_unit(case.device)
    product = roofline.one_product(shape, mask) / ours / flops_per_ms
    executed = product * roofline.executed_products(case.backward, case.device)
    gemm = roofline.gemm_flops(case.device) / timings[GEMM].median / flops_per_ms
    moved = roofline.compulsory_bytes(shape, visible, case.dtype.itemsize, case.backward)
    return {
        f"useful {unit}": round(product * roofline.useful_products(case.backward), 2),
        f"executed {unit}": round(executed, 2),
        f"{GEMM} {unit}": round(gemm, 2),
        f"share of {GEMM}": round(executed / gemm, 3),
        "GB/s": round(moved / ours / 1e6, 2),
        "copy GB/s": round(copy_bytes_per_ms / 1e6, 1),
    }
