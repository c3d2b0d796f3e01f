"""How fast is prefix attention against concatenation, and against the two-call split?

    python -m bench.bench_attention --device cpu
    python -m bench.bench_attention --device cpu --only base-b8-t128-p20 --dtype fp32

The numerics rule of the tests is checked on every shape first; no figure is printed where it fails.
Every row is timed in one process, all ways and a matrix product of torch (GEMM) by turns. Columns:

    density            share of token columns that are no padding; 1.0 is measured without a mask
    best torch path    the fastest of those that concatenate; the split and Flex stand on their own
    speed-up over ...  their median time divided by ours
    useful             flop rate of ours over visible columns: 2 products forward, 4 more backward
    executed           the same with the recomputed scores: 5 products backward (Triton: 7)
    GEMM               flop rate of the matrix product, same dtype
    share of GEMM      executed / GEMM
    GB/s               inputs read once and outputs written once, in 10^9 bytes a second
    copy GB/s          read and written by a copy from memory to memory

On a CPU a run takes about ten minutes; on a GPU most of it is the compilation of FlexAttention.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from bench import roofline
from bench.attention_providers import CONCATENATING, OTHERS, OURS, running_calls, timed_calls
from bench.attention_report import WIDTH, one_line, print_report
from bench.measure import RESULTS, Timing, machine_columns, time_interleaved, write_csv
from bench.shapes import ATTENTION_SHAPES
from tests.inputs import Inputs, Shape, make_inputs
from tests.test_prefix_attention import check

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DENSITIES = (0.5, 1.0)
DROPOUTS = (0.0, 0.1)
GEMM = "GEMM"


@dataclass(frozen=True)
class Case:
    """What one row of the table measures."""

    name: str
    shape: Shape
    dtype_name: str
    density: float
    dropout_p: float
    backward: bool
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]


def padding_mask(shape: Shape, density: float) -> Tensor | None:
    """Right padding with evenly spread lengths whose mean is density * tokens, bool [B, S]."""
    if density == 1.0:
        return None
    spread = 2 * min(density, 1 - density)
    places = (torch.arange(shape.batch) + 0.5) / shape.batch - 0.5
    lengths = (shape.tokens * (density + spread * places)).round()
    return torch.arange(shape.tokens) < lengths[:, None]


def inputs_of(case: Case) -> Inputs:
    mask = padding_mask(case.shape, case.density)
    inputs = make_inputs(case.shape, case.dtype, device=str(case.device))
    return replace(inputs, key_mask=None if mask is None else mask.to(case.device))


def check_numerics(case: Case) -> None:
    """The rule of the tests, on two heads of two sequences."""
    small = replace(case.shape, batch=2, heads=2)
    backend = "cpp" if case.device.type == "cpu" else "triton"
    mask = "none" if case.density == 1.0 else "right padding"
    check([backend], small, case.dtype, mask, case.dropout_p, 0.0)


def measure(case: Case, seconds: float) -> tuple[dict[str, Timing], dict[str, str]]:
    """Timings of every way that runs and of the matrix product; why each other way does not run."""
    calls = timed_calls(inputs_of(case), case.dropout_p, case.backward)
    running, refusals = running_calls(calls, case.dropout_p)
    running[GEMM] = roofline.gemm_call(case.dtype, case.device)
    return time_interleaved(running, case.device, seconds), refusals


def row_of(case: Case, timings: dict[str, Timing], copy_bytes_per_ms: float) -> dict[str, object]:
    row: dict[str, object] = {
        "shape": case.name,
        "dtype": case.dtype_name,
        "dropout": case.dropout_p,
        "pass": "forward+backward" if case.backward else "forward",
        "density": case.density,
    }
    ours, kind = timings[OURS].median, case.device.type
    for way in (OURS, *OTHERS[kind]):
        for column in ("median", "p20", "p80"):
            timed = way in timings
            row[f"{way} {column} ms"] = round(getattr(timings[way], column), 4) if timed else ""
    for way in OTHERS[kind]:
        row[f"speed-up over {way}"] = round(timings[way].median / ours, 2) if way in timings else ""
    best = min(
        (way for way in CONCATENATING[kind] if way in timings),
        key=lambda way: timings[way].median,
    )
    row["best torch path"] = best
    row["speed-up over best"] = round(timings[best].median / ours, 2)
    return row | _rates(case, timings, copy_bytes_per_ms)


def _rates(case: Case, timings: dict[str, Timing], copy_bytes_per_ms: float) -> dict[str, object]:
    shape, ours = case.shape, timings[OURS].median
    mask = padding_mask(shape, case.density)
    visible = shape.batch * shape.tokens if mask is None else int(mask.sum())
    unit, flops_per_ms = roofline.rate_unit(case.device)
    product = roofline.one_product(shape, visible) / ours / flops_per_ms
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


def cases_of(names: list[str], dtype_names: list[str], device: torch.device) -> list[Case]:
    """In the order of the table; a case with the backward follows the one without."""
    return [
        Case(name, ATTENTION_SHAPES[device.type][name], dtype_name, density, dropout_p,
             backward, device)
        for name in names
        for dtype_name in dtype_names
        for density in DENSITIES
        for dropout_p in DROPOUTS
        for backward in (False, True)
    ]  # fmt: skip


def measure_all(cases: list[Case], seconds: float, console: Console) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    told: set[tuple[str, str]] = set()
    for case in cases:
        if not rows or case.name != rows[-1]["shape"]:
            copy_bytes_per_ms = roofline.copy_bytes_per_ms(case.device)
        if not case.backward:
            check_numerics(case)
        timings, refusals = measure(case, seconds)
        for way, reason in sorted(refusals.items() - told):
            console.print(f"{way} left out: {reason}")
        told |= refusals.items()
        rows.append(row_of(case, timings, copy_bytes_per_ms))
        console.print(one_line(rows[-1]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=tuple(ATTENTION_SHAPES))
    parser.add_argument("--only", action="append", metavar="SHAPE", help="shapes to run")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--seconds", type=float, default=0.8, help="measuring time per row")
    parser.add_argument("--output", type=Path, help="CSV file (default: bench/results/...)")
    arguments = parser.parse_args()
    known = ATTENTION_SHAPES[arguments.device]
    names = arguments.only or list(known)
    if not set(names) <= set(known):
        parser.error(f"--only: expected some of {list(known)}, got {names}")
    device = torch.device(arguments.device)
    console = Console(width=WIDTH)
    cases = cases_of(names, arguments.dtype or list(DTYPES), device)
    rows = measure_all(cases, arguments.seconds, console)
    columns = machine_columns(device)
    output = arguments.output or RESULTS / f"attention-{device.type}.csv"
    write_csv(output, [{**row, **columns} for row in rows])
    print_report(rows, console)
    console.print(f"{columns}\nwritten to {output}")


if __name__ == "__main__":
    main()
