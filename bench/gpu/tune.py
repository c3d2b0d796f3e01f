"""Stage `tune`: the fastest launch configuration of every attention kernel on this card.

A unit is a head_dim, a dtype and a dropout; the last one proves by the checks that the found ones
are right, and that equal sequences give equal bits whatever they are batched with. A kernel's
configuration may depend on head_dim, dtype, dropout and the class of the prefix length, never on
the batch or the layout: every candidate is timed on a padded and on a packed batch by replays of a
CUDA graph, and the least geometric mean of both wins. The winners go to OUTPUT/tuned-ARCH.json.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton

from bench.gpu import check
from bench.gpu.graphs import captured
from bench.gpu.stages import Row, StageOptions
from bench.measure import time_interleaved
from ptv2_kernels import configs
from ptv2_kernels.measured import Config, Workload, file_of, write_measured
from tests.inputs import Inputs, Shape, make_inputs

PROOF = "proof"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEADS = {32: 12, 64: 12, 128: 16}
# head_dim, dtype, dropout: the most wanted first.
SEARCHED = (
    (64, "bf16", 0.1),
    (64, "bf16", 0.0),
    (128, "bf16", 0.1),
    (128, "bf16", 0.0),
    (32, "bf16", 0.1),
    (32, "bf16", 0.0),
    (64, "fp32", 0.0),
    (64, "fp32", 0.1),
)
TASKS = (  # kernel, prefix length: one of each class
    ("forward", 20),
    ("query", 20),
    ("prefix", 20),
    ("key_value", None),
    ("forward", 100),
    ("query", 100),
    ("prefix", 100),
)
PROVING = (  # of tests.gpu_cases
    "bits-bf16",
    "bits-fp32",
    "attention-bf16-narrow",
    "attention-bf16-wide",
    "attention-fp32-narrow",
    "attention-options-bf16",
)
LEAST_GAIN = 1.02  # a winner that is not this much faster than the shipped one is left out


class TuningTask(NamedTuple):
    """What is searched for: one entry of the table."""

    kernel: str
    head_dim: int
    dtype_name: str
    dropout_p: float
    prefix_length: int | None
    device_type: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def workload(self) -> Workload:
        width = sum(configs.tile_widths(self.head_dim))
        has_dropout = self.dropout_p > 0
        return Workload(self.kernel, width, self.dtype.itemsize, has_dropout, self.prefix_length)

    @property
    def shipped(self) -> Config:
        workload = self.workload
        return configs.shipped_config(
            self.kernel, workload.width, workload.element_size, configs.architecture()
        )


def units(device: torch.device) -> list[str]:
    searched = SEARCHED[:1] if device.type == "cpu" else SEARCHED
    return [f"d{head_dim} {dtype} p{p:g}" for head_dim, dtype, p in searched] + [PROOF]


def run(name: str, device: torch.device, options: StageOptions) -> Iterator[Row]:
    path = Path(options.output) / f"tuned-{file_of(configs.architecture())}"
    if name == PROOF:
        yield from _prove(path, device)
        return
    head_dim, dtype_name, dropout = name.split()
    tasks = [
        TuningTask(kernel, int(head_dim[1:]), dtype_name, float(dropout[1:]), length, device.type)
        for kernel, length in (TASKS[2:4] if device.type == "cpu" else TASKS)
    ]
    if device.type == "cuda":
        _compile_all([(task, config) for task in tasks for config in candidates(task)])
    for task in tasks:
        row, winner = search(task, device, options)
        if winner is not None:
            origin = {
                "card": torch.cuda.get_device_name() if device.type == "cuda" else "rehearsal",
                "date": date.today().isoformat(),
                "triton": triton.__version__,
                "torch": torch.__version__,
            }
            key = task.workload.key
            write_measured(path, configs.architecture(), origin, {key: winner})
        yield row


def candidates(task: TuningTask) -> list[Config]:
    """What is tried: the shipped configuration first; tiles whose scores and sums fit registers."""
    shipped = task.shipped
    if task.device_type == "cpu":
        return [shipped, replace(shipped, block_queries=16)]
    found = [shipped]
    width, element_size = task.workload.width, task.workload.element_size
    blocks = itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3))
    for queries, keys, warps, stages in blocks:
        sums = {"forward": queries, "query": queries}.get(task.kernel, 2 * keys) * width
        scores = queries * keys * (1 if task.kernel == "forward" else 2)
        registers = (sums + scores) / (32 * warps)
        tiles = 2 * (queries + keys) * width * element_size
        if 16 <= registers <= 160 and queries * keys >= 1024 and stages * tiles <= 160_000:
            config = Config(queries, keys, warps, stages, shipped.maxnreg)
            if config != shipped:
                found.append(config)
    return found


def _batches(task: TuningTask, device: torch.device) -> dict[str, Inputs]:
    """The two layouts that a configuration serves."""
    prefix = 8 if task.prefix_length is None else task.prefix_length
    heads = HEADS.get(task.head_dim, 12)
    if device.type == "cpu":
        shapes = {"padded": Shape(2, 1, 16, 16, prefix, task.head_dim)}
        shapes["packed"] = replace(shapes["padded"], tokens=20, queries=20)
    else:
        shapes = {
            "padded": Shape(32, heads, 128, 128, prefix, task.head_dim),
            "packed": Shape(16, heads, 384, 384, prefix, task.head_dim),
        }
    return {
        layout: make_inputs(
            shape, task.dtype, "right padding", device=str(device), packed=layout == "packed"
        )
        for layout, shape in shapes.items()
    }


def _call(task: TuningTask, inputs: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    """One launch of the kernel (a gradient's with what it needs beside it)."""
    tensors, options = inputs.raw_tensors, inputs.raw_options(task.dropout_p)
    forward = torch.ops.ptv2.prefix_attention_forward_triton
    if task.kernel == "forward":
        return lambda: forward(*tensors, *options)
    out, lse = forward(*tensors, *options)
    needs = tuple(task.kernel == kernel for kernel in ("query", "key_value", "prefix"))
    backward = torch.ops.ptv2.prefix_attention_backward_triton
    return lambda: backward(inputs.grad_out, *tensors, out, lse, None, *needs, False, *options)


def _with_config(call: Callable, kernel: str, config: Config) -> Callable:
    """The call with one kernel's configuration; others keep theirs."""
    chosen = configs.chosen_config

    def choose(workload: Workload, architecture: str | int) -> Config:
        return config if workload.kernel == kernel else chosen(workload, architecture)

    def configured():
        with patch.object(configs, "chosen_config", choose):
            return call()

    return configured


def _try(task: TuningTask, config: Config) -> str | None:
    """Compiles and runs a configuration on both batches; the reason why it does not run."""
    device = torch.device(task.device_type)
    try:
        for inputs in _batches(task, device).values():
            _with_config(_call(task, inputs), task.kernel, config)()
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None


def _compile_all(work: list[tuple[TuningTask, Config]]) -> None:
    """Fills Triton's cache by several processes; what fails shows again when it is timed."""
    processes = max(1, min(12, (os.cpu_count() or 1) - 2))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(_try, *zip(*work, strict=True), chunksize=4))


