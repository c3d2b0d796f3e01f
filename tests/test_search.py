"""Hyper-parameter search: spaces, trials that end in every way, and a search that was killed."""

import csv
import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import optuna
import pytest
import yaml
from optuna.trial import TrialState

from ptv2_fast import cli
from ptv2_fast.training import trainer
from ptv2_fast.training.options import RunConfig, read_config_file
from ptv2_fast.training.search import study as search_study
from ptv2_fast.training.search import trials as search_trials
from ptv2_fast.training.search.space import check_space, default_space, read_space
from ptv2_fast.training.search.study import Search, check_same_search, open_study
from ptv2_fast.training.search.trials import ReportEvaluations, run_search
from tests.models import one_thread  # noqa: F401
from tests.tiny_run import save_tiny_model, write_conll

ADAPTER = "adapter/ptv2_adapter.safetensors"
SPACE = {
    "learning_rate": {"low": 0.001, "high": 0.1, "log": True},
    "num_virtual_tokens": {"choices": [4, 60]},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("tiny")
    return {
        "task": "token-classification",
        "model": save_tiny_model(folder / "model"),
        "train_file": write_conll(folder / "train.txt", 16),
        "validation_file": write_conll(folder / "dev.txt", 8),
        "batch_size": 4,
        "max_steps": 8,
    }


def base_of(tiny, **more) -> RunConfig:
    return RunConfig.from_dict(tiny | more)


def command(tiny, output: Path, space: Path, *more: str) -> list[str]:
    words = ["search", "--output", str(output), "--space", str(space), *more]
    for name, value in tiny.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def trials_of(search: Search) -> list[optuna.trial.FrozenTrial]:
    return open_study(search).trials


def test_the_default_space_is_what_the_method_has_and_the_user_did_not_give(tiny):
    space = default_space(base_of(tiny | {"max_steps": None}))
    assert list(space) == [
        "learning_rate", "num_virtual_tokens", "prefix_projection", "num_train_epochs", "dropout"
    ]  # fmt: skip
    rate = space["learning_rate"]
    assert (rate["low"], rate["high"]) == (pytest.approx(1e-3), pytest.approx(1e-1))
    assert space["num_virtual_tokens"] == {"choices": [8, 16, 32, 64, 128]}
    tuning = default_space(base_of(tiny, method="fine-tuning"), {"dropout"})
    assert list(tuning) == ["learning_rate"]
    with pytest.raises(ValueError, match="space: expected an option to vary"):
        default_space(base_of(tiny, method="fine-tuning"), {"dropout", "learning_rate"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: {choices: [1.0]}", "space: config: unknown options .*learning_rate"),
        ("learning_rate: {low: 0.1, high: 0.01}", "learning_rate: expected low below high"),
        ("learning_rate: {low: 1e-3, high: 0.01}", "1.0e-3 and not 1e-3 in YAML"),
        ("learning_rate: {low: 0.0, high: 0.01, log: true}", "low above 0 with log"),
        ("learning_rate: {low: 0.1}", "expected low, high"),
        ("learning_rate: [0.1, 0.2]", "expected a table with choices"),
        ("num_virtual_tokens: {low: 0, high: 4}", "num_virtual_tokens: expected an integer >= 1"),
        (
            "num_virtual_tokens: {low: 4, high: 8, step: 0.5}",
            "num_virtual_tokens: expected integers",
        ),
        ("learning_rate: {low: 0.1, high: .inf}", "learning_rate: expected finite numbers"),
        ("num_virtual_tokens: {choices: [4, 4]}", "different choices"),
        ("pre_seq_len: {choices: [4]}\nnum_virtual_tokens: {choices: [8]}", "every option once"),
        ("method: {choices: [magic]}", "method: expected one of"),
        ("method: {low: 1, high: 2}", "the option is no number"),
        ("task: {choices: [rte]}", "options of one task"),
        ("{}", "at least one option"),
    ],
)
def test_a_bad_space_is_refused(text, message, tiny, tmp_path):
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        check_space(read_space(tmp_path / "space.yaml"), base_of(tiny))


def test_a_space_may_name_the_model_and_use_aliases(tiny, tmp_path):
    (tmp_path / "space.yaml").write_text(
        f"model: {{choices: ['{tiny['model']}', other]}}\n"
        "pre_seq_len: {low: 4, high: 8, step: 2}\nbatch_tokens: {choices: [64, 128]}"
    )
    space = read_space(tmp_path / "space.yaml")
    assert list(space) == ["model", "num_virtual_tokens", "batch_tokens"]
    check_space(space, base_of(tiny, batch_size=4))  # which they replace


def test_a_study_of_a_version_with_fewer_options_goes_on():
    study = optuna.create_study()
    study.set_user_attr("facts", {"seed": 3})
    check_same_search(study, {"seed": 3, "adam_beta1": 0.9})
    with pytest.raises(ValueError, match=r"adam_beta1 0\.9 against 0\.8$"):
        check_same_search(study, {"seed": 3, "adam_beta1": 0.8})
    check_same_search(study, {"seed": 3, "decoding": "argmax"})
    with pytest.raises(ValueError, match=r"decoding 'argmax' against None$"):
        check_same_search(study, {"seed": 3, "decoding": None})


def test_evaluations_are_reported_but_for_those_that_are_no_number():
    study = optuna.create_study(direction="maximize")
    callback = ReportEvaluations(study.ask(), "f1")
    for f1 in (0.2, 0.7, math.nan, 0.5):
        callback.on_evaluate(None, None, None, metrics={"eval_f1": f1})
    assert study.trials[0].intermediate_values == {1: 0.2, 2: 0.7, 4: 0.5}


def test_a_trials_value_is_the_score_of_what_it_kept(tiny, tmp_path, monkeypatch):
    """The last step is kept here, though an earlier evaluation was better."""
    scores = iter([0.9, 0.3])
    monkeypatch.setattr(trainer, "score", lambda *unused: {"f1": next(scores)})
    base = base_of(tiny, max_steps=4, eval_steps=2, save_steps=0)
    study, _ = run_search(Search(base, SPACE, tmp_path / "search", trials=1))
    (trial,) = study.trials
    assert trial.intermediate_values == {1: 0.9, 2: 0.3}
    assert trial.value == 0.3


def test_trials_go_on_and_those_with_bad_values_are_set_aside(tiny, tmp_path, capsys):
    """A prefix of 60 shifted positions is more than the model has."""
    folder = tmp_path / "search"
    base = base_of(tiny, position_offset="prefix", dropout=0.0)
    search = Search(base, SPACE, folder, trials=1)
    run_search(search)
    open_study(search).enqueue_trial({"learning_rate": 0.01, "num_virtual_tokens": 60})
    open_study(search).enqueue_trial({"learning_rate": 0.1, "num_virtual_tokens": 4})
    more = Search(base, search.space, folder, trials=3)
    study, _ = run_search(more)
    assert [trial.state for trial in study.trials][1:] == [TrialState.PRUNED, TrialState.COMPLETE]
    with open(folder / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows][1:] == ["pruned", "finished"]
    assert "num_virtual_tokens: expected room for an input" in rows[1]["message"]

    # The best trial's values train again to what it kept; the others kept their logs alone.
    best = study.best_trial
    kept = [number for number in range(3) if (folder / f"trial-{number:04d}" / ADAPTER).is_file()]
    assert kept == [best.number]
    assert not list(folder.rglob("checkpoints"))
    config = read_config_file(folder / "best.yaml")
    assert {name: config[name] for name in best.params} == best.params
    words = ["train", "--config", str(folder / "best.yaml"), "--output", str(tmp_path / "again")]
    assert cli.main([*words, "--no-progress"]) == 0
    report = json.loads((tmp_path / "again" / "report.json").read_text())
    assert report["metrics"]["validation"]["f1"] == best.value
    again, trained = tmp_path / "again" / ADAPTER, folder / f"trial-{best.number:04d}" / ADAPTER
    assert again.read_bytes() == trained.read_bytes()

    before = len(study.trials)
    assert len(run_search(more)[0].trials) == before, "there are as many as asked for"
    for changes, message in (
        ({"batch_size": 8}, "batch_size 4 against 8"),
        ({"train_file": tiny["validation_file"]}, "train_file .* examples"),
    ):
        other = base_of(tiny, position_offset="prefix", dropout=0.0, **changes)
        with pytest.raises(ValueError, match=message):
            run_search(Search(other, search.space, folder, trials=3))
    with pytest.raises(ValueError, match=r"space .*0\.2"):
        wider = search.space | {"learning_rate": {"low": 0.001, "high": 0.2, "log": True}}
        run_search(Search(base, wider, folder, trials=3))
    assert len(trials_of(more)) == before


def test_a_search_whose_trials_are_all_pruned_says_so(tiny, tmp_path, capsys, monkeypatch):
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"dropout": {"choices": [0.0, 0.1]}}))
    monkeypatch.setattr(
        search_study, "make_pruner", lambda prune: optuna.pruners.ThresholdPruner(lower=2.0)
    )
    folder = tmp_path / "search"
    assert cli.main(command(tiny, folder, space, "--trials", "1", "--dropout", "0.1")) == 2
    assert "dropout: expected no value, since the space varies it" in capsys.readouterr().err
    assert not folder.exists()
    assert cli.main(command(tiny, folder, space, "--trials", "2")) == 2
    assert "no trial finished" in capsys.readouterr().err
    trials = optuna.load_study(study_name="search", storage=f"sqlite:///{folder}/study.db").trials
    assert [(trial.state, len(trial.intermediate_values)) for trial in trials] == [
        (TrialState.PRUNED, 1), (TrialState.PRUNED, 1)
    ]  # fmt: skip
    assert not (folder / "trial-0001" / "report.json").exists()
    assert not (folder / "best.yaml").exists()


