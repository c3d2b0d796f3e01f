"""What a task makes of a model's outputs, batch by batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from ptv2_fast.tasks.task import Examples, Features, Task


@dataclass(eq=False)
class BoundTask:
    """A task with the labels of a run, and how its examples become inputs of the run's model.

    Attributes:
        labels: by number, as the head numbers them.
        max_length: tokens of the longest input.
    """

    task: Task
    labels: list[str]
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def featurize(self, examples: Examples, labelled: bool = False) -> Features:
        """What the model reads of examples, and with `labelled` the numbers of their labels."""
        labels = self.labels if labelled else None
        return self.task.featurize(examples, self.tokenizer, labels, self.max_length)


class Predictions:
    """The predictions for features, which come from batches in any order.

    Args:
        run: whose task the features are of.
        features: of which each row goes through the model once.
    """

    def __init__(self, run: BoundTask, features: Features) -> None:
        self.run, self._features = run, features
        self.rows = features.model_inputs(run.tokenizer, run.task.label_columns)
        self._collate = run.task.collator(run.tokenizer)
        self._predicted: list[Any] = [None] * len(features)

    def collate(self, numbers: list[int]) -> Any:
        """Some of the rows as one batch, with labels if there are any."""
        return self._collate([self.rows[number] for number in numbers])

    def inputs(self, batch: Any) -> dict[str, Any]:
        """What of a batch a model takes."""
        labels = self.run.task.label_columns
        return {name: tensor for name, tensor in batch.items() if name not in labels}

    def take(self, numbers: list[int], batch: Any, outputs: Any) -> None:
        """Keep what the task reads in the outputs of a batch."""
        predicted = self.run.task.predictions(outputs, batch, self.run.labels)
        for number, prediction in zip(numbers, predicted, strict=True):
            self._predicted[number] = prediction

    @cached_property
    def results(self) -> list[Any]:
        """One for each example in the task's own terms, once all rows have been taken."""
        return self.run.task.results(self._predicted, self._features, self.run.labels)

    def lines(self) -> Iterator[dict[str, Any]]:
        """One for each example, as it is printed, made when asked for."""
        task, features = self.run.task, self._features
        rows = zip(features.examples.table, self.results, strict=True)
        return (task.describe(row, one, self.run.labels) for row, one in rows)
