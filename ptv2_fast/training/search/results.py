"""What a search leaves: trials.csv, best.yaml, and the weights of the best trial alone."""

import shutil
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from ptv2_fast.training import run_folder
from ptv2_fast.training.options import RunConfig

BEST = "best.yaml"
TRIALS = "trials.csv"

_STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
    TrialState.FAIL: "died",
}


def trial_folder(folder: Path, number: int) -> Path:
    """Where a trial trains."""
    return folder / f"trial-{number:04d}"


def trial_config(base: RunConfig, params: dict[str, Any], **more: Any) -> RunConfig:
    """The options of a trial.

    Raises:
        ValueError: when its values do not go together.
    """
    return base.changed(params | more)


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The finished trial with the highest value, the first of equals; None without one."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max(finished, key=_value, default=None)


def failures(study: optuna.Study) -> dict[int, str]:
    """Number of a trial -> why it has no score, for those that were not stopped for a low one."""
    found = {}
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.FAIL:
            found[trial.number] = "its process died"
        elif "message" in trial.user_attrs:
            found[trial.number] = str(trial.user_attrs["message"])
    return found


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def tidy(study: optuna.Study, folder: Path) -> None:
    """Delete checkpoints, and what was trained by all but the best trial; logs stay."""
    best = best_trial(study)
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.RUNNING:
            continue
        names = [run_folder.CHECKPOINTS]
        if best is None or trial.number != best.number:
            names += [run_folder.ADAPTER, run_folder.MODEL, run_folder.TOKENIZER]
            (trial_folder(folder, trial.number) / run_folder.TRAINED).unlink(missing_ok=True)
        for name in names:
            shutil.rmtree(trial_folder(folder, trial.number) / name, ignore_errors=True)


def write_results(study: optuna.Study, base: RunConfig, metric: str, folder: Path) -> None:
    """Write trials.csv and, when a trial has finished, best.yaml; each is replaced as a whole."""
    trials = study.get_trials(deepcopy=False)
    rows = [_row(trial, metric) for trial in trials if trial.state != TrialState.WAITING]
    run_folder.write_csv(folder / TRIALS, rows)
    best = best_trial(study)
    if best is not None:
        head = f"# Trial {best.number} of {len(rows)}: {metric} {best.value}\n"
        tables = trial_config(base, best.params).to_dict()
        run_folder.write_text(folder / BEST, head + yaml.safe_dump(tables, sort_keys=False))


def _row(trial: FrozenTrial, metric: str) -> dict[str, Any]:
    finished = trial.state == TrialState.COMPLETE
    return {
        "trial": trial.number,
        "state": _STATES[trial.state],
        metric: trial.value if finished else "",
        **trial.params,
        "evaluations": len(trial.intermediate_values),
        "seconds": trial.duration.total_seconds() if trial.duration else "",
        "train_seconds": trial.user_attrs.get("train_seconds", ""),
        "trainable_parameters": trial.user_attrs.get("trainable_parameters", ""),
        "retry_of": trial.user_attrs.get("retry_of", ""),
        "message": trial.user_attrs.get("message", ""),
    }
