"""What stands beside the scores: constant answers, figures of each class, one answer, mistakes."""

import json

import pytest
from datasets import Dataset

from ptv2_fast.tasks import DataOptions, make_task
from ptv2_fast.tasks.comparison import MOST_ERRORS, compare, mistakes
from ptv2_fast.tasks.sources import TYPED
from ptv2_fast.tasks.task import Examples


def compared(options: dict, columns: dict, results: list, labels: list[str]) -> dict:
    examples = Examples(TYPED, Dataset.from_dict(columns))
    return compare(make_task(DataOptions(**options)), results, examples, labels)


def wrong(options: dict, columns: dict, results: list, labels: list[str]) -> dict:
    examples = Examples(TYPED, Dataset.from_dict(columns))
    found = mistakes(make_task(DataOptions(**options)), results, examples, labels)
    return json.loads(json.dumps(found))  # as it is kept


def tagged(*rows: list[str]) -> list[dict]:
    return [{"tags": tags} for tags in rows]


def said(*labels: str) -> list[dict]:
    return [{"label": label, "logits": [0.0, 0.0]} for label in labels]


def test_classes_and_the_most_frequent_label_of_texts():
    found = compared({"task": "text-classification"}, {"label": ["a", "a", "b", "c"]},
                     said("a", "b", "b", "a"), ["c", "b", "a", "d"])  # fmt: skip
    assert found["classes"] == {
        "c": {"precision": 0, "recall": 0, "f1": 0, "support": 1},
        "b": {"precision": 0.5, "recall": 1, "f1": pytest.approx(2 / 3), "support": 1},
        "a": {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2},
    }
    assert found["baseline"] == {"answer": "a", "accuracy": 0.5, "f1": pytest.approx(2 / 9)}
    assert "note" not in found


def test_a_model_of_one_answer_is_called_that():
    options, labels = {"task": "text-classification"}, ["bad", "good"]
    found = compared(options, {"label": ["good", "bad"]}, said("bad", "bad"), labels)
    assert found["note"] == "predicts only 'bad'"
    assert "note" not in compared(options, {"label": ["bad", "bad"]}, said("bad", "bad"), labels)
    assert "note" not in compared(options, {"label": ["good"]}, said("bad"), labels)


def test_the_constant_answer_is_the_one_that_the_metric_likes_best():
    """MultiRC's F1 is that of "1", which is the rarer label."""
    columns = {"label": ["0", "0", "0", "1"], "group": ["x", "x", "y", "y"]}
    found = compared({"task": "multirc"}, columns, said("0", "0", "0", "0"), ["0", "1"])
    assert found["baseline"] == {"answer": "1", "f1a": pytest.approx(0.4), "em": 0}
    assert found["note"] == "predicts only '0'"


