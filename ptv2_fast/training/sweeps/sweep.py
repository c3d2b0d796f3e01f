"""Several runs one after another, each an ordinary run folder inside the sweep's.

<folder>/sweep.json, results.csv and summary.json, written anew after each run; <folder>/<run>/.
"""

import dataclasses
import gc
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ptv2_fast.training import output, run_folder
from ptv2_fast.training.callbacks import DivergedError
from ptv2_fast.training.measure import reset_peak_memory
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.run import train
from ptv2_fast.training.sweeps.plan import SWEEP, Sweep, read_sweep
from ptv2_fast.training.sweeps.results import Outcome, write_sweep_results


def check_sweep_output(
    sweep: Sweep, folder: Path, *, resume: bool = False, overwrite: bool = False
) -> Sweep:
    """Check that the sweep may run in this folder; nothing is changed.

    Returns:
        The sweep; a resumed one with the runs that the one in the folder has, these first.

    Raises:
        ValueError: as for the folder of a run; for a sweep there of something else, or runs with
            other options.
    """
    run_folder.check_output(folder, resume, overwrite, "sweep")
    if not resume or not (folder / SWEEP).is_file():
        return sweep
    before = read_sweep(folder)
    if before.kind != sweep.kind:
        raise ValueError(
            f"resume: expected the sweep of {before.kind} that was started here, got one of "
            f"{sweep.kind}"
        )
    sweep = dataclasses.replace(sweep, runs=before.runs | sweep.runs)
    for name, config in sweep.configs().items():
        try:
            run_folder.check_same_run(folder / name, config)
        except ValueError as error:
            raise ValueError(f"{folder / name}: {error}") from error
    return sweep


def run_sweep(
    sweep: Sweep,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    announce: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Run what is not finished; a run that fails is recorded and the others go on.

    Args:
        sweep: the runs.
        folder: new or empty, or a sweep's with `resume` or `overwrite`.
        resume: keep finished runs, go on with begun ones from their last checkpoint, and add
            those that the sweep in the folder did not have.
        overwrite: delete the sweep in the folder first.
        announce: is told a line about each run.

    Raises:
        ValueError: for what is wrong before the first run begins.
    """
    joined = sweep

    def check() -> None:
        nonlocal joined
        joined = check_sweep_output(sweep, folder, resume=resume, overwrite=overwrite)

    check()
    with output.locked(folder, "sweep", overwrite, check):
        return _run_all(joined, folder, announce)


def _run_all(sweep: Sweep, folder: Path, announce: Callable[[str], None]) -> Outcome:
    configs = sweep.configs()
    sweep.write(folder)
    # All of them first, so that a row stays in results.csv while a run before it is repeated.
    finished = [name for name in configs if is_finished(folder / name)]
    outcome = Outcome({name: run_folder.read_report(folder / name) for name in finished})
    if outcome.reports:
        write_sweep_results(folder, sweep, outcome)
    for number, (name, config) in enumerate(configs.items(), 1):
        place = f"{name} ({number} of {len(configs)})"
        if name in outcome.reports:
            announce(f"{place}: finished before")
            continue
        announce(f"{place}: begins")
        try:
            outcome.reports[name] = run_once(config, folder / name)
        except Exception as error:
            outcome.failures[name] = describe_failure(error)
            announce(f"{place}: failed: {outcome.failures[name]}")
        free_memory()
        write_sweep_results(folder, sweep, outcome)
    return outcome


def run_once(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Train one run, from its last checkpoint when it has begun; returns its report.

    Raises:
        ValueError, OSError: for bad input.
        DivergedError: when the training loss becomes infinite or NaN.
    """
    begun = folder.is_dir() and any(output.contents(folder))
    return train(prepare(config, folder, resume=begun))


def is_finished(folder: Path) -> bool:
    """Whether a run has come to its end."""
    return (folder / run_folder.REPORT).is_file()


def one_line(error: Exception) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def describe_failure(error: Exception) -> str:
    """Why a run failed, in one line; a defect is printed with its traceback."""
    if isinstance(error, ValueError | OSError | DivergedError | torch.OutOfMemoryError):
        return one_line(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {one_line(error)}"


def free_memory() -> None:
    """Give back what the last run held: model and trainer refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    reset_peak_memory()
