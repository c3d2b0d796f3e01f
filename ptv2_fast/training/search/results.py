"""What a search leaves: trials.csv, best.yaml, and the weights of the best trial alone."""

import shutil
from pathlib import Path

import optuna
import pandas
import yaml
from optuna.trial import FrozenTrial, TrialState

from ptv2_fast.training import output, run_folder
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.search.space import with_options

BEST = "best.yaml"
TRIALS = "trials.csv"

_STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "RUNNING": "running", "FAIL": "died"}


def trial_folder(folder: Path, number: int) -> Path:
    """Where a trial trains."""
    return folder / f"trial-{number:04d}"


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The finished trial with the highest value, the first of equals; None without one."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max(finished, key=lambda trial: trial.values[0], default=None)


def write_search_results(study: optuna.Study, base: RunConfig, metric: str, folder: Path) -> None:
    """Write trials.csv and, when a trial has finished, best.yaml; each is replaced as a whole.

    Of the trials that have ended, all but the best one lose what they trained; their logs stay.
    """
    table = trials_table(study, metric)
    run_folder.write_text(folder / TRIALS, table.to_csv(index=False))
    best = best_trial(study)
    if best is not None:
        title = f"# Trial {best.number} of {len(table)}: {metric} {best.value}\n"
        options = with_options(base, best.params).to_dict()
        run_folder.write_text(folder / BEST, title + yaml.safe_dump(options, sort_keys=False))
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished():
            is_best = best is not None and trial.number == best.number
            _delete_what_is_not_needed(trial_folder(folder, trial.number), is_best)


def _delete_what_is_not_needed(run: Path, is_best: bool) -> None:
    names = [run_folder.CHECKPOINTS]
    if not is_best:
        names += [run_folder.ADAPTER, run_folder.MODEL, run_folder.TOKENIZER]
        (run / run_folder.TRAINED).unlink(missing_ok=True)
    for name in names:
        shutil.rmtree(run / name, ignore_errors=True)
    output.delete_leftovers(run.rglob("*.tmp"))


def trials_table(study: optuna.Study, metric: str) -> pandas.DataFrame:
    """A row for each trial that has begun: its state, score and values, and what it cost.

    `message` says why a trial has no score, but for one that was stopped for a low one.
    """
    attributes = ("number", "state", "value", "params", "intermediate_values", "duration")
    trials = study.trials_dataframe((*attributes, "user_attrs", "system_attrs"))
    if trials.empty:
        return pandas.DataFrame(columns=["trial", "state", metric, "message"])
    trials = trials[trials["state"].isin(_STATES)]

    def attribute(*names: str) -> pandas.Series:
        """The first of these columns that a trial has."""
        return trials.reindex(columns=names).bfill(axis=1).iloc[:, 0]

    message = attribute("user_attrs_message")
    return pandas.DataFrame({
        "trial": trials["number"],
        "state": trials["state"].map(_STATES),
        metric: trials["value"].where(trials["state"] == "COMPLETE"),
        **{
            name.removeprefix("params_"): trials[name].convert_dtypes()
            for name in trials if name.startswith("params_")
        },
        "evaluations": trials.filter(regex="^intermediate_values_").count(axis=1),
        "seconds": pandas.to_timedelta(trials["duration"]).dt.total_seconds(),
        "train_seconds": attribute("user_attrs_train_seconds"),
        "trainable_parameters": attribute("user_attrs_trainable_parameters").astype("Int64"),
        # Versions before optuna's retries kept an attribute of their own.
        "retry_of": attribute("system_attrs_failed_trial", "user_attrs_retry_of").astype("Int64"),
        "message": message.mask(message.isna() & (trials["state"] == "FAIL"), "its process died"),
    })  # fmt: skip
