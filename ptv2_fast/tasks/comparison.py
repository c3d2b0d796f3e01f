"""What stands beside the scores of a model: a constant answer's, those of each class, errors."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sklearn.metrics import precision_recall_fscore_support

if TYPE_CHECKING:
    from ptv2_fast.tasks.examples import Examples
    from ptv2_fast.tasks.task import Task

ClassScores = dict[str, dict[str, float]]  # by class, its FIGURES
FIGURES = ("precision", "recall", "f1", "support")
ERROR = ("where", "text", "expected", "answer")
MOST_ERRORS = 100  # that are kept with their texts
_LONGEST = 1000  # characters of such a text


def compare(
    task: "Task", results: list, examples: "Examples", labels: list[str]
) -> dict[str, dict | str]:
    """What helps to judge the scores of results, as far as the task has it.

    Returns:
        baseline: see `baseline`; note: that the results give one answer only, though others are
        right; classes: see `Task.classes`.
    """
    found: dict[str, dict | str] = {}
    if constant := baseline(task, examples, labels):
        found["baseline"] = constant
    said = set(task.answers(results))
    if len(said) == 1 and len(results) > 1 and said != set(task.count_labels(examples)):
        found["note"] = f"predicts only {said.pop()!r}"
    if classes := task.classes(results, examples, labels):
        found["classes"] = classes
    return found


def mistakes(
    task: "Task", results: list, examples: "Examples", labels: list[str]
) -> dict[str, Any]:
    """What results get wrong, JSON-ready.

    Returns:
        wrong: how many; classes: see `Task.classes`; confusion: right label -> given label ->
        how often; errors: the worst of them, each a table of ERROR.
    """
    confusion: dict[str, dict[str, int]] = {}
    if task.has_classes:
        pairs = zip(*task.label_pairs(results, examples), strict=True)
        for (right, given), count in Counter(pairs).items():
            confusion.setdefault(right, {})[given] = count
    sizes, expected = task.error_sizes(results, examples), task.expected(examples)
    wrong = sorted(filter(sizes.__getitem__, range(len(sizes))), key=lambda index: -sizes[index])
    errors = []
    for index in wrong[:MOST_ERRORS]:
        words = task.error_texts(examples.table[index], expected[index], results[index])
        short = [word if len(word) <= _LONGEST else f"{word[:_LONGEST]}…" for word in words]
        errors.append(dict(zip(ERROR, (examples.where(index), *short), strict=True)))
    classes = task.classes(results, examples, labels)
    return {"wrong": len(wrong), "classes": classes, "confusion": confusion, "errors": errors}


def baseline(task: "Task", examples: "Examples", labels: list[str]) -> dict[str, Any]:
    """The `answer` that scores best when it is given always, and its metrics; {} without any."""
    scores = {
        answer: task.metrics(same, examples, labels)
        for answer, same in task.constant_results(examples, labels).items()
    }
    if not scores:
        return {}
    best = max(scores, key=lambda answer: scores[answer][task.metric])
    return {"answer": best, **scores[best]}


def class_scores(
    true: Sequence[str], predicted: Sequence[str], labels: Iterable[str]
) -> ClassScores:
    """Precision, recall, F1 and support of each label that occurs, those of `labels` in front."""
    seen = {*true, *predicted}
    names = [label for label in labels if label in seen]
    names += sorted(seen - set(names))
    scores = precision_recall_fscore_support(true, predicted, labels=names, zero_division=0)
    return by_class(names, scores)


def by_class(names: Sequence[str], scores: Any) -> ClassScores:
    """Arrays of FIGURES, as scikit-learn and seqeval give them, by the name of the class."""
    rows = zip(*(column.tolist() for column in scores), strict=True)
    return {
        name: dict(zip(FIGURES, row, strict=True)) for name, row in zip(names, rows, strict=True)
    }