def test_chunks_are_classes_by_their_type_and_words_by_their_label():
    words, tags = [["w"] * 4, ["w"]], [["B-PER", "I-PER", "O", "O"], ["B-LOC"]]
    outside = [["O"] * 4, ["O"]]
    columns = {"words": words, "tags": tags}
    found = compared({"task": "token-classification"}, columns, tagged(*outside),
                     ["B-LOC", "B-PER", "I-PER", "O"])  # fmt: skip
    none = {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    assert found["classes"] == {"LOC": none, "PER": none}
    assert found["baseline"] == {"answer": "O", "accuracy": 0.4, "precision": 0, "recall": 0,
                                 "f1": 0}  # fmt: skip
    assert found["note"] == "predicts only 'O'"
    columns["tags"] = outside
    found = compared({"task": "token-classification"}, columns, tagged(*outside), ["B-LOC", "O"])
    assert "classes" not in found and "note" not in found
    columns["tags"] = [["N", "V", "V", "V"], ["N"]]
    results = tagged(*columns["tags"])
    found = compared({"task": "token-classification"}, columns, results, ["N", "V"])
    assert {name: figures["support"] for name, figures in found["classes"].items()} == {
        "N": 2, "V": 3
    }  # fmt: skip
    assert found["baseline"]["answer"] == "V" and found["baseline"]["accuracy"] == 0.6


def test_numbers_have_their_mean_and_questions_no_answer_as_constants():
    numbers = {"task": "text-classification", "regression": True}
    found = compared(numbers, {"label": ["1", "4"]}, [{"score": 2.0}, {"score": 2.0}], ["score"])
    assert found == {
        "baseline": {"answer": "2.5", "pearson": 0, "spearmanr": 0},
        "note": "predicts only '2'",
    }
    questions = {"task": "question-answering", "unanswerable": True}
    columns = {"answers": [["Oslo"], []]}
    found = compared(questions, columns, [{"text": ""}, {"text": ""}], ["start", "end"])
    assert found["baseline"]["answer"] == "no answer" and found["baseline"]["em"] == 0.5
    assert found["note"] == "predicts only 'no answer'" and "classes" not in found
    answered = {"task": "question-answering", "unanswerable": False}
    columns = {"answers": [["Oslo"], ["Rome"]]}
    assert compared(answered, columns, [{"text": "Oslo"}, {"text": ""}], ["start", "end"]) == {}


def test_mistakes_name_who_was_taken_for_whom_and_the_surest_error_first():
    columns = {"text": ["w", "x", "y", "z"], "text_pair": ["1", "2", "3", "4"],
               "label": ["a", "a", "b", "c"]}  # fmt: skip
    logits = [[2.0, 0.0], [1.0, 3.0], [0.0, 9.0], [5.0, 0.0]]
    results = [{"label": "ab"[own.index(max(own))], "logits": own} for own in logits]
    found = wrong({"task": "text-classification"}, columns, results, ["a", "b", "c"])
    assert found["wrong"] == 2
    assert found["confusion"] == {"a": {"a": 1, "b": 1}, "b": {"b": 1}, "c": {"a": 1}}
    assert found["classes"]["a"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert found["errors"] == [
        {"where": "typed row 4", "text": "z | 4", "expected": "c", "answer": "a"},
        {"where": "typed row 2", "text": "x | 2", "expected": "a", "answer": "b"},
    ]


def test_mistakes_with_their_texts_are_no_more_than_is_said_and_no_longer():
    count = MOST_ERRORS + 7
    columns = {"text": ["word " * 999] * count, "label": ["a"] * count}
    found = wrong({"task": "text-classification"}, columns, said(*"b" * count), ["a", "b"])
    assert (found["wrong"], len(found["errors"])) == (count, MOST_ERRORS)
    assert found["confusion"] == {"a": {"b": count}}
    assert len(found["errors"][0]["text"]) == 1000 + len("…")


def test_mistakes_of_words_choices_numbers_and_answers():
    tags = [["B-PER", "O", "O"], ["O", "B-LOC"], ["O"]]
    given = tagged(["B-PER", "O", "O"], ["B-LOC", "O"], ["B-LOC"])
    columns = {"words": [["Ann", "is", "in"], ["in", "Rome"], ["in"]], "tags": tags}
    found = wrong({"task": "token-classification"}, columns, given, ["B-LOC", "B-PER", "O"])
    assert found["wrong"] == 2 and found["classes"]["PER"]["f1"] == 1
    assert found["confusion"] == {"B-PER": {"B-PER": 1}, "O": {"O": 2, "B-LOC": 2},
                                  "B-LOC": {"O": 1}}  # fmt: skip
    assert [*found["errors"][0].values()][1:] == ["in Rome", "in O, Rome B-LOC", "in B-LOC, Rome O"]

    columns = {"text": ["Why?"], "choices": [["so", "thus"]], "label": ["1"]}
    found = wrong({"task": "multiple-choice"}, columns, said("0"), ["0", "1"])
    assert [*found["errors"][0].values()][1:] == ["Why? | so | thus", "thus", "so"]

    numbers = {"task": "text-classification", "regression": True}
    columns = {"text": ["x", "y", "z"], "label": ["1", "4", "2"]}
    results = [{"score": 1.5}, {"score": 2.0}, {"score": 2.0}]
    found = wrong(numbers, columns, results, ["score"])
    assert (found["wrong"], found["classes"], found["confusion"]) == (2, {}, {})
    assert [*found["errors"][0].values()][1:] == ["y", "4", "2"]

    questions = {"task": "question-answering", "unanswerable": True}
    columns = {"question": ["where?", "who?", "when?"],
               "answers": [["in Oslo", "Oslo"], [], ["1066"]]}  # fmt: skip
    results = [{"text": "Oslo!"}, {"text": "Ann"}, {"text": "in 1066"}]
    found = wrong(questions, columns, results, ["start", "end"])
    assert (found["wrong"], found["classes"], found["confusion"]) == (2, {}, {})
    assert [[*error.values()][1:] for error in found["errors"]] == [
        ["who?", "no answer", "Ann"], ["when?", "1066", "in 1066"]
    ]  # fmt: skip
