"""What a run shows while it lasts, how often it is scored, and on how many examples."""

import json
import re

import pytest
from transformers import TrainerCallback

from ptv2_fast import cli
from ptv2_fast.training import run
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.run import train
from ptv2_fast.training.scoring import score
from tests.models import one_thread  # noqa: F401
from tests.test_training import FakeClock, run_config, tiny  # noqa: F401


def metrics_at(folder, step: int) -> dict[str, float]:
    """What metrics.jsonl says about the scoring after a step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (entry,) = [line for line in lines if line["step"] == step and "eval_f1" in line]
    scores = {k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_")}
    return {name: value for name, value in scores.items() if name != "runtime"}


@pytest.mark.parametrize(
    "changes",
    [{"save_steps": 2}, {"save_steps": 0}, {"save_steps": 2, "load_best": False}],
    ids=["best", "last", "last of several checkpoints"],
)
def test_final_weights_are_scored_once(changes, tiny, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.delattr(run, "score")
    config = run_config(tiny, max_steps=6, eval_steps=2, **changes)
    prepared = prepare(config, tmp_path / "run")
    found = train(prepared)["metrics"]["validation"]
    scored = {step: metrics_at(tmp_path / "run", step) for step in (2, 4, 6)}
    best = max(scored, key=lambda step: scored[step]["f1"])
    assert found == scored[best if len(changes) == 1 and changes["save_steps"] else 6]
    wrong: dict = {}
    assert found == score(prepared.part, prepared.part.features["validation"], wrong=wrong)
    assert json.loads((tmp_path / "run" / "mistakes.json").read_text()) == {"validation": wrong}


def test_the_bar_of_a_time_limit_is_over_seconds(tiny, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("ptv2_fast.training.run.StepClock", FakeClock)
    train(prepare(run_config(tiny, max_seconds=7, progress=True), tmp_path / "run"))
    shown = capsys.readouterr().err
    assert re.search(r"training: 100%\|.*\| 7/7 s of training \[.*, step 7\]", shown)
    assert re.search(r"scoring dev.txt: +0%\|.*\| 0/1 ", shown)
    assert "0000" not in shown


def test_the_bar_of_steps_goes_away_before_the_next_line(tiny, tmp_path, capsys):  # noqa: F811
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **unused) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    prepared = prepare(run_config(tiny, max_steps=9, progress=True), tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(prepared, [Stop()])
    shown = capsys.readouterr().err
    assert re.search(r"training: .*\| 3/9 ", shown) and shown.endswith("\n")


def test_losses_and_scores_are_a_line_each_without_bars(tiny, tmp_path, capsys):  # noqa: F811
    config = run_config(tiny, max_steps=6, eval_steps=3, logging_steps=2)
    prepared = prepare(config, tmp_path / "run")
    capsys.readouterr()
    train(prepared)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0].rpartition(" ")[0] for line in lines] == [
        "step 2: loss", "step 3: eval_accuracy", "step 4: loss", "step 6: loss",
        "step 6: eval_accuracy",
    ]  # fmt: skip
    assert all("learning_rate" in line for line in lines if "loss" in line)


def test_a_limit_on_validation_examples_holds_for_the_last_scoring(tiny, tmp_path, capsys):  # noqa: F811
    """And is said; the test examples are all scored."""
    config = tmp_path / "config.json"
    values = {**tiny, "max_steps": 4, "max_eval_examples": 3, "max_train_examples": 20,
              "test_file": tiny["validation_file"]}  # fmt: skip
    config.write_text(json.dumps(values))
    assert cli.main(["train", "--config", str(config), "--output", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr()
    assert "validation: 3 examples of 8, drawn by the seed" in shown.err
    assert "train: 20 examples of 24, drawn by the seed" in shown.err
    assert "\nvalidation (3 of 8 examples): " in shown.out and "\ntest: " in shown.out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["examples"] == {"train": 20, "validation": 3, "test": 8}
    assert report["drawn_from"] == {"train": 24, "validation": 8}
