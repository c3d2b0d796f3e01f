"""The benchmark of scores over time: marks, ratios, what is repeated and what is held out."""

import dataclasses
import json
import shutil

import pytest

from bench import plot, time_to_score
from bench.score_rows import KEY, MARKS, read_rows, steps_to
from bench.step_times import compare_turns, time_steps
from bench.time_to_score import ComparedRecipe, ComparedTask, make_recipe, write_rows
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
def task(tmp_path) -> ComparedTask:
    base = {
        "task": "token-classification", "model": save_tiny_model(tmp_path / "model"),
        "train_file": write_conll(tmp_path / "train.txt", 32),
        "validation_file": write_conll(tmp_path / "dev.txt", 8),
        "test_file": write_conll(tmp_path / "test.txt", 8),
        "batch_size": 8, "num_train_epochs": 4, "dropout": 0, "progress": False,
    }  # fmt: skip
    recipes = {
        "fine-tuning": ComparedRecipe(
            RunConfig.from_dict(base | {"method": "fine-tuning"}), [1e-2]
        ),
        "p-tuning-v2": ComparedRecipe(
            RunConfig.from_dict(base | {"num_virtual_tokens": 4, "ema_decay": 0.5}), [1e-4, 0.1]
        ),
    }
    return ComparedTask("ner", recipes, [11, 12], evaluations=2, data=tmp_path)


def test_steps_are_compared_within_a_turn_whatever_the_speed_of_the_machine():
    found = compare_turns({"fine-tuning": [1.0, 4.0, 2.0], "preset": [0.5, 2.0, 3.0]})
    assert found["fine-tuning"] == {"step seconds": 2.0, "step ratios": "[1.0, 1.0, 1.0]"}
    assert found["preset"] == {"step seconds": 1.0, "step ratios": "[0.5, 0.5, 1.5]"}


def test_a_finished_run_is_not_repeated_and_its_marks_are_fine_tunings(
    task, tmp_path, monkeypatch, capsys
):
    results = tmp_path / "results" / "time-to-score.csv"
    monkeypatch.setattr(time_to_score, "CSV", results)
    output = tmp_path / "runs"
    runs = list(task.run(output))
    assert len(runs) == 5 and all((output / "ner" / run / "report.json").is_file() for run in runs)
    assert not (output / "ner" / "fine-tuning-lr-0.01-seed-11" / "model").exists()
    seconds = time_steps({name: recipe.base for name, recipe in task.recipes.items()})
    write_rows(task, output, [], seconds)
    written = results.read_bytes()
    shutil.rmtree(output / "ner" / runs[0])  # the row alone says that it is finished
    assert list(task.run(output)) == []
    assert results.read_bytes() == written
    rows = {tuple(row[name] for name in KEY): row for row in read_rows(results)}
    assert list(rows) == [("ner", "fine-tuning", 0.01, seed) for seed in (11, 12, "mean")] + [
        ("ner", "p-tuning-v2", 0.0001, 11)
    ] + [("ner", "p-tuning-v2", 0.1, seed) for seed in (11, 12, "mean")]
    for (_, recipe, rate, seed), row in rows.items():
        assert row["chosen"] is (rate != 0.0001) and row["held out"] is False
        if seed == "mean":
            continue
        curve = json.loads(row["curve"])
        assert len(curve) == 2 and row["steps"] == 16
        assert [steps for steps, _ in curve] == [8, 16]
        assert row["step seconds"] == seconds[recipe]["step seconds"]
        assert row["train seconds"] == pytest.approx(16 * row["step seconds"])
        assert max(score for _, score in curve) == pytest.approx(row["validation"], abs=1e-4)
        assert f"--seed {seed}" in row["command"] and "--eval-steps 8" in row["command"]
        if recipe == "fine-tuning":
            reached = {row[f"to {mark} % / fine-tuning's"] for mark in MARKS}
            assert reached == {1.0} == {row["seconds / fine-tuning's whole"]}
        else:
            assert row["seconds / fine-tuning's whole"] == pytest.approx(
                row["step seconds"] / seconds["fine-tuning"]["step seconds"]
            )
    seeds = [rows["ner", "p-tuning-v2", 0.1, seed]["validation"] for seed in (11, 12)]
    assert rows["ner", "p-tuning-v2", 0.1, "mean"]["validation"] == pytest.approx(sum(seeds) / 2)

    # Steps that were timed on different machines give no ratio.
    write_rows(task, output, [], {"p-tuning-v2": {"step seconds": 1.0, "timed on": "another"}})
    other = next(row for row in read_rows(results) if row["recipe"] == "p-tuning-v2")
    assert other["train seconds"] == 16 and other["seconds / fine-tuning's whole"] is None
    assert plot.plot_time_to_score(results).is_file()

    # The file's order is not that of the processes that write it.
    earlier = [row | {"task": "chunks"} for row in rows.values()]
    write_rows(dataclasses.replace(task, name="chunks"), output, earlier)
    assert [row["task"] for row in read_rows(results)] == 7 * ["chunks"] + 7 * ["ner"]

    changed = task.recipes["p-tuning-v2"].base.changed({"ema_decay": None})
    task.recipes["p-tuning-v2"] = ComparedRecipe(changed, [0.1])
    with pytest.raises(ValueError, match=r"ema_decay 0\.5 against None"):
        list(task.run(output))


def test_two_tasks_are_held_out():
    plan = time_to_score.yaml.safe_load(time_to_score.PLAN.read_text())
    held_out = [name for name, task in plan["tasks"].items() if task.get("held_out")]
    assert held_out == ["trec", "twitter"]
