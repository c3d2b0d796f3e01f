"""The benchmark of scores over time: marks, ratios, what is repeated and what is held out."""

import csv
import json

import pytest

from bench import plot, time_to_score
from bench.step_times import time_steps
from bench.time_to_score import Recipe, Task, make_recipe, run_task, steps_to
from ptv2_fast.recipes import read_recipe
from ptv2_fast.training.options import RunConfig
from tests.models import one_thread  # noqa: F401
from tests.tiny_run import save_tiny_model, write_conll


def test_a_mark_is_reached_on_the_line_between_two_evaluations():
    curve = [(10.0, 0.2), (20.0, 0.6), (30.0, 0.5), (40.0, 0.9)]
    assert steps_to(curve, 0.5) == pytest.approx(17.5)
    assert steps_to(curve, 0.6) == pytest.approx(20)
    assert steps_to(curve, 0.7) == pytest.approx(35)
    assert steps_to(curve, 0.1) == 10 and steps_to(curve, 0.91) is None


def test_recipes_start_from_variants_presets_and_defaults():
    base = {"task": "token-classification", "train_file": "x", "model": "m", "batch_size": 4,
            "max_eval_examples": 9, "dropout": 0.1}  # fmt: skip
    base = RunConfig.from_dict(base).flat()
    variants = {"lora": ({"method": "lora", "lora_rank": 2}, [0.1, 0.2])}
    lora = make_recipe({"from": "lora", "batch_tokens": 512}, base, variants)
    assert (lora.base.model.lora_rank, lora.base.training.batch_size) == (2, None)
    assert lora.rates == [0.1, 0.2]
    preset = make_recipe({"from": "preset-tagging-minilm"}, base, variants)
    shipped = read_recipe("preset-tagging-minilm")
    assert preset.rates == [shipped["learning_rate"]]
    assert preset.base.training.batch_size == shipped["batch_size"]
    assert preset.base.model.model == "m" and preset.base.data.max_eval_examples == 9
    plain = make_recipe({"from": "defaults", "learning_rates": [0.5]}, base, variants)
    assert plain.rates == [0.5] and plain.base.model.dropout is None


@pytest.fixture
def task(tmp_path) -> Task:
    base = {
        "task": "token-classification", "model": save_tiny_model(tmp_path / "model"),
        "train_file": write_conll(tmp_path / "train.txt", 32),
        "validation_file": write_conll(tmp_path / "dev.txt", 8),
        "test_file": write_conll(tmp_path / "test.txt", 8),
        "batch_size": 8, "num_train_epochs": 4, "dropout": 0, "progress": False,
    }  # fmt: skip
    recipes = {
        "fine-tuning": Recipe(RunConfig.from_dict(base | {"method": "fine-tuning"}), [1e-2]),
        "p-tuning-v2": Recipe(
            RunConfig.from_dict(base | {"num_virtual_tokens": 4, "ema_decay": 0.5}), [1e-4, 0.1]
        ),
    }
    return Task(recipes, [11, 12], evaluations=2)


def test_a_finished_run_is_not_repeated_and_its_marks_are_fine_tunings(
    task, tmp_path, monkeypatch, capsys
):
    results = tmp_path / "results" / "time-to-score.csv"
    monkeypatch.setattr(time_to_score, "CSV", results)
    output = tmp_path / "runs"
    time_steps({name: recipe.base for name, recipe in task.recipes.items()}, output / "ner")
    run_task("ner", task, tmp_path, output)
    written = results.read_bytes()
    monkeypatch.setattr(time_to_score, "train", None)  # called, it fails
    run_task("ner", task, tmp_path, output)
    assert results.read_bytes() == written
    with results.open(newline="") as file:
        rows = {tuple(row[name] for name in time_to_score.KEY): row for row in csv.DictReader(file)}
    assert list(rows) == [
        ("ner", "fine-tuning", "0.01", seed) for seed in ("11", "12", "mean")
    ] + [("ner", "p-tuning-v2", "0.0001", "11")] + [
        ("ner", "p-tuning-v2", "0.1", seed) for seed in ("11", "12", "mean")
    ]  # fmt: skip
    for (_, recipe, rate, seed), row in rows.items():
        assert row["chosen"] == str(rate != "0.0001") and row["held out"] == "False"
        if seed == "mean":
            continue
        curve = json.loads(row["curve"])
        assert len(curve) == 2 and row["steps"] == "16"
        assert [steps for steps, _ in curve] == [8, 16]
        assert float(row["train seconds"]) == pytest.approx(16 * float(row["step seconds"]))
        assert max(score for _, score in curve) == pytest.approx(float(row["validation"]), abs=1e-4)
        assert f"--seed {seed}" in row["command"] and "--eval-steps 8" in row["command"]
        if recipe == "fine-tuning":
            ratios = {row[f"to {mark} % / fine-tuning's"] for mark in time_to_score.MARKS}
            assert ratios == {"1.0"} == {row["seconds / fine-tuning's whole"]}
    seeds = [float(rows["ner", "p-tuning-v2", "0.1", seed]["validation"]) for seed in ("11", "12")]
    mean = float(rows["ner", "p-tuning-v2", "0.1", "mean"]["validation"])
    assert mean == pytest.approx(sum(seeds) / 2)
    assert not (output / "ner" / "fine-tuning-lr-0.01-seed-11" / "model").exists()
    assert plot.plot_time_to_score(results).is_file()

    changed = task.recipes["p-tuning-v2"].base.changed({"ema_decay": None})
    task.recipes["p-tuning-v2"] = Recipe(changed, [0.1])
    with pytest.raises(ValueError, match=r"ema_decay 0\.5 against None"):
        run_task("ner", task, tmp_path, output)


def test_two_tasks_are_held_out():
    plan = time_to_score.yaml.safe_load(time_to_score.PLAN.read_text())
    held_out = [name for name, task in plan["tasks"].items() if task.get("held_out")]
    assert held_out == ["trec", "twitter"]
