"""Texts of several adapters in one batch, and what each task makes of its part of the results."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptv2_fast.tasks.task import Features
from ptv2_fast.training.predictions import BoundTask, Predictions


class Batch(NamedTuple):
    """Rows of one adapter.

    `columns`: as the task's collator makes them. `inputs`: those that a model takes, [rows, T],
    with a row for each choice. `choices`: of each row, None where there are none.
    """

    columns: dict[str, Tensor]
    inputs: dict[str, Tensor]
    choices: int | None


class AdapterExamples(Predictions):
    """The examples of one adapter among those of others, and what is predicted for them.

    Args:
        name: of the adapter.
        run: that it comes from.
        features: of the examples, by `run.featurize`.
    """

    def __init__(self, name: str, run: BoundTask, features: Features) -> None:
        super().__init__(run, features)
        self.name, self.rows = name, list(self.rows)

    def sort_key(self, number: int) -> tuple[int, list[int]]:
        """By length, then by tokens."""
        ids = self.rows[number]["input_ids"]
        if ids and isinstance(ids[0], list):
            return max(map(len, ids)), [token for choice in ids for token in choice]
        return len(ids), ids

    def batch(self, numbers: list[int]) -> Batch:
        """Some of the rows."""
        columns = dict(self.collate(numbers))
        inputs, choices = self.inputs(columns), None
        if inputs["input_ids"].dim() == 3:
            choices = inputs["input_ids"].shape[1]
            inputs = {name: tensor.flatten(0, 1) for name, tensor in inputs.items()}
        return Batch(columns, inputs, choices)

    def take_rows(self, numbers: list[int], batch: Batch, rows: list[Tensor]) -> None:
        """Keep what the task reads in the results of a batch, one for each row of its inputs."""
        self.take(numbers, batch.columns, _as_outputs(rows, batch))


def join_batches(
    batches: Sequence[tuple[AdapterExamples, list[int], Batch]],
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
            pads = [part.run.tokenizer.pad_token_id for part, _, _ in batches]
        joined[name] = join_rows(parts, pads)
    owners = [
        part.name for part, _, batch in batches for _ in range(len(batch.inputs["input_ids"]))
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
