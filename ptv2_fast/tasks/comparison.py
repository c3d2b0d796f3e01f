"""What stands beside the scores of a model: a constant answer's, and those of each class."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sklearn.metrics import precision_recall_fscore_support

if TYPE_CHECKING:
    from ptv2_fast.tasks.task import Examples, Task

FIGURES = ("precision", "recall", "f1", "support")


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

    def classes(
        self, results: list, examples: "Examples", labels: list[str]
    ) -> dict[str, dict[str, float]]:
        """Precision, recall, F1 and support (how often it is right) of each class, if any."""
        return label_figures(self.expected(examples), self.answers(results), labels)


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
    names = [label for label in labels if label in seen]
    names += sorted(seen - set(names))
    figures = precision_recall_fscore_support(true, predicted, labels=names, zero_division=0)
    rows = zip(*(column.tolist() for column in figures), strict=True)
    return {
        name: dict(zip(FIGURES, row, strict=True)) for name, row in zip(names, rows, strict=True)
    }
