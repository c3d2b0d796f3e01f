"""How fast are activations, norms and rotary positions on a GPU, against torch, eager and compiled?

A unit is one operator and a dtype ("mixed": bf16 products, fp32 residual stream). Each is held to
the rules of tests/ first. What torch runs is what an encoder runs: the bias has been added by the
matrix product before, masks and statistics were saved, and rotated queries and keys are new
tensors. `columns` is the width of the result's rows, of a rotation that of queries. Columns:

    ... call ms         one call with its launches, begun with a cold L2 cache; median, p20, p80
    ... graph ms        one call of a CUDA graph's replay of several, each with tensors of its own,
                        more of them than the L2 cache holds
    GB/s, of copy       of ours by its byte count, each byte moved once, by the clock that `clock`
                        names; as a share of what a copy of 1 GiB reads and writes
    speed-up over ...   by that clock too
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.gpu.elementwise_operators import OPERATORS
from bench.gpu.graphs import captured
from bench.gpu.stages import Row, StageOptions, reason_of, release
from bench.measure import Timing, time_interleaved
from bench.roofline import copy_bytes_per_ms
from ptv2_kernels import elementwise as launchers
from tests.elementwise_cases import DTYPES, Case, exact_statistics, make_case

ROWS = {"cuda": (4096, 16384), "cpu": (8,)}
CHECKED_ROWS = 37
DROPOUT_P = 0.1
COLD_BYTES = {"cuda": 2**28, "cpu": 1}  # what the tensors of a graph's calls have together
MOST_CALLS = 32  # of a graph


def _units(device: torch.device) -> dict[str, tuple[str, str]]:
    if device.type == "cpu":
        chosen = [
            ("bias_activation_backward gelu", "bf16"),
            ("dropout_add_norm_backward rms", "mixed"),
        ]
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


def run(name: str, device: torch.device, options: StageOptions) -> Iterator[Row]:
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


def random_case(
    shape: tuple[int, int], dtypes: str, dropout_p: float, device: torch.device
) -> Case:
    """Made on the device, since those of tests/ take seconds at these sizes."""
    (rows, columns), (input_dtype, dtype) = shape, DTYPES[dtypes]

    def values(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    total = values(rows, columns, dtype=dtype)
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
        grad_total=values(rows, columns, dtype=dtype),
        dropout_p=dropout_p,
        subtract_mean=True,
        total=total,
        statistics=exact_statistics(total, True).float(),
    )


def _measured(
    name: str, shape: tuple[int, int], dtypes: str, dropout_p: float, device: torch.device,
    options: StageOptions, copy_rate: float,
) -> Row:  # fmt: skip
    operator = OPERATORS[name]
    first = random_case(shape, dtypes, dropout_p, device)
    moved = operator.byte_count(first)
    count = min(MOST_CALLS, -(-COLD_BYTES[device.type] // moved))
    pairs = [operator.arguments(first)]
    pairs += [
        operator.arguments(random_case(shape, dtypes, dropout_p, device)) for _ in range(count - 1)
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
        return {"ours": getattr(launchers, f"launch_{operator.operator}"), "torch": plain}, ""
    ways = {"ours": getattr(torch.ops.ptv2, operator.operator), "torch": plain}
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
