"""What --dry-run says: labels, metric, options as they hold, steps, time and memory."""

import json

import pytest

from ptv2_fast import cli
from tests.models import one_thread  # noqa: F401
from tests.squad_files import question, write_squad
from tests.tiny_run import save_tiny_model, write_conll, write_reviews


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def plan(capsys, model, folder, task: str, train: str, *more: str) -> dict:
    output = folder / "run"
    command = ["train", "--task", task, "--model", model, "--train-file", train, "--dry-run",
               "--method", "p-tuning-v2", "--num-virtual-tokens", "4", "--output", str(output),
               *more]  # fmt: skip
    assert cli.main(command) == 0
    assert not output.exists()
    return json.loads(capsys.readouterr().out.partition("\n")[2])


def test_words_and_their_labels_are_counted(model, tmp_path, capsys):
    train, dev = write_conll(tmp_path / "train.txt", 24), write_conll(tmp_path / "dev.txt", 8)
    more = ["--validation-file", dev, "--batch-size", "4", "--gradient-accumulation-steps", "4"]
    shown = plan(capsys, model, tmp_path, "token-classification", train, *more)
    assert ": null" not in json.dumps(shown)
    run, training = shown["run"], shown["training"]
    assert run["metric"].startswith("f1 = f1 of whole chunks (labels B-X)")
    assert run["examples"] == {"train": 24, "validation": 8}
    assert run["labels"]["train"] == {"O": 24 * 3 + 2 * 24, "B-PER": 24, "B-LOC": 24}
    # Six batches are two optimizer steps, three times.
    assert run["steps"] == 6 and training["eval_steps"] == training["save_steps"] == 2
    assert (training["num_train_epochs"], shown["data"]["max_length"]) == (3, 24)
    assert training["learning_rate"] == training["head_learning_rate"] > 0
    found = run["estimate"]
    assert found["training_seconds"] == pytest.approx(found["step_seconds"] * 6, abs=0.06)
    assert found["memory_bytes"] > 10_000 and found["scoring_seconds"] >= 0


def test_a_multitask_run_shows_steps_time_and_memory(model, tmp_path, capsys):
    """Of 24 + 12 examples in batches of 4, two to a step: five steps an epoch."""
    config = {
        "model": model, "num_virtual_tokens": 4, "batch_size": 4, "gradient_accumulation_steps": 2,
        "tasks": [
            {"name": name, "task": "token-classification",
             "train_file": write_conll(tmp_path / f"{name}.txt", count),
             "validation_file": write_conll(tmp_path / f"{name}-dev.txt", 4)}
            for name, count in (("first", 24), ("second", 12))
        ],
    }  # fmt: skip
    (tmp_path / "multi.json").write_text(json.dumps(config))
    command = ["multitask", "--config", str(tmp_path / "multi.json"), "--dry-run",
               "--mixed-batches"]  # fmt: skip
    assert cli.main([*command, "--output", str(tmp_path / "run")]) == 0
    shown = json.loads(capsys.readouterr().out.partition("\n")[2])
    run, training = shown["run"], shown["training"]
    assert shown["mixed_batches"] is True
    assert {name: part["batches_per_epoch"] for name, part in run["tasks"].items()} == {
        "first": 6, "second": 3
    }  # fmt: skip
    assert run["tasks"]["second"]["examples"] == {"train": 12, "validation": 4}
    assert run["steps"] == 15 and training["num_train_epochs"] == 3 and training["eval_steps"] == 5
    assert training["learning_rate"] == training["head_learning_rate"] > 0
    assert [table["max_length"] for table in shown["tasks"]] == [24, 24]
    found = run["estimate"]
    assert found["training_seconds"] == pytest.approx(found["step_seconds"] * 15, abs=0.06)
    assert found["memory_bytes"] > 10_000 and found["scoring_seconds"] >= 0
    assert not (tmp_path / "run").exists()


def test_limits_in_steps_and_seconds(model, tmp_path, capsys):
    train = write_reviews(tmp_path / "train.csv", 8)
    shown = plan(capsys, model, tmp_path, "text-classification", train, "--max-steps", "7")
    assert shown["run"]["steps"] == 7
    assert shown["run"]["labels"]["train"] == {"good": 4, "bad": 4}
    shown = plan(capsys, model, tmp_path, "text-classification", train, "--max-seconds", "9")
    assert "steps" not in shown["run"] and "num_train_epochs" not in shown["training"]
    assert shown["run"]["estimate"]["training_seconds"] == 9


def test_numbers_and_questions_are_counted(model, tmp_path, capsys):
    file = tmp_path / "train.csv"
    file.write_text("text,label\na,0.5\nb,0.7\nc,3\n")
    shown = plan(capsys, model, tmp_path, "text-classification", str(file), "--regression")
    assert shown["run"]["labels"]["train"] == {"[0, 1)": 2, "[3, 4)": 1}
    paragraphs = [question(number, number != 1) for number in range(3)]
    file = write_squad(tmp_path / "train.json", paragraphs, "v2.0")
    more = ["--max-length", "20", "--doc-stride", "2"]
    shown = plan(capsys, model, tmp_path, "question-answering", str(file), *more)
    assert shown["run"]["labels"]["train"] == {"answer": 2, "no answer": 1}
