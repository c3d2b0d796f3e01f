"""How fast is prefix attention against concatenation, and against the two-call split?

    python -m bench.bench_attention --device cpu
    python -m bench.bench_attention --device cpu --only base-b8-t128-p20 --dtype fp32

The numerics rule of the tests is checked on every shape first; no figure is printed where it fails.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.measure import RESULTS, machine_columns, time_interleaved, write_csv
from bench.shapes import ATTENTION_SHAPES
from ptv2_fast import prefix_attention
from tests.inputs import Inputs, Shape, make_inputs
from tests.test_prefix_attention import check

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS = "ptv2-fast"


def padding_mask(shape: Shape) -> Tensor:
    """Right padding with lengths from a quarter of the tokens up to all of them, [B, S]."""
    lengths = torch.linspace(shape.tokens, shape.tokens // 4, shape.batch).long()
    return torch.arange(shape.tokens) < lengths[:, None]


def useful_flops(shape: Shape, key_mask: Tensor, backward: bool) -> float:
    """Of visible columns: two matrix products forward, four more backward.

    What the backward recomputes is not counted, nor are masked columns.
    """
    columns = int(key_mask.sum()) + shape.batch * shape.prefix
    one_product = 2 * shape.heads * shape.queries * shape.head_dim * columns
    return one_product * (6 if backward else 2)


def compulsory_bytes(shape: Shape, itemsize: int, backward: bool) -> float:
    """Every input read once and every output written once; the prefix once for the whole batch."""
    rows = shape.batch * shape.heads * shape.head_dim * itemsize
    prefix = 2 * shape.heads * shape.prefix * shape.head_dim * itemsize
    forward = rows * (2 * shape.queries + 2 * shape.tokens) + prefix
    return forward + (rows * (4 * shape.queries + 4 * shape.tokens) + 2 * prefix) * backward


def providers(inputs: Inputs, dropout_p: float) -> dict[str, Callable[..., Tensor]]:
    batch = inputs.query.shape[0]
    scale = inputs.query.shape[-1] ** -0.5
    prefix_length = inputs.prefix_key.shape[1]
    visible = torch.cat((inputs.key_mask.new_ones(batch, prefix_length), inputs.key_mask), dim=1)
    visible = visible[:, None, None]
    additive = torch.zeros_like(visible, dtype=inputs.query.dtype)
    additive = additive.masked_fill(~visible, torch.finfo(additive.dtype).min)

    def concatenate(prefix: Tensor, tokens: Tensor) -> Tensor:
        return torch.cat((prefix.expand(batch, *prefix.shape), tokens), dim=2)

    def ours(*tensors: Tensor) -> Tensor:
        return prefix_attention(*tensors, key_mask=inputs.key_mask, dropout_p=dropout_p)

    def concat_sdpa(query, key, value, prefix_key, prefix_value):
        keys, values = concatenate(prefix_key, key), concatenate(prefix_value, value)
        return F.scaled_dot_product_attention(query, keys, values, visible, dropout_p)

    def concat_eager(query, key, value, prefix_key, prefix_value):
        keys, values = concatenate(prefix_key, key), concatenate(prefix_value, value)
        scores = torch.matmul(query, keys.transpose(2, 3)) * scale + additive
        probabilities = F.dropout(scores.softmax(dim=-1), dropout_p)
        return torch.matmul(probabilities, values).transpose(1, 2).contiguous().transpose(1, 2)

    def split(*tensors: Tensor) -> Tensor:
        return prefix_attention(*tensors, key_mask=inputs.key_mask, backend="split")

    found = {OURS: ours, "concat+sdpa": concat_sdpa, "concat+eager": concat_eager}
    return found if dropout_p else {**found, "split": split}


def timed_calls(inputs: Inputs, dropout_p: float, backward: bool) -> dict[str, Callable]:
    leaves = [tensor.requires_grad_(backward) for tensor in inputs.tensors]

    def call(function: Callable[..., Tensor]) -> Callable[[], object]:
        if not backward:
            return lambda: function(*leaves)
        return lambda: torch.autograd.grad(function(*leaves), leaves, inputs.grad_out)

    return {name: call(function) for name, function in providers(inputs, dropout_p).items()}


def measure_row(name, dtype_name, dropout_p, backward, device, seconds) -> dict[str, object]:
    shape, dtype = ATTENTION_SHAPES[name], DTYPES[dtype_name]
    key_mask = padding_mask(shape).to(device)
    inputs = replace(make_inputs(shape, dtype, device=str(device)), key_mask=key_mask)
    timings = time_interleaved(timed_calls(inputs, dropout_p, backward), device, seconds)
    row: dict[str, object] = {
        "shape": name,
        "dtype": dtype_name,
        "dropout": dropout_p,
        "pass": "forward+backward" if backward else "forward",
        "visible tokens": round(float(key_mask.float().mean()), 2),
    }
    for provider in (OURS, "concat+sdpa", "concat+eager", "split"):
        timing = timings.get(provider)
        for column in ("median", "p20", "p80"):
            value = "" if timing is None else round(getattr(timing, column), 3)
            row[f"{provider} {column} ms"] = value
    ours = timings.pop(OURS).median
    for provider in ("concat+sdpa", "concat+eager", "split"):
        known = provider in timings
        row[f"speed-up over {provider}"] = (
            round(timings[provider].median / ours, 2) if known else ""
        )
    row["GFLOP/s"] = round(useful_flops(shape, key_mask, backward) / ours / 1e6, 1)
    row["GB/s"] = round(compulsory_bytes(shape, dtype.itemsize, backward) / ours / 1e6, 2)
    return row


def print_table(rows: list[dict[str, object]], console: Console) -> None:
    speed_ups = [column for column in rows[0] if column.startswith("speed-up")]
    columns = [
        "shape",
        "dtype",
        "dropout",
        "pass",
        f"{OURS} median ms",
        *speed_ups,
        "GFLOP/s",
        "GB/s",
    ]
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", choices=ATTENTION_SHAPES, action="append", help="shapes to run")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--seconds", type=float, default=1.5, help="measuring time per row")
    parser.add_argument("--output", type=Path, help="CSV file (default: bench/results/...)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    console = Console(width=200)
    rows = []
    for name in arguments.only or ATTENTION_SHAPES:
        small = replace(ATTENTION_SHAPES[name], batch=2, heads=2)
        for dtype_name in arguments.dtype or DTYPES:
            for dropout_p in (0.0, 0.1):
                check(["cpp" if device.type == "cpu" else "triton"], small, DTYPES[dtype_name],
                      "right padding", dropout_p, 0.0)  # fmt: skip
                for backward in (False, True):
                    rows.append(
                        measure_row(
                            name, dtype_name, dropout_p, backward, device, arguments.seconds
                        )
                    )
                    console.print(
                        *(f"{rows[-1][key]}" for key in list(rows[-1])[:5]),
                        *(rows[-1][f"speed-up over {other}"]
                          for other in ("concat+sdpa", "concat+eager", "split")),
                    )  # fmt: skip
    print_table(rows, console)
    columns = machine_columns(device)
    output = arguments.output or RESULTS / f"attention-{device.type}.csv"
    write_csv(output, [{**row, **columns} for row in rows])
    console.print(f"{columns}\nwritten to {output}")


if __name__ == "__main__":
    main()
