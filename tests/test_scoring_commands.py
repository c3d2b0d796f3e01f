"""ptv2-fast eval and predict, of a trained run."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ptv2_fast import cli
from tests.command_line import (
    LOADING,
    fails_with_one_line,
    save_tiny,
    train_tiny,
)
from tests.models import one_thread  # noqa: F401
from tests.tiny_run import tagged_sentences


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str]:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    return train_tiny(tiny, tmp_path_factory.mktemp("runs") / "ner")


def test_eval_gives_the_score_of_the_report(trained, tiny, capsys):
    assert cli.main(["eval", "--run", str(trained), "--data", tiny["dev"]]) == 0
    printed = capsys.readouterr()
    scores = json.loads(printed.out)
    report = json.loads((trained / "report.json").read_text())
    assert f"f1: {report['metric_title']}" in printed.err
    assert "whole chunks" in report["metric_title"]
    expected = report["metrics"]["validation"] | {"examples": 8, "truncated_examples": 0}
    assert scores.items() >= expected.items()


def test_eval_sets_a_constant_answer_and_each_class_beside_the_score(
    trained, tiny, tmp_path, capsys
):
    command = ["eval", "--run", str(trained), "--data", tiny["dev"]]
    file = tmp_path / "predictions.jsonl"
    assert cli.main([*command, "--output", str(file)]) == 0
    scores = json.loads(capsys.readouterr().out)
    words = sum(len(sentence) for sentence in tagged_sentences(8))
    assert scores["baseline"] == {
        "answer": "O", "accuracy": 1 - 2 * 8 / words, "precision": 0, "recall": 0, "f1": 0
    }  # fmt: skip
    assert list(scores["classes"]) == ["LOC", "PER"]
    assert {figures["support"] for figures in scores["classes"].values()} == {8}
    assert scores["classes"]["PER"]["f1"] > 0.9 and "note" not in scores
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["expected"] for line in lines] == [
        [tag for _, tag in sentence] for sentence in tagged_sentences(8)
    ]
    capsys.readouterr()
    assert cli.main(["predict", "--run", str(trained), "--data", tiny["dev"]]) == 0
    predicted = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line | {"expected": []} for line in lines] == [p | {"expected": []} for p in predicted]
    before = file.read_bytes()
    line = fails_with_one_line([*command, "--output", str(file)], capsys)
    assert "output: expected a new file" in line and file.read_bytes() == before


def test_predict_says_how_sure_it_is_and_where_the_words_stand(trained, capsys):
    text = "  Anna  lives in\tOslo, e\u0301te\u0301."
    assert cli.main(["predict", "--run", str(trained), "--text", text]) == 0
    line = json.loads(capsys.readouterr().out)
    assert [text[start:end] for start, end in line["offsets"]] == line["words"]
    assert len(line["scores"]) == len(line["tags"]) == 7
    assert all(1 / 3 < score < 1 for score in line["scores"])
    person, place = line["entities"]
    assert text[person["start"] : person["end"]] == "Anna" and person["score"] == line["scores"][0]
    assert text[place["start"] : place["end"]] == "Oslo" and place["score"] == line["scores"][3]


def test_predict_tags_typed_sentences_and_files_without_labels(trained, tmp_path, capsys):
    command = ["predict", "--run", str(trained)]
    assert cli.main([*command, "--text", "Anna lives in Oslo."]) == 0
    typed = json.loads(capsys.readouterr().out)
    assert [(e["type"], e["text"]) for e in typed["entities"]] == [("PER", "Anna"), ("LOC", "Oslo")]
    file = tmp_path / "plain.txt"
    file.write_text("Anna\nlives\nin\nOslo\n.\n")
    assert cli.main([*command, "--data", str(file)]) == 0
    # The words of a file stand in a text with a blank between each two.
    typed["offsets"][-1] = [19, 20]
    assert json.loads(capsys.readouterr().out) == typed


def test_predict_warns_of_scripts_without_blanks_in_one_line(trained):
    command = ["-m", "ptv2_fast.cli", "predict", "--run", str(trained), "--text", "\u6211" * 9]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    loading, note = done.stderr.splitlines()
    assert loading == LOADING and note.startswith("note: typed text 1: words are cut at blanks")


def test_predict_answers_each_line_of_stdin(trained, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffAnna lives in Oslo.\r\n\nBob\n"))
    assert cli.main(["predict", "--run", str(trained)]) == 0
    lines = [json.loads(line)["words"] for line in capsys.readouterr().out.splitlines()]
    assert lines == [["Anna", "lives", "in", "Oslo", "."], [], ["Bob"]]


def test_predict_reads_and_writes_long_files_in_parts(trained, tmp_path, capsys, monkeypatch):
    """The same lines as of one whole file, in its order; a bad line comes after what is good."""
    from ptv2_fast.tasks.token_classification import TokenClassification

    sentences = [[word for word, _ in sentence] for sentence in tagged_sentences(7)]
    lines = [json.dumps({"tokens": words}) for words in sentences]
    file, output = tmp_path / "long.jsonl", tmp_path / "out.jsonl"
    file.write_text("\n".join(lines))
    command = ["predict", "--run", str(trained), "--batch-size", "1", "--data"]
    assert cli.main([*command, str(file)]) == 0
    whole = capsys.readouterr().out
    assert [json.loads(line)["words"] for line in whole.splitlines()] == sentences
    monkeypatch.setattr(TokenClassification, "part_rows", 2)
    assert cli.main([*command, str(file)]) == 0
    assert capsys.readouterr().out == whole
    table = "tokens\n" + "".join(f"{' '.join(words)}\n" for words in sentences)
    for text, options in (("\n\n".join(lines), []), (table, ["--data-format", "csv"])):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert cli.main([*command, "-", *options]) == 0
        assert capsys.readouterr().out == whole
    assert cli.main([*command, str(file), "--output", str(output)]) == 0
    assert output.read_text() == whole and capsys.readouterr().out == ""
    line = fails_with_one_line([*command, str(file), "--output", str(output)], capsys)
    assert "output: expected a new file" in line
    output.unlink()
    file.write_text("\n".join([*lines, "{"]))
    assert cli.main([*command, str(file)]) == cli.BAD_INPUT
    printed = capsys.readouterr()
    assert printed.out.splitlines() == whole.splitlines()[:6]
    assert "line 8: broken JSON" in printed.err
    fails_with_one_line([*command, str(file), "--output", str(output)], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["long.jsonl"]
