"""What tasks share whose examples have one label or one number each."""

from abc import ABC
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ptv2_fast.tasks.task import Examples, Task
from ptv2_fast.tasks.text_metrics import scores, titles


class OneLabel(Task, ABC):
    """A row's logits are kept, and the figures are those of text_metrics.py, by name."""

    def predictions(
        self, outputs: Any, batch: dict[str, Tensor], labels: Sequence[str]
    ) -> list[list[float]]:
        return outputs.logits.float().tolist()

    def metrics(self, results: list, examples: Examples, labels: list[str]) -> dict[str, float]:
        return scores(self.figures, self.options.task, results, examples.table, labels)

    def titles(self, labels: list[str]) -> dict[str, str]:
        return titles(self.figures, self.options.task)
