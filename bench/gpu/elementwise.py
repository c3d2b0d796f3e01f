"""How fast are GELU and dropout + add + LayerNorm on a GPU, against torch, eager and compiled?

A unit is one of the five operators and a dtype ("mixed": bf16 products, fp32 residual stream). Each
is held to the rules of tests/elementwise_checks.py first. What torch runs is what an encoder runs:
the bias has been added by the matrix product before, masks and statistics were saved. Columns:

    ... call ms         one call with its launches, begun with a cold L2 cache; median, p20, p80
    ... graph ms        one call of a CUDA graph's replay of several, each with tensors of its own,
                        more of them than the L2 cache holds
    GB/s, of copy       of ours by the byte counts of gelu.py and layer_norm.py, each byte moved
                        once, by the clock that `clock` names; as a share of what a copy of 1 GiB
                        reads and writes
    speed-up over ...   by that clock too
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.graphs import captured
from bench.gpu.stages import Options, Row, reason_of, release
from bench.measure import Timing, time_interleaved
from bench.roofline import copy_bytes_per_ms
from ptv2_kernels import elementwise as launchers
from tests.elementwise_checks import (
    DTYPES,
    EPSILON,
    Case,
    check_gelu,
    check_layer_norm_backward,
    check_layer_norm_forward,
    make_case,
)

ROWS = {"cuda": (4096, 16384), "cpu": (8,)}
GELU_COLUMNS = {"cuda": (3072, 4096), "cpu": (96,)}
NORM_COLUMNS = {"cuda": (768, 1024), "cpu": (40,)}
CHECKED_ROWS = 37
DROPOUT_P = 0.1
COLD_BYTES = {"cuda": 2**28, "cpu": 1}  # what the tensors of a graph's calls have together
MOST_CALLS = 32  # of a graph
aten = torch.ops.aten


def _gelu(biased: Tensor) -> Tensor:
    return F.gelu(biased)


def _gelu_backward(grad_out: Tensor, biased: Tensor) -> Tensor:
    return aten.gelu_backward(grad_out, biased)


def _norm(
    dropout_p: float, input: Tensor, residual: Tensor, weight: Tensor, beta: Tensor
) -> Tensor:
    total = residual + F.dropout(input, dropout_p)
    return F.layer_norm(total, total.shape[1:], weight, beta, EPSILON)


def _norm_backward(
    dropout_p: float, grad_out: Tensor, grad_other: Tensor, total: Tensor, mean: Tensor,
    deviation: Tensor, weight: Tensor, beta: Tensor, mask: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_residual, _, _ = aten.native_layer_norm_backward(
        grad_out + grad_other, total, total.shape[1:], mean, deviation, weight, beta,
        [True, False, False],
    )  # fmt: skip
    grad_input = grad_residual.to(grad_other.dtype)
    if dropout_p > 0.0:
        grad_input = aten.native_dropout_backward(grad_input, mask, 1 / (1 - dropout_p))
    return grad_residual, grad_input


def _norm_again(total: Tensor, weight: Tensor, beta: Tensor) -> Tensor:
    return F.layer_norm(total, total.shape[1:], weight, beta, EPSILON)


def _gelu_arguments(case: Case) -> tuple[tuple, tuple]:
    return (case.input, case.bias), (case.input,)


def _gelu_backward_arguments(case: Case) -> tuple[tuple, tuple]:
    return (case.grad_other, case.input, case.bias), (case.grad_other, case.input)


def _affine(case: Case) -> tuple[Tensor, Tensor]:
    """In the residual stream's dtype, as an encoder holds them."""
    return case.weight.to(case.residual.dtype), case.beta.to(case.residual.dtype)


def _norm_arguments(case: Case) -> tuple[tuple, tuple]:
    return case.forward, (case.input, case.residual, *_affine(case))


def _norm_backward_arguments(case: Case) -> tuple[tuple, tuple]:
    weight, beta = _affine(case)
    _, mean, deviation = aten.native_layer_norm(
        case.total, case.total.shape[1:], weight, beta, EPSILON
    )
    mask = torch.rand(case.input.shape, device=case.input.device) >= case.dropout_p
    saved = case.total, mean, deviation, weight, beta, mask
    return case.backward, (case.grad_out, case.grad_other, *saved)


def _again_arguments(case: Case) -> tuple[tuple, tuple]:
    return case.again, (case.total, *_affine(case))


def _gelu_bytes(tensors: int, case: Case) -> int:
    rows, columns = case.input.shape
    return tensors * rows * columns * case.input.element_size() + 4 * columns


