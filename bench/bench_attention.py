"""How fast is prefix attention on a CPU against concatenation, and against the two-call split?

    python -m bench.bench_attention
    python -m bench.bench_attention --only base-b8-t128-p20 --dtype fp32

The numerics rule of the tests is checked on every shape first; no figure is printed where it fails.
Every row is timed in one process, all ways and a matrix product of torch (GEMM) by turns; columns
are those of attention_cases.py. A run takes about ten minutes. On a GPU: `bench.gpu attention`.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console

from bench import roofline
from bench.attention_cases import (
    DENSITIES,
    DROPOUTS,
    DTYPES,
    GEMM,
    Case,
    check_numerics,
    inputs_of,
    row_of,
)
from bench.attention_providers import running_calls, timed_calls
from bench.attention_report import WIDTH, one_line, print_report
from bench.measure import RESULTS, Timing, machine_columns, merge_csv, time_interleaved
from bench.shapes import ATTENTION_SHAPES

CPU = torch.device("cpu")
KEY = ("shape", "dtype", "dropout", "pass", "density")  # of a row: earlier ones are replaced


def measure(case: Case, seconds: float) -> tuple[dict[str, Timing], dict[str, str]]:
    """Timings of every way that runs and of the matrix product; why each other way does not run."""
    calls = timed_calls(inputs_of(case), case.dropout_p, case.backward)
    running, refusals = running_calls(calls, case.dropout_p)
    functions = {name: call.run for name, call in running.items()}
    functions[GEMM] = roofline.gemm_call(case.dtype, CPU)
    return time_interleaved(functions, CPU, seconds), refusals


def cases_of(names: list[str], dtype_names: list[str]) -> list[Case]:
    """In the order of the table; a case with the backward follows the one without."""
    return [
        Case(name, ATTENTION_SHAPES["cpu"][name], dtype_name, density, dropout_p, backward, CPU)
        for name in names
        for dtype_name in dtype_names
        for density in DENSITIES
        for dropout_p in DROPOUTS
        for backward in (False, True)
    ]


def measure_all(cases: list[Case], seconds: float, console: Console) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    told: set[tuple[str, str]] = set()
    for case in cases:
        if not rows or case.name != rows[-1]["shape"]:
            copy_bytes_per_ms = roofline.copy_bytes_per_ms(CPU)
        if not case.backward:
            check_numerics(case, "cpp")
        timings, refusals = measure(case, seconds)
        for way, reason in sorted(refusals.items() - told):
            console.print(f"{way} left out: {reason}")
        told |= refusals.items()
        rows.append(row_of(case, timings, copy_bytes_per_ms))
        console.print(one_line(rows[-1]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ATTENTION_SHAPES["cpu"]
    parser.add_argument("--only", action="append", metavar="SHAPE", help="shapes to run")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--seconds", type=float, default=0.8, help="measuring time per row")
    parser.add_argument("--output", type=Path, default=RESULTS / "attention-cpu.csv")
    arguments = parser.parse_args()
    names = arguments.only or list(known)
    if not set(names) <= set(known):
        parser.error(f"--only: expected some of {list(known)}, got {names}")
    console = Console(width=WIDTH)
    cases = cases_of(names, arguments.dtype or list(DTYPES))
    rows = measure_all(cases, arguments.seconds, console)
    columns = machine_columns(CPU)
    merge_csv(arguments.output, [{**row, **columns} for row in rows], KEY)
    print_report(rows, console)
    console.print(f"{columns}\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
