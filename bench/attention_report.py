"""Tables of what bench_attention measured, again from a CSV file of it too:

python -m bench.attention_report bench/results/attention-cpu.csv
"""

import csv
import sys
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from bench.shapes import ATTENTION_SHAPES

Row = dict[str, object]
SPEED_UP = "speed-up over "
WIDTH = 200  # characters


def case_of(row: Row) -> str:
    return " ".join(str(row[name]) for name in ("shape", "dtype", "density", "dropout", "pass"))


def one_line(row: Row) -> str:
    """Of a row that was just measured."""
    best = f"{row[SPEED_UP + 'best']} x {row['best torch path']}"
    return f"{case_of(row)}: {best}, {float(row['share of GEMM']):.0%} of GEMM"


def is_summarized(row: Row) -> bool:
    """Forward + backward, 128 to 512 tokens, prefixes of 20 to 128, no window and no bias."""
    shapes = {name: shape for known in ATTENTION_SHAPES.values() for name, shape in known.items()}
    shape = shapes[row["shape"]]
    return (
        row["pass"] == "forward+backward"
        and shape.is_plain
        and 128 <= shape.tokens <= 512
        and 20 <= shape.prefix <= 128
    )


def _numbers(rows: list[Row], column: str) -> list[float]:
    return [float(row[column]) for row in rows if row[column] != ""]


def _short(column: str) -> str:
    for prefix in (SPEED_UP, "concat+", "ptv2-fast "):
        column = column.removeprefix(prefix)
    return column.replace("LOP/s", "/s")


def _median(rows: list[Row], column: str) -> str:
    found = _numbers(rows, column)
    return f"{median(found):.2f}" if found else ""


def row_table(rows: list[Row]) -> Table:
    """Every row: our time, the speed-ups and the rates."""
    speed_ups = [name for name in rows[0] if name.startswith(SPEED_UP)]
    rates = [name for name in rows[0] if name.endswith(("OP/s", "of GEMM"))]
    shown = ["ptv2-fast median ms", *speed_ups, "best torch path", *rates, "GB/s"]
    table = Table("shape, dtype, density, dropout, pass", *map(_short, shown))
    table.title = "our time; speed-up over each way, sdpa to efficient with concatenation; rates"
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(case_of(row), *(str(row[name]).removeprefix("concat+") for name in shown))
    return table


def summary_table(rows: list[Row]) -> Table:
    """Medians by dtype and dropout over the rows that the speed goals are about."""
    others = [column for column in rows[0] if column.startswith(SPEED_UP)]
    table = Table(
        "dtype", "dropout", "rows", "least over best", *map(_short, others), "share of GEMM",
        title="median speed-up over, forward + backward, T 128 to 512, P 20 to 128",
    )  # fmt: skip
    chosen = [row for row in rows if is_summarized(row)]
    for dtype, dropout in dict.fromkeys((row["dtype"], row["dropout"]) for row in chosen):
        group = [row for row in chosen if (row["dtype"], row["dropout"]) == (dtype, dropout)]
        least = min(_numbers(group, SPEED_UP + "best"))
        medians = (_median(group, column) for column in (*others, "share of GEMM"))
        table.add_row(dtype, str(dropout), str(len(group)), f"{least:.2f}", *medians)
    return table


def slower_rows(rows: list[Row]) -> list[str]:
    """The rows where the best torch path is faster."""
    return [one_line(row) for row in rows if float(row[SPEED_UP + "best"]) < 1.0]


def print_report(rows: list[Row], console: Console) -> None:
    console.print(row_table(rows))
    console.print(summary_table(rows))
    slower = slower_rows(rows)
    console.print("slower than torch:", "none" if not slower else "")
    for line in slower:
        console.print(f"  {line}")


def main() -> None:
    with Path(sys.argv[1]).open(newline="") as file:
        print_report(list(csv.DictReader(file)), Console(width=WIDTH))


if __name__ == "__main__":
    main()