def _norm_bytes(inputs: int, residuals: int, vectors: int, case: Case) -> int:
    """`inputs`, `residuals`, `vectors`: tensors of input's and residual's dtype, of length C."""
    rows, columns = case.input.shape
    per_row = columns * (
        inputs * case.input.element_size() + residuals * case.residual.element_size()
    )
    return rows * (per_row + 8 + 8 * (case.dropout_p > 0.0)) + 4 * columns * vectors


def _norm_backward_bytes(case: Case) -> int:
    is_same = case.dropout_p == 0.0 and case.input.dtype == case.residual.dtype
    return _norm_bytes(1 if is_same else 2, 3, 1, case)


@dataclass(frozen=True)
class Operator:
    """One of the five.

    Args:
        plain: the same in torch, of whose arguments dropout_p comes first if `drops`.
        arguments: those of the operator and of `plain`.
        byte_count: that the kernel moves.
        check: raises AssertionError unless its results are right.
        columns: by device.
        drops: it knows dropout.
    """

    plain: Callable
    arguments: Callable[[Case], tuple[tuple, tuple]]
    byte_count: Callable[[Case], int]
    check: Callable[[str, Case], None]
    columns: dict[str, tuple[int, ...]]
    drops: bool = False

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Those that differ for it: a GELU knows no residual stream."""
        return tuple(DTYPES) if self.columns is NORM_COLUMNS else ("fp32", "bf16")


OPERATORS = {
    "bias_gelu": Operator(
        _gelu, _gelu_arguments, functools.partial(_gelu_bytes, 2), check_gelu, GELU_COLUMNS
    ),
    "bias_gelu_backward": Operator(
        _gelu_backward, _gelu_backward_arguments, functools.partial(_gelu_bytes, 3), check_gelu,
        GELU_COLUMNS,
    ),
    "dropout_add_layer_norm": Operator(
        _norm, _norm_arguments, functools.partial(_norm_bytes, 1, 3, 3), check_layer_norm_forward,
        NORM_COLUMNS, drops=True,
    ),
    "dropout_add_layer_norm_backward": Operator(
        _norm_backward, _norm_backward_arguments, _norm_backward_bytes, check_layer_norm_backward,
        NORM_COLUMNS, drops=True,
    ),
    "layer_norm_again": Operator(
        _norm_again, _again_arguments, functools.partial(_norm_bytes, 0, 2, 2),
        check_layer_norm_forward, NORM_COLUMNS,
    ),
}  # fmt: skip


def _units(device: torch.device) -> dict[str, tuple[str, str]]:
    if device.type == "cpu":
        chosen = [("bias_gelu_backward", "bf16"), ("dropout_add_layer_norm_backward", "mixed")]
    else:
        chosen = [
            (name, dtypes)
            for dtypes in ("bf16", "mixed", "fp32")
            for name, operator in OPERATORS.items()
            if dtypes in operator.dtypes
        ]
    return {f"{name} {dtypes}": (name, dtypes) for name, dtypes in chosen}


def units(device: torch.device) -> list[str]:
    return list(_units(device))


def run(name: str, device: torch.device, options: Options) -> Iterator[Row]:
    operator_name, dtypes = _units(device)[name]
    operator = OPERATORS[operator_name]
    dropouts = (DROPOUT_P, 0.0) if operator.drops else (0.0,)
    for columns in operator.columns[device.type]:
        for dropout_p in dropouts:
            shape = (CHECKED_ROWS, columns)
            case = make_case(shape, dtypes, dropout_p=dropout_p, device=device)
            operator.check("triton", case)
    copy_rate = copy_bytes_per_ms(device)
    for rows in ROWS[device.type]:
        for columns in operator.columns[device.type]:
            for dropout_p in dropouts:
                yield {
                    "operator": operator_name, "rows": rows, "columns": columns, "dtype": dtypes,
                    "dropout": dropout_p,
                    **_measured(operator_name, (rows, columns), dtypes, dropout_p, device, options,
                                copy_rate),
                }  # fmt: skip
                release()


def _random_case(
    shape: tuple[int, int], dtypes: str, dropout_p: float, device: torch.device
) -> Case:
    """Made on the device, since those of tests/ take seconds at these sizes."""
    (rows, columns), (input_dtype, dtype) = shape, DTYPES[dtypes]

    def values(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    total = values(rows, columns, dtype=dtype)
    variance, mean = torch.var_mean(total.float(), dim=1, correction=0)
    row = torch.arange(rows, dtype=torch.int32, device=device)
    return Case(
        input=values(rows, columns, dtype=input_dtype),
        bias=values(columns),
        residual=values(rows, columns, dtype=dtype),
        weight=values(columns),
        beta=values(columns),
        seed=torch.tensor([1234567890123], device=device),
        coordinates=torch.stack((row // 128, row % 128), dim=1),
        grad_out=values(rows, columns, dtype=dtype),
        grad_other=values(rows, columns, dtype=input_dtype),
        dropout_p=dropout_p,
        total=total,
        statistics=torch.stack((mean, torch.rsqrt(variance + EPSILON)), dim=1),
    )


def _measured(
    name: str, shape: tuple[int, int], dtypes: str, dropout_p: float, device: torch.device,
    options: Options, copy_rate: float,
) -> Row:  # fmt: skip
    operator = OPERATORS[name]
    first = _random_case(shape, dtypes, dropout_p, device)
    moved = operator.byte_count(first)
    count = min(MOST_CALLS, -(-COLD_BYTES[device.type] // moved))
    pairs = [operator.arguments(first)]
    pairs += [
        operator.arguments(_random_case(shape, dtypes, dropout_p, device)) for _ in range(count - 1)
    ]
    ways, reason = _ways(name, dropout_p, pairs[0][1], device)
    ways = {way: function for way, function in ways.items() if way not in options.without}
    # Which of a pair are the arguments of each way.
    arguments = {way: [pair[way != "ours"] for pair in pairs] for way in ways}
    calls = {way: functools.partial(ways[way], *arguments[way][0]) for way in ways}
    timings = time_interleaved(calls, device, options.seconds, options.rounds)
    replays = {
        way: captured(functools.partial(_call_all, ways[way], arguments[way]), device)
        for way in ways
    }
    replays = {way: replay for way, replay in replays.items() if replay is not None}
    by_graph = {}
    if replays:
        by_graph = {
            way: Timing(timing.median / count, timing.p20 / count, timing.p80 / count)
            for way, timing in time_interleaved(
                replays, device, options.seconds, options.rounds
            ).items()
        }
    return {"reason": reason} | _columns(timings, by_graph, moved, count, copy_rate)


def _call_all(function: Callable, arguments: list[tuple]) -> list[object]:
    """All results are there at the end, so that none takes the place of another in the cache."""
    return [function(*each) for each in arguments]


def _ways(
    name: str, dropout_p: float, plain_arguments: tuple, device: torch.device
) -> tuple[dict[str, Callable], str]:
    """The callables by name, and why one was left out."""
    operator = OPERATORS[name]
    plain = functools.partial(operator.plain, dropout_p) if operator.drops else operator.plain
    if device.type == "cpu":  # where the operator is C++
        return {"ours": getattr(launchers, f"launch_{name}"), "torch": plain}, ""
    ways = {"ours": getattr(torch.ops.ptv2, name), "torch": plain}
    torch.compiler.reset()  # or the ninth shape would run uncompiled
    try:
        compiled = torch.compile(plain, fullgraph=True, dynamic=False)
        compiled(*plain_arguments)
    except Exception as error:
        return ways, f"torch.compile left out: {reason_of(error)}"
    return ways | {"compiled": compiled}, ""


def _columns(
    timings: dict[str, Timing], by_graph: dict[str, Timing], moved: int, count: int, rate: float
) -> Row:
    """`moved`: bytes of one call of ours; `rate`: bytes per ms of a copy."""
    row: Row = {"MB": round(moved / 1e6, 3)}
    for clock, found in (("call", timings), ("graph", by_graph)):
        for way, timing in found.items():
            row[f"{way} {clock} ms"] = round(timing.median, 5)
            row[f"{way} {clock} p20 ms"] = round(timing.p20, 5)
            row[f"{way} {clock} p80 ms"] = round(timing.p80, 5)
    clock = "graph" if timings.keys() == by_graph.keys() else "call"
    chosen = by_graph if clock == "graph" else timings
    row["clock"] = f"replay of a graph of {count} calls" if clock == "graph" else "single calls"
    if "ours" in chosen:
        speed = moved / chosen["ours"].median
        row |= {
            "GB/s": round(speed / 1e6, 2),
            "copy GB/s": round(rate / 1e6, 2),
            "of copy": round(speed / rate, 3),
        }
        for way in chosen.keys() - {"ours"}:
            row[f"speed-up over {way}"] = round(chosen[way].median / chosen["ours"].median, 3)
    return row
