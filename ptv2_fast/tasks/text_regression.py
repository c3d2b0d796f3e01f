"""One number for a text or for a pair of texts."""

import math
import statistics
from collections import Counter
from typing import Any

from ptv2_fast.tasks.examples import Examples
from ptv2_fast.tasks.features import Features
from ptv2_fast.tasks.task import Result
from ptv2_fast.tasks.text_classification import TextClassification

_OUTPUT = "score"


class TextRegression(TextClassification):
    """Columns as of TextClassification, with numbers as labels; trained with the squared error.

    A result is {"score"}.
    """

    default_metrics = ("pearson", "spearmanr")
    has_classes = False

    def find_labels(self, examples: Examples) -> list[str]:
        """The name of the one output; transformers takes one output for a number to be learnt.

        Raises:
            ValueError: naming the row whose label is no number.
        """
        self.check_labels(examples, [_OUTPUT])
        return [_OUTPUT]

    def count_labels(self, examples: Examples) -> Counter[str]:
        """How many numbers lie between each two whole ones."""
        numbers = (math.floor(float(label)) for _, label in self.labels_of(examples))
        return Counter(f"[{number}, {number + 1})" for number in numbers)

    def check_labels(self, examples: Examples, labels: list[str]) -> None:
        """Check that every label is a number.

        Raises:
            ValueError: naming the row and the label.
        """
        for index, label in self.labels_of(examples):
            if _as_number(label) is None:
                raise examples.error(index, "a number as label", label)

    def label_column(
        self, rows: dict[str, list], label_numbers: dict[str, int] | None
    ) -> list[float]:
        if label_numbers is None:
            return [0.0] * len(rows["text"])
        return [float(label) for label in rows["label"]]

    def results(self, predicted: list, features: Features, labels: list[str]) -> list[Result]:
        return [{_OUTPUT: logits[0]} for logits in predicted]

    def expected(self, examples: Examples) -> list[float]:
        return [float(label) for label in examples.table["label"][:]]

    def answers(self, results: list) -> list[str]:
        """To six digits: a model that always gives one number differs in the last."""
        return [f"{result[_OUTPUT]:.6g}" for result in results]

    def constant_results(self, examples: Examples, labels: list[str]) -> dict[str, list[Any]]:
        """The mean."""
        mean = statistics.fmean(self.expected(examples))
        return {f"{mean:.6g}": [{_OUTPUT: mean}] * len(examples)}

    def error_sizes(self, results: list, examples: Examples) -> list[float]:
        """The distance from what is right."""
        pairs = zip(self.expected(examples), results, strict=True)
        return [abs(number - result[_OUTPUT]) for number, result in pairs]

    def error_texts(self, example: dict, expected: float, result: Any) -> tuple[str, str, str]:
        text, *_ = super().error_texts(example, "", {"label": ""})
        return text, f"{expected:.6g}", f"{result[_OUTPUT]:.6g}"


def _as_number(label: Any) -> float | None:
    """A finite number, or text that spells one; else None."""
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        return None
    try:
        number = float(label)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
