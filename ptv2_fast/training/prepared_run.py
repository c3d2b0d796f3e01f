"""A run that is ready to train: one model and the data sets that train it, often one alone."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ptv2_fast.tasks.task import Features
from ptv2_fast.training import run_folder
from ptv2_fast.training.models import TaskModel
from ptv2_fast.training.multitask.config import MultiTaskConfig
from ptv2_fast.training.multitask.heads import TaskHeads
from ptv2_fast.training.order import Batching
from ptv2_fast.training.predictions import Predictions


@dataclasses.dataclass(eq=False)
class RunPart(TaskModel):
    """A data set of a run, with the run's model, which `PreparedRun.activate` gives its head.

    Attributes:
        features: by split: "train", "validation", "test".
        folder: where its model is saved.
    """

    features: dict[str, Features]
    folder: Path

    @property
    def metadata(self) -> dict[str, Any]:
        """What config.json keeps beside the options."""
        return {"labels": self.labels, "max_length": self.max_length, **self.task.learnt}

    def loss(self, features: Features, indices: list[int], bf16: bool) -> Tensor:
        """That of some rows as one batch, on the model's device."""
        device = self.model.device
        batch = Predictions(self, features).collate(indices).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return self.model(**batch).loss


@dataclasses.dataclass(eq=False)
class PreparedRun:
    """A run that is ready to train; nothing has been written yet.

    Attributes:
        parts: its data sets by name; that of a run of one task has the name "".
        heads: one for each data set; None in a run of one task, whose model keeps its own.
        batches: of each data set in an epoch.
        started_from: what `warm_start` says.
    """

    config: run_folder.Config
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    parts: dict[str, RunPart]
    heads: TaskHeads | None
    batches: list[int]
    arguments: TrainingArguments
    folder: Path
    resume: bool
    overwrite: bool
    started_from: dict[str, Any] | None

    @property
    def part(self) -> RunPart:
        """The data set of a run of one task."""
        (only,) = self.parts.values()
        return only

    def activate(self, number: int) -> None:
        """From now on the model has the head of the data set of this number."""
        if self.heads is not None:
            self.heads.activate(number)

    def active_parts(self) -> Iterator[tuple[str, RunPart]]:
        """The data sets by name, while the model has their heads; afterwards it has the first."""
        for number, (name, part) in enumerate(self.parts.items()):
            self.activate(number)
            yield name, part
        self.activate(0)

    @property
    def mixed_batches(self) -> bool:
        """Whether a batch may hold rows of several data sets."""
        return isinstance(self.config, MultiTaskConfig) and self.config.mixed_batches

    @property
    def train_lengths(self) -> list[list[int]]:
        """The lengths of the training rows of each data set, by which batches are made."""
        batching = Batching.of(self.config.training)
        return [batching.lengths_of(part.features["train"]) for part in self.parts.values()]

    @property
    def metadata(self) -> dict[str, Any]:
        """What config.json keeps beside the options."""
        started_from = {} if self.started_from is None else {"started_from": self.started_from}
        if self.heads is None:
            return self.part.metadata | started_from
        parts = self.parts.items()
        labels = {name: part.labels for name, part in parts}
        max_length = {name: part.max_length for name, part in parts}
        return {"labels": labels, "max_length": max_length, **started_from}
