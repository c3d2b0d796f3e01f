"""How fast are the building blocks of the C++ kernels against torch's: exp, dropout, packing?

    python -m bench.bench_micro
    python -m bench.bench_micro --only dropout --seconds 0.1

Each block is checked first: exp against float64, dropout to the bit against its definition. Times
are wall clock with torch's number of threads, in ns per element; both sides allocate their results.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.measure import RESULTS, machine_columns, time_interleaved, write_csv
from bench.shapes import ATTENTION_SHAPES
from ptv2_fast.ops.dropout import TOKEN_STREAM, dropout_multiplier
from tests.inputs import Shape

SHAPES = ("base-b1-t128-p20", "base-b8-t128-p20", "large-b1-t512-p128")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DROPOUT_P = 0.1
SEED = torch.tensor([1234567890123])

Calls = dict[str, Callable[[], Tensor]]


def check_exp() -> None:
    """Relative error of at most 1e-7 on [-87, 0]."""
    grid = torch.linspace(-87, 0, 1_000_001)
    exact = grid.double().exp()
    error = (torch.ops.ptv2.micro_exp(grid) - exact).abs() / exact
    excess = error - 1e-7
    worst = excess.argmax()
    assert excess[worst] <= 0, f"exp({grid[worst]}): relative error {error[worst]:.2e}"


def check_dropout() -> None:
    """Equal to the bit to the multiplier that defines it; no multiple of 8 columns."""
    shape = (2, 3, 5, 149)
    multiplier = dropout_multiplier(shape, DROPOUT_P, SEED, TOKEN_STREAM, torch.float32)
    for dtype in DTYPES.values():
        values = torch.randn(shape).to(dtype)
        actual = torch.ops.ptv2.micro_dropout(values, SEED, DROPOUT_P, TOKEN_STREAM)
        expected = (values.float() * multiplier).to(dtype)
        assert torch.equal(actual, expected), "dropout differs from dropout_multiplier"


def check_packing() -> None:
    """Panels hold every element of every key, whatever their order and padding."""
    for dtype in DTYPES.values():
        key = torch.randn(2, 3, 37, 40).to(dtype)
        packed = torch.ops.ptv2.micro_pack(key).flatten().view(dtype)
        assert torch.isin(key.float(), packed.float()).all(), "packing loses elements"


CHECKS = {"exp": check_exp, "dropout": check_dropout, "packing": check_packing}


def score_values(shape: Shape, dtype: torch.dtype) -> Tensor:
    """As large as the scores of a whole call, [B, H, T, P + S], from -87 to 0."""
    columns = shape.prefix + shape.tokens
    values = torch.rand(shape.batch, shape.heads, shape.queries, columns) * -87
    return values.to(dtype)


def exp_calls(shape: Shape, dtype: torch.dtype) -> tuple[int, Calls]:
    values = score_values(shape, dtype)
    calls = {"ours": lambda: torch.ops.ptv2.micro_exp(values), "torch": lambda: torch.exp(values)}
    return values.numel(), calls


def dropout_calls(shape: Shape, dtype: torch.dtype) -> tuple[int, Calls]:
    values = score_values(shape, dtype)
    calls = {
        "ours": lambda: torch.ops.ptv2.micro_dropout(values, SEED, DROPOUT_P, TOKEN_STREAM),
        "torch": lambda: F.dropout(values, DROPOUT_P),
    }
    return values.numel(), calls


def packing_calls(shape: Shape, dtype: torch.dtype) -> tuple[int, Calls]:
    """Of keys with the strides of an encoder; torch copies their transpose, [B, H, D, S]."""
    key = torch.randn(shape.batch, shape.tokens, shape.heads, shape.head_dim).to(dtype)
    key = key.transpose(1, 2)
    calls = {
        "ours": lambda: torch.ops.ptv2.micro_pack(key),
        "torch": lambda: key.transpose(2, 3).contiguous(),
    }
    return key.numel(), calls


BLOCKS = {
    "exp": (exp_calls, ("fp32",)),
    "dropout": (dropout_calls, ("fp32", "bf16")),
    "packing": (packing_calls, ("fp32", "bf16")),
}


def measure_row(block: str, shape_name: str, dtype_name: str, seconds: float) -> dict[str, object]:
    elements, calls = BLOCKS[block][0](ATTENTION_SHAPES["cpu"][shape_name], DTYPES[dtype_name])
    timings = time_interleaved(calls, torch.device("cpu"), seconds)
    row: dict[str, object] = {
        "block": block,
        "shape": shape_name,
        "dtype": dtype_name,
        "elements": elements,
    }
    for name, timing in timings.items():
        for column in ("median", "p20", "p80"):
            row[f"{name} {column} ns"] = round(getattr(timing, column) * 1e6 / elements, 4)
    row["torch / ours"] = round(timings["torch"].median / timings["ours"].median, 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=BLOCKS, action="append")
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time per row")
    parser.add_argument("--output", type=Path, default=RESULTS / "micro-cpu.csv")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for block in arguments.only or BLOCKS:
        CHECKS[block]()
        for dtype_name in BLOCKS[block][1]:
            for shape_name in SHAPES:
                rows.append(measure_row(block, shape_name, dtype_name, arguments.seconds))
    table = Table(*rows[0], title="ns per element, all threads")
    for row in rows:
        table.add_row(*map(str, row.values()))
    columns = machine_columns(torch.device("cpu"))
    write_csv(arguments.output, [{**row, **columns} for row in rows])
    console = Console(width=180)
    console.print(table)
    console.print(f"{columns}\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