def search(
    task: TuningTask, device: torch.device, options: StageOptions
) -> tuple[Row, Config | None]:
    """The row of a task, and its winner if that is faster than the shipped configuration.

    The winner of many noisy times looks better than it is: it is timed once more against the
    shipped configuration alone, and that ratio counts.
    """
    shipped, tried = task.shipped, candidates(task)
    running = [config for config in tried if _try(task, config) is None]
    functions: dict[str, dict[Config, Callable]] = {}
    for layout, inputs in _batches(task, device).items():
        call = _call(task, inputs)
        expected = _with_config(call, task.kernel, shipped)()
        functions[layout] = {}
        for config in running:
            configured = _with_config(call, task.kernel, config)
            if _agree(configured(), expected):
                functions[layout][config] = captured(configured, device) or configured
    right = [config for config in running if all(config in of for of in functions.values())]

    def times(chosen: list[Config]) -> dict[str, dict[Config, float]]:
        """Milliseconds by layout."""
        measured = {}
        for layout, of in functions.items():
            calls = {config: of[config] for config in chosen}
            timings = time_interleaved(calls, device, options.seconds, options.rounds)
            measured[layout] = {config: timing.median for config, timing in timings.items()}
        return measured

    first = times(right)

    def relative(config: Config, measured: dict[str, dict[Config, float]]) -> float:
        return math.prod(of[config] / of[shipped] for of in measured.values()) ** 0.5

    best = min(right, key=lambda config: relative(config, first))
    again = times([shipped, best] if best != shipped else [shipped])
    speed_up = 1 / relative(best, again)
    row: Row = {
        "entry": task.workload.key,
        "tried": len(tried),
        "rejected": len(tried) - len(right),
        "shipped": _text(shipped),
        "best": _text(best),
        "speed-up": round(speed_up, 3),
    }
    for layout, measured in again.items():
        row[f"{layout} shipped us"] = round(measured[shipped] * 1e3, 2)
        row[f"{layout} best us"] = round(measured[best] * 1e3, 2)
    return row, best if speed_up >= LEAST_GAIN else None


def _text(config: Config) -> str:
    return (
        f"{config.block_queries}x{config.block_keys} warps {config.num_warps} "
        f"stages {config.num_stages}"
    )


def _agree(results: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    """Nearly equal, as other tiles of the same kernel are: what is not was compiled wrong."""
    return all(
        bool((actual.float() - other.float()).abs().max() <= 0.02 * other.float().abs().max())
        for actual, other in zip(results, expected, strict=True)
        if other.numel() and bool(other.isfinite().all())
    )


def _prove(path: Path, device: torch.device) -> Iterator[Row]:
    """The checks of the kernels' results and bits, with the table that was found."""
    if path.exists():
        os.environ["PTV2_TUNED"] = str(path)
    for group in PROVING if device.type == "cuda" else ("fuzz",):
        yield from check.run(group, device, StageOptions())
