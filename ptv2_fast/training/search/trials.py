"""The trials of a search: which comes next, its run, and when it is stopped early."""

import math
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import optuna
import torch
from optuna.trial import FrozenTrial, TrialState
from transformers import TrainerCallback

from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.run import train
from ptv2_fast.training.search.results import trial_folder, write_search_results
from ptv2_fast.training.search.space import draw_values, with_options
from ptv2_fast.training.search.study import (
    Search,
    begin_search,
    open_study,
    readable_study,
    retry,
    retry_dead_trials,
    trials_left,
)
from ptv2_fast.training.sweeps.sweep import describe_failure, free_memory


def work(search: Search, metric: str) -> None:
    """What each of several worker processes does; it shares the processor with the others."""
    torch.set_num_threads(max(1, torch.get_num_threads() // search.workers))
    with readable_study(search):
        train_trials(search, open_study(search), metric)


def run_search(
    search: Search, *, overwrite: bool = False, worker: Callable[[Search, str], None] = work
) -> tuple[optuna.Study, str]:
    """Run trials until there are as many as asked for; goes on with the study in the folder.

    Args:
        search: what to do.
        overwrite: delete the search in the folder first.
        worker: instead of `work`, what each of several processes calls.

    Returns:
        The study, and the metric by which it compares trials.

    Raises:
        ValueError, OSError: as `begin_search`, before the first trial.
        RuntimeError: when workers died and left trials; a new start goes on.
    """
    study, metric = begin_search(search, overwrite)
    with readable_study(search):
        lost = 0
        if search.workers == 1:
            train_trials(search, study, metric)
        else:
            lost = _run_workers(search, metric, worker)
        with search.turn():
            dead = retry_dead_trials(study) if search.is_alone() else []
            write_search_results(study, search.base, metric, search.folder)
            left = trials_left(search, study)
    if lost and left > 0:
        raise RuntimeError(
            f"{lost} of {search.workers} workers died, in the trials {dead}; start the search "
            "again to go on"
        )
    return study, metric


def _run_workers(search: Search, metric: str, worker: Callable) -> int:
    """Start the workers and wait for them; returns how many died."""
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=worker, args=(search, metric)) for _ in range(search.workers)
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


def train_trials(search: Search, study: optuna.Study, metric: str) -> None:
    """Train trial after trial, beside other processes of the search, until there are enough.

    It is this process's turn from the end of a trial until the next one has its values.
    """
    turn, at_work = search.turn(), search.at_work()

    def objective(trial: optuna.Trial) -> float:
        try:
            values = draw_values(trial, search.space)
        finally:
            turn.release()
        try:
            return _train_trial(search, trial, values, metric)
        except KeyboardInterrupt:
            retry(study, study.trials[trial.number])
            raise

    def after_trial(study: optuna.Study, trial: FrozenTrial) -> None:
        free_memory()
        turn.acquire()
        write_search_results(study, search.base, metric, search.folder)
        _announce(trial, metric)
        if not comes_next():
            study.stop()

    def comes_next() -> bool:
        if search.is_alone(at_work):
            retry_dead_trials(study)
        # Seeded by how many there are: a search that starts again does not repeat its first trials.
        seeds = numpy.random.SeedSequence([search.base.training.seed, len(study.trials)])
        seed = int(seeds.generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        return trials_left(search, study) > 0

    turn.acquire()
    at_work.acquire()
    try:
        if comes_next():
            study.optimize(objective, timeout=search.timeout, callbacks=[after_trial])
    finally:
        at_work.release()
        Path(at_work.lock_file).unlink(missing_ok=True)
        turn.release()


def _train_trial(search: Search, trial: optuna.Trial, values: dict[str, Any], metric: str) -> float:
    """Train a trial.

    Returns:
        The score of what the run keeps on all validation examples, as in its report: that of its
        best evaluation may be on fewer, or of a step that was not kept.

    Raises:
        optuna.TrialPruned: when it is stopped early; and when it fails, as its attribute `message`
            says.
    """
    try:
        config = with_options(search.base, values | {"progress": False})
        prepared = prepare(config, trial_folder(search.folder, trial.number))
        # A search looks at the validation examples alone.
        features = prepared.part.features
        prepared.part.features = {name: features[name] for name in ("train", "validation")}
        report = train(prepared, [ReportEvaluations(trial, metric)])
        for name in ("trainable_parameters", "train_seconds"):
            trial.set_user_attr(name, report[name])
        score = report["metrics"]["validation"][metric]
        if not math.isfinite(score):
            raise ValueError(f"{metric} is {score}")
    except optuna.TrialPruned:
        raise
    except Exception as error:
        # Were a defect left to stop the search, it would at each start.
        trial.set_user_attr("message", describe_failure(error))
        raise optuna.TrialPruned from error
    return score


class ReportEvaluations(TrainerCallback):
    """Reports each evaluation to the study and stops a trial that is to be pruned."""

    def __init__(self, trial: optuna.Trial, metric: str) -> None:
        self.trial, self.metric = trial, metric
        self.evaluations = 0

    def on_evaluate(
        self, *unused: Any, metrics: dict[str, float] | None = None, **also_unused: Any
    ) -> None:
        self.evaluations += 1
        value = float((metrics or {})[f"eval_{self.metric}"])
        if math.isfinite(value):
            self.trial.report(value, self.evaluations)
            if self.trial.should_prune():
                raise optuna.TrialPruned

    def on_step_end(self, *unused: Any, **also_unused: Any) -> None:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            sys.exit("the search that this worker belongs to is gone")


def _announce(trial: FrozenTrial, metric: str) -> None:
    values = ", ".join(f"{name} {value}" for name, value in trial.params.items())
    result = trial.user_attrs.get("message") or (
        f"{metric} {trial.value:.4f}" if trial.state == TrialState.COMPLETE else "pruned"
    )
    print(f"trial {trial.number}: {result} ({values})", file=sys.stderr)
