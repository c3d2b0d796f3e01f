"""Texts of several adapters in one batch, and what each task makes of its part of the results."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ptv2_fast.tasks.task import Examples, Features, Task


@dataclass(frozen=True)
class AdapterRun:
    """What the run of an adapter says about its texts.

    Attributes:
        max_length: tokens of the longest text.
    """

    task: Task
    labels: list[str]
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def features(self, examples: Examples) -> Features:
        """What the encoder reads of examples, without their labels."""
        return self.task.featurize(examples, self.tokenizer, None, self.max_length)


class Batch(NamedTuple):
    """Rows of one adapter.

    `columns`: as the task's collator makes them. `inputs`: those that a model takes, [rows, T],
    with a row for each choice. `choices`: of each row, None where there are none.
    """

    columns: dict[str, Tensor]
    inputs: dict[str, Tensor]
    choices: int | None


class Pooled:
    """The examples of one adapter among those of others.

    Args:
        name: of the adapter.
        run: it comes from.
        features: of the examples, by `run.features`.
    """

    def __init__(self, name: str, run: AdapterRun, features: Features) -> None:
        self.name, self.run, self._features = name, run, features
        task, tokenizer = run.task, run.tokenizer
        self.rows = list(features.model_inputs(tokenizer, task.label_columns))
        self._collate = task.collator(tokenizer)
        self._predicted: list[Any] = [None] * len(self.rows)

    def sort_key(self, number: int) -> tuple[int, list[int]]:
        """By length, then by tokens."""
        ids = self.rows[number]["input_ids"]
        if ids and isinstance(ids[0], list):
            return max(map(len, ids)), [token for choice in ids for token in choice]
        return len(ids), ids

    def batch(self, numbers: list[int]) -> Batch:
        """Some of the rows."""
        columns = dict(self._collate([self.rows[number] for number in numbers]))
        names = [name for name in columns if name not in self.run.task.label_columns]
        inputs = {name: columns[name] for name in names}
        choices = None
        if inputs["input_ids"].dim() == 3:
            choices = inputs["input_ids"].shape[1]
            inputs = {name: tensor.flatten(0, 1) for name, tensor in inputs.items()}
        return Batch(columns, inputs, choices)

    def take(self, numbers: list[int], batch: Batch, results: list[Tensor]) -> None:
        """Keep what the task reads in the results of a batch, one for each row of its inputs."""
        task, labels = self.run.task, self.run.labels
        found = task.predictions(_as_outputs(results, batch), batch.columns, labels)
        for number, prediction in zip(numbers, found, strict=True):
            self._predicted[number] = prediction

    def lines(self) -> list[dict[str, Any]]:
        """One result for each example, as it is printed."""
        return [line for _, line in self.results()]

    def results(self) -> list[tuple[Any, dict[str, Any]]]:
        """One for each example in the task's own terms, and as it is printed."""
        task, labels, features = self.run.task, self.run.labels, self._features
        results = task.results(self._predicted, features, labels)
        rows = zip(features.examples.table, results, strict=True)
        return [(one, task.describe(row, one, labels)) for row, one in rows]


def join_batches(
    batches: Sequence[tuple[Pooled, list[int], Batch]],
) -> tuple[dict[str, Tensor], list[str]]:
    """The inputs of all batches as one, padded on the right, and the adapter of each row."""
    names = dict.fromkeys(name for _, _, batch in batches for name in batch.inputs)
    joined = {}
    for name in names:
        parts = []
        for _, _, batch in batches:
            ids = batch.inputs["input_ids"]
            parts.append(batch.inputs.get(name, torch.zeros_like(ids)))
        pads = [0] * len(parts)
        if name == "input_ids":
            pads = [pooled.run.tokenizer.pad_token_id for pooled, _, _ in batches]
        joined[name] = join_rows(parts, pads)
    owners = [
        pooled.name for pooled, _, batch in batches for _ in range(len(batch.inputs["input_ids"]))
    ]
    return joined, owners


def join_rows(parts: Sequence[Tensor], pads: Sequence[int]) -> Tensor:
    """Tensors [rows, T] of several batches as one, padded on the right to the longest.

    Args:
        parts: one of each batch.
        pads: what each is padded with.
    """
    longest = max(part.shape[1] for part in parts)
    padded = [
        nn.functional.pad(part, (0, longest - part.shape[1]), value=pad)
        for part, pad in zip(parts, pads, strict=True)
    ]
    return torch.cat(padded)


def _as_outputs(results: list[Tensor], batch: Batch) -> Any:
    """The results of rows as a model gives them for their batch, with padding."""
    results = [result.cpu() for result in results]
    if results[0].dim() < 2:
        logits = torch.stack(results)
        return SimpleNamespace(
            logits=logits if batch.choices is None else logits.view(-1, batch.choices)
        )
    length = batch.inputs["input_ids"].shape[1]
    lowest = torch.finfo(results[0].dtype).min
    logits = torch.stack(
        [nn.functional.pad(row, (0, 0, 0, length - len(row)), value=lowest) for row in results]
    )
    start, end = logits[..., 0], logits[..., -1]
    return SimpleNamespace(logits=logits, start_logits=start, end_logits=end)
