"""Published figures against counts made by hand."""

import math

import pytest
from datasets import Dataset

from ptv2_fast.tasks.benchmarks import BENCHMARKS
from ptv2_fast.tasks.text_metrics import scores

NO_YES = ["0", "1"]


def figures(data_set: str, predicted: list, labels: list[str] = NO_YES, **columns):
    """The published figures of a data set for predicted labels, or logits of "1"."""
    if data_set == "record":
        results = [{"label": "0", "logits": [0.0, logit]} for logit in predicted]
    else:
        results = [{"label": label} for label in predicted]
    names = BENCHMARKS[data_set].metrics
    return scores(names, data_set, results, Dataset.from_dict(columns), labels)


def test_accuracy_and_the_mean_of_each_labels_f1():
    labels = ["contradiction", "entailment", "neutral"]
    # Entailment: 1 of 1 found, 2 named: 2/3. Contradiction: 1 of 2 found, 1 named: 2/3.
    true = ["entailment", "contradiction", "contradiction", "neutral"]
    predicted = ["entailment", "entailment", "contradiction", "neutral"]
    assert figures("cb", predicted, labels, label=true) == {
        "accuracy": 0.75, "f1": pytest.approx((2 / 3 + 2 / 3 + 1) / 3),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["mrpc", "qqp"])
def test_f1_of_paraphrases_is_that_of_the_label_1(name):
    # 2 of 3 found, 3 named.
    scored = figures(name, ["1", "1", "0", "1"], label=["1", "1", "1", "0"])
    assert scored == {"accuracy": 0.5, "f1": pytest.approx(2 / 3)}
    assert figures(name, ["0", "0"], label=["0", "0"])["f1"] == 0.0


def test_matthews_correlation():
    # 2 true positives, 1 true negative, 1 false positive, 0 false negatives.
    scored = figures("cola", ["1", "1", "1", "0"], label=["1", "1", "0", "0"])
    assert scored["matthews_correlation"] == pytest.approx(2 / math.sqrt(3 * 2 * 2 * 1))
    assert figures("cola", ["1", "1"], label=["1", "0"])["matthews_correlation"] == 0.0


def test_multirc_counts_answers_and_whole_questions():
    """One wrong answer spoils its question."""
    scored = figures(
        "multirc", ["1", "0", "1", "1", "0"],
        label=["1", "0", "1", "0", "0"], group=["0 0", "0 0", "0 1", "0 1", "1 2"],
    )  # fmt: skip
    # Answers: 2 of 2 found, 3 named. Questions: the second of three is wrong.
    assert scored == {"f1a": pytest.approx(2 * 2 / (2 + 3)), "em": pytest.approx(2 / 3)}


def test_record_scores_the_best_entity_of_each_query_against_any_answer():
    answers = [["Ann Lee", "Lee"], ["Oslo"], ["Bob"]]
    scored = figures(
        "record", [0.1, 0.9, -3.0, -2.0, 5.0, 4.0],
        group=["0", "0", "1", "1", "2", "2"],
        entity=["Lee", "the Ann", "Oslo", "Berlin", "bob", "Ann"],
        answers=[answers[0]] * 2 + [answers[1]] * 2 + [answers[2]] * 2,
        label=["1", "0", "1", "0", "1", "0"],
    )  # fmt: skip
    # "the Ann" shares one of one word with the two of "Ann Lee"; Berlin is wrong; bob is Bob.
    assert scored == {"f1": pytest.approx((2 / 3 + 0 + 1) / 3), "em": pytest.approx(1 / 3)}


def test_correlations():
    results = [{"score": score} for score in (1.0, 2.0, 4.0)]
    table = Dataset.from_dict({"label": [0.0, 1.0, 1.5]})
    scored = scores(("pearson", "spearmanr"), None, results, table, ["score"])
    # Deviations from the means 7/3 and 5/6: sum of products 13/6, of squares 14/3 and 7/6.
    expected = (13 / 6) / math.sqrt((14 / 3) * (7 / 6))
    assert scored == {"pearson": pytest.approx(expected), "spearmanr": pytest.approx(1.0)}
    constant = [{"score": 1.0}] * 3
    assert scores(("pearson", "spearmanr"), None, constant, table, ["score"]) == {
        "pearson": 0.0, "spearmanr": 0.0,
    }  # fmt: skip
