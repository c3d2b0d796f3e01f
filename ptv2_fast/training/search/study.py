"""Hyper-parameter search: runs with drawn options, kept in a study that survives any crash.

In the folder: study.db (optuna's, SQLite), trial-NNNN/ (run folders; only the best keeps what it
trained), trials.csv, and best.yaml for `train --config`.

The same command started again while a search runs joins it. Each process holds a file worker-*.lock
while it trains, so that one that is alone knows every other trial that is "running" to be dead; of
several, each finds dead ones by optuna's heartbeats. Dead trials are trained again.
"""

import contextlib
import dataclasses
import json
import sqlite3
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import optuna
from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from ptv2_fast.tasks import DataOptions
from ptv2_fast.tasks.option_table import GIVEN
from ptv2_fast.training import output, run_folder
from ptv2_fast.training.option_files import OF_EARLIER_RUNS, with_given
from ptv2_fast.training.options import NEUTRAL_OPTIONS, RunConfig, defaults
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.search.space import Space, values_of
from ptv2_fast.training.sweeps.sweep import free_memory, one_line

STUDY = "study.db"
_DESCRIPTION = "facts"  # the study's attribute
_PATIENCE = 120  # seconds that a process waits while another writes
_HEARTBEAT = 10  # seconds
_DEAD_AFTER = 600  # seconds without a heartbeat; a machine may sleep in the middle of a trial
# A trial that is running will be one of these, or its process dies.
_COUNTED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)

warnings.filterwarnings("ignore", category=ExperimentalWarning)  # heartbeats, the constant liar
# retry(study, trial) queues the values of a dead trial; not for ever, as they may be what kills.
retry = RetryHeartbeatStaleTrialCallback(max_retry=3)


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

    def turn(self) -> filelock.BaseFileLock:
        """The lock of what one process does at a time: begin, count, draw and write results."""
        return filelock.FileLock(self.folder / f"{output.MARKER}-turn.lock")

    def at_work(self) -> filelock.BaseFileLock:
        """A lock of this process, to be acquired in its turn and held while it trains."""
        return filelock.FileLock(self.folder / f"worker-{uuid.uuid4().hex}.lock")

    def is_alone(self, own: filelock.BaseFileLock | None = None) -> bool:
        """Whether no other process than the holder of `own` trains; to be asked in one's turn."""
        for file in self.folder.glob("worker-*.lock"):
            if own is None or str(file) != own.lock_file:
                try:
                    with filelock.FileLock(file, timeout=0):
                        pass
                except filelock.Timeout:
                    return False
        return True


def begin_search(search: Search, overwrite: bool) -> tuple[optuna.Study, str]:
    """Create the study or check that the one in the folder is of this search.

    Returns:
        The study, to be used in `readable_study`, and the metric by which it compares trials.

    Raises:
        ValueError, OSError: for bad input; a study of another search; with `overwrite`, a search
            that is running in the folder.
    """

    def check() -> None:
        run_folder.check_output(search.folder, not overwrite, overwrite, "search")
        if overwrite and not search.is_alone():
            raise ValueError(f"output: a search is running in {search.folder}")

    check()
    description = _describe(search)
    search.folder.mkdir(parents=True, exist_ok=True)
    with (
        search.turn(),
        output.locked(search.folder, "search", overwrite, check),
        readable_study(search),
    ):
        study = open_study(search)
        check_same_search(study, description)
    return study, description["metric"]


def open_study(search: Search) -> optuna.Study:
    """The study in the folder, a new one when there is none; to be called in `readable_study`."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = RDBStorage(
        f"sqlite:///{search.folder / STUDY}",
        engine_kwargs={"connect_args": {"timeout": _PATIENCE}},
        heartbeat_interval=_HEARTBEAT,
        grace_period=_DEAD_AFTER,
        heartbeat_stale_trial_callback=retry,
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


def retry_dead_trials(study: optuna.Study) -> list[int]:
    """Give up the trials that are running, and queue their values; for when nobody trains.

    Returns:
        Their numbers.
    """
    dead = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in dead:
        retry(study, trial)
        study.tell(trial.number, state=TrialState.FAIL)
    return [trial.number for trial in dead]


def trials_left(search: Search, study: optuna.Study) -> int:
    """How many trials nobody has begun."""
    return search.trials - len(study.get_trials(deepcopy=False, states=_COUNTED))


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
            ((verdict, *_), *_) = database.execute("PRAGMA integrity_check")
        if verdict != "ok":
            raise sqlite3.DatabaseError(" ".join(verdict.split()))


def _describe(search: Search) -> dict[str, Any]:
    """What makes a study this search's own; reading the data shows bad input before any trial."""
    first = {name: values_of(entry)[0] for name, entry in search.space.items()}
    prepared = prepare(search.base.changed(first), search.folder / "trial")
    part = prepared.part
    if "validation" not in part.features:
        raise ValueError("search: expected validation examples to compare trials by, got none")
    fixed = {
        name: value
        for name, value in search.base.flat().items()
        if name not in NEUTRAL_OPTIONS and name not in search.space
    }
    description = {
        **fixed,
        GIVEN: search.base.to_dict()[GIVEN],
        "space": search.space,
        "labels": part.labels,
        "examples": {name: len(split.examples) for name, split in part.features.items()},
        "metric": part.task.metric,
    }
    del prepared, part
    free_memory()
    return description


def check_same_search(study: optuna.Study, description: dict[str, Any]) -> None:
    """Check that a study is of the search that is described; a new one gets the description.

    Raises:
        ValueError: naming what differs.
    """
    before = study.user_attrs.get(_DESCRIPTION)
    if before is None:
        if study.get_trials(deepcopy=False):
            raise ValueError(f"study: expected one of this program, got another in {STUDY}")
        study.set_user_attr(_DESCRIPTION, description)
        return
    # A version without an option did as with its default, or what is said of it.
    known = defaults() | OF_EARLIER_RUNS
    before = {name: value for name, value in known.items() if name in description} | before
    if GIVEN not in before and "task" in before:  # nor what the published data set sets
        data = DataOptions.of(with_given(before)).model_dump()
        before |= {name: data[name] for name in DataOptions.dependent if name in before}
    run_folder.check_same("study", "search", before, description, {GIVEN})
