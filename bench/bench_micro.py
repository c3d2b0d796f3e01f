"""How fast are the C++ building blocks against torch's: exp, dropout, packing, GELU, LayerNorm?

    python -m bench.bench_micro
    python -m bench.bench_micro --only dropout --seconds 0.1

Each block is checked first: exp against float64, dropout to the bit against its definition. The
elementwise operators are checked by tests/test_elementwise.py; beside them stands what an encoder
runs in eager mode, and autograd's backward pass. Times are wall clock with torch's number of
threads, in ns per element; both sides allocate their results.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.measure import RESULTS, machine_columns, time_interleaved, write_csv
from bench.shapes import ATTENTION_SHAPES
from ptv2_fast.ops.dropout import ATTENTION_OUTPUT_STREAM, TOKEN_STREAM, dropout_multiplier
from tests.inputs import Shape

SHAPES = ("base-b1-t128-p20", "base-b8-t128-p20", "large-b1-t512-p128")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DROPOUT_P = 0.1
SEED = torch.tensor([1234567890123])

Calls = dict[str, Callable[[], object]]


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


def gelu_calls(shape: Shape, dtype: torch.dtype) -> tuple[int, Calls]:
    """Of the inner layer of the feed-forward network, four times as wide as the hidden states."""
    width = 4 * shape.heads * shape.head_dim
    values, bias = torch.randn(shape.batch * shape.tokens, width).to(dtype), torch.randn(width)
    narrow = bias.to(dtype)
    calls = {
        "ours": lambda: torch.ops.ptv2.bias_activation(values, bias, "gelu"),
        "torch": lambda: F.gelu(values + narrow),
    }
    return values.numel(), calls


def gelu_backward_calls(shape: Shape, dtype: torch.dtype) -> tuple[int, Calls]:
    width = 4 * shape.heads * shape.head_dim
    values, grad = torch.randn(2, shape.batch * shape.tokens, width).to(dtype)
    leaf = values.clone().requires_grad_()
    out = F.gelu(leaf)
    calls = {
        "ours": lambda: torch.ops.ptv2.bias_activation_backward(grad, values, None, "gelu"),
        "torch": lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True)[0],
    }
    return values.numel(), calls


def gated_calls(part: str, shape: Shape, dtype: torch.dtype) -> tuple[int, Calls]:
    """`part`: "forward" or "backward" of silu(a) * b, as wide as that of GELU."""
    rows, width = shape.batch * shape.tokens, 4 * shape.heads * shape.head_dim
    joint, grad = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
    leaf = joint.clone().requires_grad_()

    def eager(values: Tensor) -> Tensor:
        first, second = values.chunk(2, dim=1)
        return F.silu(first) * second

    out = eager(leaf)
    calls = {
        "forward": {
            "ours": lambda: torch.ops.ptv2.gated_activation(joint, None, "silu", True),
            "torch": lambda: eager(joint),
        },
        "backward": {
            "ours": lambda: torch.ops.ptv2.gated_activation_backward(
                grad, joint, None, "silu", True
            ),
            "torch": lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True)[0],
        },
    }
    return grad.numel(), calls[part]


def rotation_calls(shape: Shape, dtype: torch.dtype) -> tuple[int, Calls]:
    """Of queries and keys within the packed rows of queries, keys and values."""
    rows, heads, pairs = shape.batch * shape.tokens, 2 * shape.heads, shape.head_dim // 2
    packed = torch.randn(rows, 3 * shape.heads * shape.head_dim).to(dtype)
    angle = torch.rand(rows, pairs)
    cosine, sine = angle.cos(), angle.sin()
    rotated = packed[:, : heads * shape.head_dim].unflatten(1, (heads, shape.head_dim))
    wide_cosine, wide_sine = (part.repeat(1, 2)[:, None].to(dtype) for part in (cosine, sine))

    def eager() -> Tensor:
        first, second = rotated.chunk(2, dim=-1)
        return rotated * wide_cosine + torch.cat((-second, first), dim=-1) * wide_sine

    calls = {
        "ours": lambda: torch.ops.ptv2.rotate_(
            packed, cosine, sine, heads, shape.head_dim, False, False
        ),
        "torch": eager,
    }
    return rotated.numel(), calls


def norm_calls(part: str, shape: Shape, dtype: torch.dtype) -> tuple[int, Calls]:
    """`part`: "forward", "backward", "again" or "rms" of dropout + add + norm of hidden states."""
    rows, width = shape.batch * shape.tokens, shape.heads * shape.head_dim
    values, residual, grad = torch.randn(3, rows, width).to(dtype)
    weight, beta = torch.randn(2, width)
    narrow = weight.to(dtype), beta.to(dtype)
    index = torch.arange(rows)
    coordinates = torch.stack((index // shape.tokens, index % shape.tokens), dim=1).int()
    dropout = SEED, coordinates, DROPOUT_P, ATTENTION_OUTPUT_STREAM
    leaves = values.clone().requires_grad_(), residual.clone().requires_grad_()

    def ours(beta: Tensor | None = beta, mean: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.ptv2.dropout_add_norm(
            values, None, residual, weight, beta, 1e-5, mean, *dropout
        )

    def eager(input: Tensor, other: Tensor) -> Tensor:
        return F.layer_norm(other + F.dropout(input, DROPOUT_P), (width,), *narrow)

    def eager_rms() -> Tensor:
        return F.rms_norm(residual + F.dropout(values, DROPOUT_P), (width,), narrow[0], 1e-5)

    _, total, statistics = ours()
    out = eager(*leaves)
    calls = {
        "forward": {"ours": ours, "torch": lambda: eager(values, residual)},
        "backward": {
            "ours": lambda: torch.ops.ptv2.dropout_add_norm_backward(
                grad, None, None, total, statistics, weight, True, *dropout, dtype
            ),
            "torch": lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True),
        },
        "again": {
            "ours": lambda: torch.ops.ptv2.norm_from_stats(total, statistics, weight, beta),
            "torch": lambda: F.layer_norm(total, (width,), *narrow),
        },
        "rms": {"ours": lambda: ours(None, False), "torch": eager_rms},
    }
    return values.numel(), calls[part]


BLOCKS = {
    "exp": (exp_calls, ("fp32",)),
    "dropout": (dropout_calls, ("fp32", "bf16")),
    "packing": (packing_calls, ("fp32", "bf16")),
    "gelu": (gelu_calls, ("fp32", "bf16")),
    "gelu backward": (gelu_backward_calls, ("fp32", "bf16")),
    "gated": (partial(gated_calls, "forward"), ("fp32", "bf16")),
    "gated backward": (partial(gated_calls, "backward"), ("fp32", "bf16")),
    "rotation": (rotation_calls, ("fp32", "bf16")),
    "dropout+add+norm": (partial(norm_calls, "forward"), ("fp32", "bf16")),
    "dropout+add+norm backward": (partial(norm_calls, "backward"), ("fp32", "bf16")),
    "dropout+add+rms norm": (partial(norm_calls, "rms"), ("fp32", "bf16")),
    "norm again": (partial(norm_calls, "again"), ("fp32", "bf16")),
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
        if block in CHECKS:
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
