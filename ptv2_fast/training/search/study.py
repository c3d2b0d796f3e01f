"""Hyper-parameter search: runs with sampled options, kept in a study that survives any crash.

In the folder: study.db (optuna's, SQLite), trial-NNNN/ (run folders; only the best keeps what it
trained), trials.csv, and best.yaml for `train --config`.
"""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import optuna
from optuna.trial import TrialState

from ptv2_fast.training import output, run_folder
from ptv2_fast.training.options import (
    NEUTRAL_OPTIONS,
    OF_EARLIER_RUNS,
    RunConfig,
    defaults,
    with_changes,
)
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.search.results import tidy, write_results
from ptv2_fast.training.search.space import values_of
from ptv2_fast.training.search.trials import (
    STUDY,
    Search,
    open_study,
    readable_study,
    train_trials,
    work,
)
from ptv2_fast.training.sweeps.sweep import free_memory

# work(search, metric, until, number) of a worker process.
Worker = Callable[[Search, str, float | None, int], None]


def run_search(search: Search, *, overwrite: bool = False, worker: Worker = work) -> optuna.Study:
    """Run trials until there are as many as asked for; goes on with the study in the folder.

    Args:
        search: what to do.
        overwrite: delete the search in the folder first.
        worker: what each of several processes calls.

    Raises:
        ValueError, OSError: for bad input, before the first trial; a study of another search; a
            search that is running in the folder.
        RuntimeError: when a worker died; a new start goes on.
    """
    folder = search.folder

    def check() -> None:
        run_folder.check_output(folder, not overwrite, overwrite, "search")
        _check_workers_gone(folder)

    check()
    facts = _facts(search)
    with output.locked(folder, "search", overwrite, check), readable_study(search):
        study = open_study(search)
        _check_same_search(study, facts)
        _retry_dead_trials(study, folder)
        until = None if search.timeout is None else time.time() + search.timeout
        lost = 0
        if search.workers == 1:
            train_trials(search, study, facts["metric"], until)
        else:
            lost = _run_workers(search, facts["metric"], until, worker)
        dead = _retry_dead_trials(study, folder)
        write_results(study, search.base, facts["metric"], folder)
    if lost:
        raise RuntimeError(
            f"{lost} of {search.workers} workers died, in the trials {dead}; start the search "
            "again to go on"
        )
    return study


def _run_workers(search: Search, metric: str, until: float | None, worker: Worker) -> int:
    """Start the workers and wait for them; returns how many died."""
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=worker, args=(search, metric, until, number))
        for number in range(search.workers)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()
    return sum(process.exitcode != 0 for process in processes)


def _facts(search: Search) -> dict[str, Any]:
    """What makes a study this search's own; reading the data shows bad input before any trial."""
    first = {name: values_of(entry)[0] for name, entry in search.space.items()}
    config = RunConfig.from_dict(with_changes(search.base.flat(), first))
    prepared = prepare(config, search.folder / "trial")
    if "validation" not in prepared.part.features:
        raise ValueError("search: expected validation examples to compare trials by, got none")
    fixed = {
        name: value
        for name, value in search.base.flat().items()
        if name not in NEUTRAL_OPTIONS and name not in search.space
    }
    sizes = {name: len(features.examples) for name, features in prepared.part.features.items()}
    facts = {
        **fixed,
        "space": search.space,
        "labels": prepared.part.labels,
        "examples": sizes,
        "metric": prepared.part.task.metric,
    }
    del prepared
    free_memory()
    return facts


def _check_same_search(study: optuna.Study, facts: dict[str, Any]) -> None:
    before = study.user_attrs.get("facts")
    if before is None:
        if study.get_trials(deepcopy=False):
            raise ValueError(f"study: expected one of this program, got another in {STUDY}")
        study.set_user_attr("facts", facts)
        return
    # A version without an option did as with its default, or what is said of it.
    known = defaults() | OF_EARLIER_RUNS
    before = {name: value for name, value in known.items() if name in facts} | before
    differences = [
        f"{name} {before.get(name)!r} against {facts.get(name)!r}"
        for name in {**before, **facts}
        if before.get(name) != facts.get(name)
    ]
    if differences:
        raise ValueError(
            "study: expected the search that was started here; that search against now: "
            + ", ".join(differences)
        )


def _retry_dead_trials(study: optuna.Study, folder: Path) -> list[int]:
    """Give up the trials whose process is gone, and queue their values again.

    To be called while nobody trains. Returns their numbers.
    """
    dead = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in dead:
        if trial.params:
            study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number})
        study.tell(trial.number, state=TrialState.FAIL)
    tidy(study, folder)
    return [trial.number for trial in dead]


def _check_workers_gone(folder: Path) -> None:
    """No worker outlived the search that it belongs to."""
    for file in folder.glob("worker-*.lock"):
        try:
            with filelock.FileLock(file, timeout=0):
                pass
        except filelock.Timeout:
            raise ValueError(f"output: a search is running in {folder}") from None
