"""What stands beside the scores of a model: a constant answer's, those of each class, errors."""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sklearn.metrics import precision_recall_fscore_support

if TYPE_CHECKING:
    from ptv2_fast.tasks.task import Examples, Task

FIGURES = ("precision", "recall", "f1", "support")
ERROR = ("where", "text", "expected", "answer")
MOST_ERRORS = 100  # that are kept with their texts
_LONGEST = 1000  # characters of such a text


class Compared(ABC):
    """What `compare` asks of a task; as it stands, of one that gives an example one label."""

    @abstractmethod
    def count_labels(self, examples: "Examples") -> Counter[str]:
        """How often each label occurs."""

    def expected(self, examples: "Examples") -> list[Any]:
        """What is right for each example, in the form in which results are printed."""
        return [str(label) for label in examples.table["label"][:]]

    def answers(self, results: list) -> list[str]:
        """The labels that results give, one behind the other."""
        return [result["label"] for result in results]

    def constants(self, examples: "Examples", labels: list[str]) -> dict[str, list[Any]]:
        """By answer, the results that always give it, for the most frequent two."""
        return {
            answer: [{"label": answer, "logits": [float(label == answer) for label in labels]}]
            * len(examples)
            for answer, _ in self.count_labels(examples).most_common(2)
        }

    def pairs(self, results: list, examples: "Examples") -> tuple[list[str], list[str]]:
        """The right labels and those that are given, one behind the other; empty without any."""
        return self.expected(examples), self.answers(results)

    def classes(
        self, results: list, examples: "Examples", labels: list[str]
    ) -> dict[str, dict[str, float]]:
        """Precision, recall, F1 and support (how often it is right) of each class, if any."""
        return label_figures(*self.pairs(results, examples), labels)

    def losses(self, results: list, examples: "Examples") -> list[float]:
        """How wrong each result is: 0 = right; here by how sure of the wrong label it is."""
        right = map(str.__eq__, self.expected(examples), self.answers(results))
        return [
            0.0 if is_right else share(result["logits"])
            for is_right, result in zip(right, results, strict=True)
        ]

    def shown(self, example: dict, expected: Any, result: Any) -> tuple[str, str, str]:
        """An example for a reader: its text, what is right, what the result says."""
        texts = (example.get(name) for name in ("text", "text_pair"))
        return " | ".join(text for text in texts if text), expected, result["label"]


def compare(
    task: "Task", results: list, examples: "Examples", labels: list[str]
) -> dict[str, dict | str]:
    """What helps to judge the scores of results, as far as the task has it.

    Returns:
        baseline: see `baseline`; note: that the results give one answer only, though others are
        right; classes: see `Compared.classes`.
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
        wrong: how many; classes: see `Compared.classes`; confusion: right label -> given label ->
        how often; errors: the worst of them, each a table of ERROR.
    """
    confusion: dict[str, dict[str, int]] = {}
    pairs = zip(*task.pairs(results, examples), strict=True)
    for (right, given), count in Counter(pairs).items():
        confusion.setdefault(right, {})[given] = count
    losses, expected = task.losses(results, examples), task.expected(examples)
    wrong = sorted(filter(losses.__getitem__, range(len(losses))), key=lambda index: -losses[index])
    errors = []
    for index in wrong[:MOST_ERRORS]:
        words = task.shown(examples.table[index], expected[index], results[index])
        short = [word if len(word) <= _LONGEST else f"{word[:_LONGEST]}…" for word in words]
        errors.append(dict(zip(ERROR, (examples.where(index), *short), strict=True)))
    classes = task.classes(results, examples, labels)
    return {"wrong": len(wrong), "classes": classes, "confusion": confusion, "errors": errors}


def baseline(task: "Task", examples: "Examples", labels: list[str]) -> dict[str, Any]:
    """The `answer` that scores best when it is given always, and its metrics; {} without any."""
    scores = {
        answer: task.metrics(same, examples, labels)
        for answer, same in task.constants(examples, labels).items()
    }
    if not scores:
        return {}
    best = max(scores, key=lambda answer: scores[answer][task.metric])
    return {"answer": best, **scores[best]}


def label_figures(
    true: Sequence[str], predicted: Sequence[str], labels: Iterable[str]
) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support of each label that occurs, those of `labels` in front."""
    seen = {*true, *predicted}
    if not seen:
        return {}
    names = [label for label in labels if label in seen]
    names += sorted(seen - set(names))
    figures = precision_recall_fscore_support(true, predicted, labels=names, zero_division=0)
    rows = zip(*(column.tolist() for column in figures), strict=True)
    return {
        name: dict(zip(FIGURES, row, strict=True)) for name, row in zip(names, rows, strict=True)
    }


def share(logits: list[float]) -> float:
    """The probability of the largest logit."""
    best = max(logits)
    return 1 / math.fsum(math.exp(logit - best) for logit in logits)
