"""Metrics of tasks whose examples have one label or one number each, by name."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from ptv2_fast.tasks.answer_metrics import exact_match, token_f1

# Takes results ({"label", "logits"}, or {"score"}), the examples' columns, and the label names.
Metric = Callable[[list[dict[str, Any]], Dataset, list[str]], float]

_POSITIVE = "1"


def scores(
    names: Sequence[str],
    data_set: str | None,
    results: list[dict[str, Any]],
    table: Dataset,
    labels: list[str],
) -> dict[str, float]:
    """The named metrics.

    Args:
        names: as in `Benchmark.metrics`.
        data_set: a published one, where a name may mean something of its own; None = a user's.
        results: one per row of `table`.
        table: the column label, and what the metrics of that data set need.
        labels: names in the order of the logits.
    """
    functions = _METRICS | _OF_DATA_SET.get(data_set, {})
    return {name: float(functions[name](results, table, labels)) for name in names}


def titles(names: Sequence[str], data_set: str | None) -> dict[str, str]:
    """What the named metrics are, in a sentence each."""
    functions = _METRICS | _OF_DATA_SET.get(data_set, {})
    return {name: (functions[name].__doc__ or "").removesuffix(".") for name in names}


def accuracy(results: list[dict[str, Any]], table: Dataset, labels: list[str]) -> float:
    """Of all examples, the part whose label is right."""
    return accuracy_score(*_labels(results, table))


def macro_f1(results: list[dict[str, Any]], table: Dataset, labels: list[str]) -> float:
    """Macro F1: the mean of the F1 of each label that occurs, as truth or as prediction."""
    return f1_score(*_labels(results, table), average="macro", zero_division=0)


def positive_f1(results: list[dict[str, Any]], table: Dataset, labels: list[str]) -> float:
    """F1 of the label "1" over all examples."""
    positive = [_POSITIVE]
    return f1_score(*_labels(results, table), labels=positive, average="macro", zero_division=0)


def matthews_correlation(results: list[dict[str, Any]], table: Dataset, labels: list[str]) -> float:
    """Matthews' correlation of predicted and true labels; 0 where one of them never changes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A single label was found")
        return matthews_corrcoef(*_labels(results, table))


def question_match(results: list[dict[str, Any]], table: Dataset, labels: list[str]) -> float:
    """Of all groups, the part whose examples all have the right label (MultiRC's EM)."""
    right: dict[str, list[bool]] = defaultdict(list)
    for group, expected, predicted in zip(table["group"], *_labels(results, table), strict=True):
        right[group].append(expected == predicted)
    return sum(map(all, right.values())) / len(right)


def entity_f1(results: list[dict[str, Any]], table: Dataset, labels: list[str]) -> float:
    """The mean over groups of the token F1 of the entity chosen in each (ReCoRD)."""
    return _mean_of_chosen(token_f1, results, table, labels)


def entity_match(results: list[dict[str, Any]], table: Dataset, labels: list[str]) -> float:
    """The part of the groups whose chosen entity is an answer (ReCoRD's EM)."""
    return _mean_of_chosen(exact_match, results, table, labels)


def pearson(results: list[dict[str, Any]], table: Dataset, labels: list[str]) -> float:
    """Pearson's correlation of predicted and true numbers; 0 where one of them never changes."""
    return _correlation(pearsonr, results, table)


def spearman(results: list[dict[str, Any]], table: Dataset, labels: list[str]) -> float:
    """Spearman's correlation of predicted and true numbers; 0 where one of them never changes."""
    return _correlation(spearmanr, results, table)


_METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": macro_f1,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
    "spearmanr": spearman,
}
# What a name means in one data set.
_OF_DATA_SET: dict[str | None, dict[str, Metric]] = {
    "mrpc": {"f1": positive_f1},
    "qqp": {"f1": positive_f1},
    "multirc": {"f1a": positive_f1, "em": question_match},
    "record": {"f1": entity_f1, "em": entity_match},
}


def _labels(results: list[dict[str, Any]], table: Dataset) -> tuple[list[str], list[str]]:
    """True and predicted labels."""
    expected = [str(label) for label in table["label"][:]]
    return expected, [result["label"] for result in results]


def _mean_of_chosen(
    measure: Callable[[str, Sequence[str]], float],
    results: list[dict[str, Any]],
    table: Dataset,
    labels: list[str],
) -> float:
    """The mean of a measure of the entity with the largest logit of "1" in each group."""
    positive = labels.index(_POSITIVE)
    chosen: dict[str, tuple[float, str, list[str]]] = {}
    columns = (table[name][:] for name in ("group", "entity", "answers"))
    for result, group, entity, answers in zip(results, *columns, strict=True):
        logit = result["logits"][positive]
        if group not in chosen or logit > chosen[group][0]:
            chosen[group] = (logit, entity, answers)
    return sum(measure(entity, answers) for _, entity, answers in chosen.values()) / len(chosen)


def _correlation(
    function: Callable[..., Any], results: list[dict[str, Any]], table: Dataset
) -> float:
    expected = [float(number) for number in table["label"][:]]
    predicted = [result["score"] for result in results]
    if len(set(expected)) < 2 or len(set(predicted)) < 2:
        return 0.0
    return function(expected, predicted).statistic
