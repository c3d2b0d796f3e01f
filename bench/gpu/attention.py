"""Stage `attention`: the operator against what else computes it on this card.

A unit is a shape and a dtype. The numerics rule of the tests comes first; no figure is given where
it fails. Columns are those of attention_cases.py, and `clock`: "call" times single calls with their
launches, "graph" replays of a CUDA graph, which the processor's work does not slow.
"""

from collections.abc import Iterator
from functools import cache

import torch

from bench import roofline
from bench.attention_cases import (
    DENSITIES,
    DROPOUTS,
    GEMM,
    Case,
    check_numerics,
    inputs_of,
    row_of,
)
from bench.attention_providers import OURS, running_calls, timed_calls
from bench.gpu.graphs import captured
from bench.gpu.stages import Row, StageOptions
from bench.measure import time_interleaved
from bench.shapes import ATTENTION_SHAPES, AttentionShape

FIRST = ("base-b32-t128-p20", "base-b32-t128-p128", "base-b32-t512-p128", "large-b32-t512-p128")
FP32 = ("base-b32-t128-p20",)
REHEARSED = {"tiny": AttentionShape(2, 2, 16, 16, 8, 16)}


def _shapes(device: torch.device) -> dict[str, AttentionShape]:
    return REHEARSED if device.type == "cpu" else ATTENTION_SHAPES["cuda"]


def units(device: torch.device) -> list[str]:
    names = list(_shapes(device))
    names.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    return [f"{name} bf16" for name in names] + [f"{name} fp32" for name in names if name in FP32]


def run(name: str, device: torch.device, options: StageOptions) -> Iterator[Row]:
    shape_name, dtype_name = name.split()
    shape = _shapes(device)[shape_name]
    densities = (0.5,) if device.type == "cpu" else DENSITIES
    for density in densities:
        for dropout_p in DROPOUTS:
            for backward in (False, True):
                case = Case(
                    shape_name, shape, dtype_name, density, dropout_p, backward, device, "triton"
                )
                if not backward:
                    check_numerics(case, "triton")
                yield from _measure(case, options)


@cache
def _copy_bytes_per_ms(device: torch.device) -> float:
    return roofline.copy_bytes_per_ms(device)


def _measure(case: Case, options: StageOptions) -> Iterator[Row]:
    calls = timed_calls(inputs_of(case), case.dropout_p, case.backward, case.backend)
    calls = {name: call for name, call in calls.items() if name not in options.without}
    running, refusals = running_calls(calls, case.dropout_p)
    functions = {name: call.run for name, call in running.items()}
    functions[GEMM] = roofline.gemm_call(case.dtype, case.device)
    graphs = {name: captured(function, case.device) for name, function in functions.items()}
    graphs = {name: graph for name, graph in graphs.items() if graph is not None}
    for clock, timed in (("call", functions), ("graph", graphs)):
        if not timed.keys() >= {OURS, "concat+sdpa", GEMM}:
            continue  # nothing to compare: no graphs on this device
        timings = time_interleaved(timed, case.device, options.seconds, options.rounds)
        row = row_of(case, timings, _copy_bytes_per_ms(case.device))
        shown = ("pass", "density", "dropout", "speed-up over best", "best torch path")
        left_out = "; ".join(f"{way}: {reason}" for way, reason in sorted(refusals.items()))
        yield {
            "clock": clock, **{name: row[name] for name in shown}, **row,
            "left out": left_out[:500],
        }  # fmt: skip