def states_of(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


def test_the_same_search_started_again_joins_the_one_that_runs(tiny, tmp_path):
    """Another process is in trial 1, and later is gone without having ended it."""
    folder, space = tmp_path / "search", {"learning_rate": SPACE["learning_rate"]}
    first = Search(base_of(tiny, max_steps=1), space, folder, trials=1)
    run_search(first)
    other = open_study(first).ask()
    search = dataclasses.replace(first, trials=3)
    with filelock.FileLock(folder / "worker-other.lock"):
        with pytest.raises(ValueError, match="a search is running in"):
            run_search(search, overwrite=True)
        study, _ = run_search(search)
        assert states_of(study) == ["COMPLETE", "RUNNING", "COMPLETE"]
    leftover = folder / f"trial-{other.number:04d}" / "report.json.7.tmp"
    leftover.parent.mkdir()
    leftover.touch()
    study, _ = run_search(search)
    assert states_of(study) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert not leftover.exists()
    with open(folder / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["finished", "died", "finished", "finished"]
    assert [row["retry_of"] for row in rows] == ["", "", "", "1"]
    assert rows[1]["message"] == "its process died"


def test_a_trial_without_a_heartbeat_is_trained_by_others_that_go_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(search_study, "_DEAD_AFTER", 1)
    folder, space = tmp_path / "search", {"learning_rate": SPACE["learning_rate"]}
    search = Search(base_of(tiny, max_steps=1), space, folder, trials=1)
    run_search(search)
    study = open_study(search)
    dead = study.ask()
    study._storage.record_heartbeat(dead._trial_id)
    time.sleep(2.5)  # heartbeats are in whole seconds
    with filelock.FileLock(folder / "worker-other.lock"):
        study, _ = run_search(dataclasses.replace(search, trials=3))
    assert states_of(study) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]


def test_values_of_an_interrupted_trial_are_trained_again(tiny, tmp_path, monkeypatch):
    def interrupt(*unused):
        raise KeyboardInterrupt

    search = Search(base_of(tiny, max_steps=1), SPACE, tmp_path / "search", trials=1)
    monkeypatch.setattr(search_trials, "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_search(search)
    monkeypatch.undo()
    study, _ = run_search(search)
    assert states_of(study) == ["FAIL", "COMPLETE"]
    assert study.trials[0].params == study.trials[1].params


def test_a_damaged_study_and_a_missing_optuna_are_named(tiny, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "search"
    folder.mkdir()
    (folder / "study.db").write_text("not a database")
    with pytest.raises(ValueError, match="study: expected a database"):
        run_search(Search(base_of(tiny), SPACE, folder, trials=1))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "space.yaml").write_text("dropout: {choices: [0.0]}")
    assert cli.main(command(tiny, folder, tmp_path / "space.yaml")) == 2
    assert "pip install 'ptv2-fast[search]'" in capsys.readouterr().err


def test_a_search_needs_validation_examples(tiny, tmp_path):
    base = base_of(tiny | {"validation_file": None})
    with pytest.raises(ValueError, match="search: expected validation examples"):
        run_search(Search(base, SPACE, tmp_path / "search", trials=1))
    assert not (tmp_path / "search").exists()


def test_a_killed_search_goes_on_with_two_workers(tiny, tmp_path, capsys):
    """Killed in the second trial: the first stays, the second is trained again, four in the end."""
    space, folder = tmp_path / "space.yaml", tmp_path / "search"
    space.write_text(yaml.safe_dump({"learning_rate": SPACE["learning_rate"]}))
    tiny = tiny | {"max_steps": 30, "eval_steps": 10, "save_steps": 0}
    words = command(tiny, folder, space, "--trials", "4")
    process = subprocess.Popen(
        [sys.executable, "-m", "ptv2_fast.cli", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.DEVNULL,
    )
    while not (folder / "trial-0001" / "metrics.jsonl").is_file():
        assert process.poll() is None, "the search ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    search = Search(base_of(tiny), {}, folder, trials=4)
    first, second = trials_of(search)
    assert (first.state, second.state) == (TrialState.COMPLETE, TrialState.RUNNING)
    report = (folder / "trial-0000" / "report.json").stat().st_mtime_ns

    assert cli.main([*words, "--workers", "2"]) == 0
    trials = trials_of(search)
    assert (folder / "trial-0000" / "report.json").stat().st_mtime_ns == report
    assert (trials[0].value, trials[0].params) == (first.value, first.params)
    assert trials[1].state == TrialState.FAIL
    (retried,) = [trial for trial in trials if trial.system_attrs.get("failed_trial") == 1]
    assert retried.params == second.params
    ended = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert len(ended) == 4 and len(trials) == 5
    assert len({trial.params["learning_rate"] for trial in ended}) == 4
    assert "best: trial" in capsys.readouterr().out
