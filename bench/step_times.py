"""Seconds of a training step of several runs, in turn; bench.time_to_score counts in them."""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from ptv2_fast.training import run_folder
from ptv2_fast.training.machine import processor_name
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.run import train
from ptv2_fast.training.trainer_arguments import training_arguments

TURNS, WARM_UP_STEPS, TIMED_STEPS = 5, 3, 12


def time_steps(configs: dict[str, RunConfig]) -> dict[str, dict[str, Any]]:
    """The seconds of a step of each run, measured in turn, with what else the machine did, and its
    name.

    Each turn draws its batches by a seed of its own, the same for all runs.

    Args:
        configs: of runs whose epochs end by their steps, by name.
    """
    started, busy, own = time.monotonic(), _busy_seconds(), time.process_time()
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    for turn in range(TURNS):
        for name, config in configs.items():
            seconds[name].append(_step_seconds(config, seed=turn))
            print(f"{name}: {seconds[name][-1]:.4f} s a step", flush=True)
    more: dict[str, Any] = {"timed on": processor_name()}
    if busy is not None:
        others = (_busy_seconds() or busy) - busy - (time.process_time() - own)
        more["cores used by others"] = round(max(0.0, others / (time.monotonic() - started)), 2)
    return {name: row | more for name, row in compare_turns(seconds).items()}


def compare_turns(seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """The seconds of a step, and the ratios to the first run's that they come from.

    A machine's speed may change from turn to turn: the first run has the median of its turns,
    another the median of its ratios to the first one within a turn, times that.

    Args:
        seconds: of a step of each run, turn by turn.
    """
    first = next(iter(seconds.values()))
    found = {}
    for name, turns in seconds.items():
        ratios = sorted(own / its for own, its in zip(turns, first, strict=True))
        step = statistics.median(first) * statistics.median(ratios)
        rounded = json.dumps([round(ratio, 3) for ratio in ratios])
        found[name] = {"step seconds": step, "step ratios": rounded}
    return found


def _step_seconds(config: RunConfig, seed: int) -> float:
    """The mean over some steps of a training, the first ones not counted."""
    count = WARM_UP_STEPS + TIMED_STEPS
    changes = {"seed": seed, "max_steps": count, "num_train_epochs": None, "save_steps": 0,
               "logging_steps": 1}  # fmt: skip
    config = config.changed(changes)
    with tempfile.TemporaryDirectory() as place:
        prepared = prepare(config, Path(place) / "run")
        features = prepared.part.features
        for split in set(features) - {"train"}:  # whose scoring takes longer
            del features[split]
        prepared.arguments = training_arguments(
            config, prepared.folder, len(features["train"]), *prepared.batches, None
        )
        train(prepared)
        lines = (prepared.folder / run_folder.METRICS).read_text(encoding="utf-8").splitlines()
    seconds = {line["step"]: line["train_seconds"] for line in map(json.loads, lines)}
    return (seconds[count] - seconds[WARM_UP_STEPS]) / TIMED_STEPS


def _busy_seconds() -> float | None:
    """Seconds that all cores of the machine have worked; None where the system does not tell."""
    try:
        ticks = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, *others = map(int, ticks)
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")
