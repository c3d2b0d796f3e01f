"""The trials of a search: which comes next, its run, and when it is stopped early."""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import sqlite3
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy
import optuna
import torch
from optuna.exceptions import OptunaError
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ptv2_fast.training.callbacks import DivergedError
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.run import train
from ptv2_fast.training.search.results import tidy, trial_config, trial_folder, write_results
from ptv2_fast.training.search.space import Space, distributions
from ptv2_fast.training.sweeps.sweep import free_memory, one_line

STUDY = "study.db"
_PATIENCE = 120  # seconds that a process waits while another writes

# A trial that is running will be one of these, or its process dies.
_COUNTED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


@dataclasses.dataclass(frozen=True)
class Search:
    """A search, as its processes share it.

    Attributes:
        base: the options that are not searched.
        space: those that are.
        folder: of the study.
        trials: finished or pruned trials in the end, those of earlier starts included.
        workers: processes that train at the same time.
        timeout: seconds after which no further trial begins; None = no limit.
        prune: stop trials that are worse than the median of the others at the same evaluation.
    """

    base: RunConfig
    space: Space
    folder: Path
    trials: int
    workers: int = 1
    timeout: float | None = None
    prune: bool = True

    def __post_init__(self) -> None:
        for name in ("trials", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)}")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout: expected a number > 0, got {self.timeout}")


@contextlib.contextmanager
def readable_study(search: Search) -> Iterator[None]:
    """Within the context a study that cannot be read raises a ValueError."""
    file = search.folder / STUDY
    try:
        _check_database(file)
        yield
    except (
        SQLAlchemyError, OptunaError, sqlite3.Error,
        KeyError, UnicodeDecodeError, json.JSONDecodeError,  # of optuna, for rows with other text
    ) as error:  # fmt: skip
        cause = getattr(error, "orig", None) or error.__cause__ or error
        reason = one_line(cause if isinstance(cause, Exception) else error)
        raise ValueError(f"study: expected a database, got {file} ({reason:.200})") from error


def _check_database(file: Path) -> None:
    """Raise a sqlite3.Error for a damaged page, which would be read when it is needed alone."""
    if file.is_file():
        with contextlib.closing(sqlite3.connect(file, timeout=_PATIENCE)) as database:
            ((found, *_), *_) = database.execute("PRAGMA integrity_check")
        if found != "ok":
            raise sqlite3.DatabaseError(" ".join(found.split()))


def open_study(search: Search) -> optuna.Study:
    """The study in the folder, a new one when there is none; to be called in `readable_study`."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = {"connect_args": {"timeout": _PATIENCE}}
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{search.folder / STUDY}", engine_kwargs=settings
    )
    return optuna.create_study(
        storage=storage,
        study_name="search",
        direction="maximize",
        pruner=make_pruner(search.prune),
        load_if_exists=True,
    )


def make_pruner(prune: bool) -> optuna.pruners.BasePruner:
    """The rule by which trials are stopped early."""
    return optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner()


def work(search: Search, metric: str, until: float | None, number: int) -> None:
    """What worker `number` of several does; it shares the processor with the others."""
    torch.set_num_threads(max(1, torch.get_num_threads() // search.workers))
    lock = filelock.FileLock(search.folder / f"worker-{number}.lock", timeout=0)
    with lock, readable_study(search):
        train_trials(search, open_study(search), metric, until)


def train_trials(search: Search, study: optuna.Study, metric: str, until: float | None) -> None:
    """Train trial after trial until there are enough, or it is `until` by time.time()."""
    while True:
        with _locked(search):
            trial = _next_trial(search, study, until)
        if trial is None:
            return
        state, value, message = _train_trial(search, trial, metric)
        free_memory()
        with _locked(search):
            if message is not None:
                trial.set_user_attr("message", message)
            study.tell(trial, value, state)
            tidy(study, search.folder)
            write_results(study, search.base, metric, search.folder)
            _announce(study, trial, metric)


def _locked(search: Search) -> filelock.BaseFileLock:
    """One process at a time counts the trials and takes the next, or finishes one."""
    return filelock.FileLock(search.folder / "study.lock")


def _next_trial(search: Search, study: optuna.Study, until: float | None) -> optuna.Trial | None:
    trials = study.get_trials(deepcopy=False)
    if sum(trial.state in _COUNTED for trial in trials) >= search.trials:
        return None
    if until is not None and time.time() >= until:
        return None
    # Seeded by how many there are: a search that starts again does not repeat its first trials.
    seeds = numpy.random.SeedSequence([search.base.training.seed, len(trials)])
    seed = int(seeds.generate_state(1)[0])
    study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return study.ask(distributions(search.space))


def _train_trial(
    search: Search, trial: optuna.Trial, metric: str
) -> tuple[TrialState, float | None, str | None]:
    """Train a trial; returns its state and its value, or what was wrong unless it was pruned.

    The value is the score of what the run keeps on all validation examples, as in its report: that
    of its best evaluation may be on fewer, or of a step that was not kept.
    """
    try:
        config = trial_config(search.base, trial.params, progress=False)
        prepared = prepare(config, trial_folder(search.folder, trial.number))
    except (ValueError, OSError) as error:
        return TrialState.PRUNED, None, one_line(error)
    # A search looks at the validation examples alone.
    features = prepared.part.features
    prepared.part.features = {name: features[name] for name in ("train", "validation")}
    try:
        report = train(prepared, [TrialWatch(trial, metric)])
    except optuna.TrialPruned:
        return TrialState.PRUNED, None, None
    except (DivergedError, torch.OutOfMemoryError) as error:
        return TrialState.PRUNED, None, one_line(error)
    except Exception as error:
        traceback.print_exc()  # a defect; were it left to stop the search, it would at each start
        return TrialState.PRUNED, None, f"{type(error).__name__}: {one_line(error)}"
    for name in ("trainable_parameters", "train_seconds"):
        trial.set_user_attr(name, report[name])
    value = report["metrics"]["validation"][metric]
    if not math.isfinite(value):
        return TrialState.PRUNED, None, f"{metric} is {value}"
    return TrialState.COMPLETE, value, None


class TrialWatch(TrainerCallback):
    """Reports each evaluation to the study and stops a trial that is to be pruned."""

    def __init__(self, trial: optuna.Trial, metric: str) -> None:
        self.trial, self.metric = trial, metric
        self.evaluations = 0

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **unused: Any,
    ) -> None:
        self.evaluations += 1
        value = float((metrics or {})[f"eval_{self.metric}"])
        if math.isfinite(value):
            self.trial.report(value, self.evaluations)
            if self.trial.should_prune():
                raise optuna.TrialPruned

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **unused: Any,
    ) -> None:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            sys.exit("the search that this worker belongs to is gone")


def _announce(study: optuna.Study, trial: optuna.Trial, metric: str) -> None:
    found = study.trials[trial.number]
    values = ", ".join(f"{name} {value}" for name, value in found.params.items())
    result = found.user_attrs.get("message") or (
        f"{metric} {found.value:.4f}" if found.state == TrialState.COMPLETE else "pruned"
    )
    print(f"trial {trial.number}: {result} ({values})", file=sys.stderr)
