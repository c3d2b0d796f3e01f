"""What is known about the GPU kernels without a GPU: machine code, and bytes against concatenation.

    python -m bench.gpu_static
    python -m bench.gpu_static --targets sm_80 --dtypes bf16 --head-dims 64 128
    python -m bench.gpu_static --record

Every shipped configuration is compiled for every target; nothing here is a time. The whole matrix
and the bytes go to bench/results/gpu-static.csv and gpu-bytes.csv. `--record` makes the
instructions per MMA it finds the bound that the tests hold later kernels to.
"""

import argparse
from collections.abc import Iterable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.measure import RESULTS, machine_columns, write_csv
from tests.build_rules import (
    BITS,
    BOUNDED_TARGETS,
    BOUNDS,
    METRICS,
    faults,
    key_of,
    over_bounds,
    read_bounds,
    updated_bounds,
)
from tests.json_lines import json_lines

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
HEAD_DIMS = (32, 64, 80, 128, 256)
KERNELS = 6  # of a forward and a backward pass
LAYOUTS = ("short_prefix", "rows", "packed", "biased", "positions")
KINDS = ("requested", "compulsory")


def builds(options: argparse.Namespace) -> list[dict]:
    """bf16 at every head_dim, fp16 and fp32 at 64; any pair when dtypes are named."""
    head_dims = [str(head_dim) for head_dim in options.head_dims]
    targets = ["--targets", *options.targets]
    dropout = ["--dropout", "0.0", "0.1"]
    bounded = [target for target in options.targets if target in BOUNDED_TARGETS]
    runs = []
    if options.dtypes:
        runs.append([*targets, *dropout, "--dtypes", *options.dtypes, "--head-dims", *head_dims])
        expected = len(options.dtypes) * len(head_dims) * len(options.targets) * 2
    else:
        runs.append([*targets, *dropout, "--head-dims", *head_dims])
        runs.append([*targets, *dropout, "--dtypes", "fp16", "fp32"])
        expected = (len(head_dims) + 2) * len(options.targets) * 2
        if bounded:
            runs.append(["--targets", *bounded, "--layouts", *LAYOUTS])
            expected += len(LAYOUTS) * len(bounded)
    lines = (line for run in runs for line in json_lines("tests.triton_builds", *run))
    rows = list(track(lines, "compiling", total=expected * KERNELS, transient=True))
    return sorted(rows, key=lambda row: (TARGETS.index(row["target"]), *order_of(row)))


def order_of(row: dict) -> tuple:
    return (row["dtype"], row["layout"], row["head_dim"], row["dropout"])


def build_table(target: str, rows: Iterable[dict]) -> Table:
    table = Table(title=f"{target}: machine code")
    columns = (
        "dtype", "D", "layout", "dropout", "kernel", "tile", "warps/stages", "registers",
        "spilled B", "shared B", "blocks", "limit", "loop", "MMA", "instr/MMA", "masked",
        "16 B loads", "local",
    )  # fmt: skip
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in (0, 2, 4, 11) else "right")
    for row in rows:
        per_mma = (row[metric] and f"{row[metric]:.2f}" for metric in METRICS)
        cells = (
            row["dtype"], row["head_dim"], row["layout"], row["dropout"],
            row["kernel"].removeprefix("prefix_attention_"),
            f"{row['block_queries'] or '-'}x{row['block_keys'] or '-'}",
            f"{row['num_warps']}/{row['num_stages']}", row["registers"], row["spill_bytes"],
            row["shared_bytes"], row["blocks_per_processor"], row["limited_by"],
            row["loop_instructions"], row["loop_matrix_instructions"],
            *per_mma, row["wide_loads"], row["loops_local_accesses"],
        )  # fmt: skip
        table.add_row(*("-" if cell is None else str(cell) for cell in cells))
    return table


def byte_table(rows: list[dict]) -> Table:
    first = rows[0]
    title = f"MB moved, batch {first['batch']}, {first['heads']} heads of {first['head_dim']}, bf16"
    table = Table(title=f"{title}: fused, concat / fused")
    for column in ("T", "P", "checked by"):
        table.add_column(column, justify="right")
    kinds = [f"{name}_{kind}" for name in ("forward", "backward") for kind in KINDS]
    for kind in kinds:
        table.add_column(kind.replace("_", " "), justify="right")
    for row in rows:
        pairs = (f"{row[k + '_fused'] / 1e6:.1f}  {row[k + '_ratio']:.2f}x" for k in kinds)
        table.add_row(str(row["tokens"]), str(row["prefix"]), row["checked"], *pairs)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    console = Console(width=200)

    rows = builds(options)
    for target in options.targets:
        console.print(build_table(target, (row for row in rows if row["target"] == target)))
    bounds = read_bounds()
    messages = [(key_of(row), fault) for row in rows for fault in faults(row)]
    messages += [(key_of(row), over) for row in rows for over in over_bounds(row, bounds)]
    for key, message in messages:
        console.print(f"[red]{' '.join(key)}: {message}[/red]")
    console.print(f"{len(rows)} kernels compiled, {len(messages)} faults")
    bytes_moved = list(json_lines("bench.gpu_bytes", interpret=True))
    console.print(byte_table(bytes_moved))

    columns = machine_columns(torch.device("cpu"))
    origin = {name: columns[name] for name in ("commit", "date")}
    write_csv(RESULTS / "gpu-bytes.csv", [row | origin for row in bytes_moved])
    if (options.targets, options.dtypes, options.head_dims) == (list(TARGETS), None, [*HEAD_DIMS]):
        kept = [{name: row[name] for name in row if name not in BITS} for row in rows]
        write_csv(RESULTS / "gpu-static.csv", [row | origin for row in kept])
    else:
        console.print("a part of the matrix: gpu-static.csv stays as it was")
    if options.record:
        write_csv(BOUNDS, updated_bounds(rows))


if __name__ == "__main__":
    main()
