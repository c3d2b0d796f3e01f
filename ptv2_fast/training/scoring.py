"""Running a model over examples: predictions in their order, and scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptv2_fast.tasks.sources import file_source
from ptv2_fast.tasks.task import Examples, Features, Task

if TYPE_CHECKING:
    from ptv2_fast.training.models import TrainedRun


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    task: Task,
    features: Features,
    tokenizer: PreTrainedTokenizerBase,
    labels: list[str],
    batch_size: int = 32,
    bf16: bool = False,
) -> list[Any]:
    """The results of `task`, one per example, in order.

    Runs in eval mode, in batches of similar length, and draws nothing from torch's generator.
    """
    rows = features.model_inputs(tokenizer, task.label_columns)
    collate = task.collator(tokenizer)
    order = sorted(range(len(rows)), key=features.lengths.__getitem__, reverse=True)
    predicted: list[Any] = [None] * len(rows)
    was_training = model.training
    model.eval()
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        batch = collate([rows[i] for i in indices]).to(model.device)
        inputs = {name: t for name, t in batch.items() if name not in task.label_columns}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            outputs = model(**inputs)
        for index, prediction in zip(indices, task.predictions(outputs, batch), strict=True):
            predicted[index] = prediction
    model.train(was_training)
    return task.results(predicted, features, labels)


def score(
    model: PreTrainedModel,
    task: Task,
    features: Features,
    tokenizer: PreTrainedTokenizerBase,
    labels: list[str],
    batch_size: int = 32,
    bf16: bool = False,
) -> dict[str, float]:
    """The metrics of `task` on labelled features."""
    results = predict(model, task, features, tokenizer, labels, batch_size, bf16)
    return task.metrics(results, features.examples, labels)


def score_file(run: "TrainedRun", path: Path, batch_size: int = 32) -> dict[str, Any]:
    """The metrics of a trained run on a labelled file, how much of it was seen, and what was odd.

    Raises:
        ValueError: for a missing or malformed file, or a label the run does not know.
    """
    examples = run.task.read(file_source(path))
    features = run.task.featurize(examples, run.tokenizer, run.labels, run.max_length)
    scores = score(run.model, run.task, features, run.tokenizer, run.labels, batch_size)
    counts = {"examples": len(examples), "truncated_examples": features.truncated}
    return scores | counts | ({"remarks": examples.remarks} if examples.remarks else {})


def predict_file(run: "TrainedRun", path: Path, batch_size: int = 32) -> list[dict[str, Any]]:
    """The predictions of a trained run for the examples of a file, as dictionaries.

    Raises:
        ValueError: for a missing or malformed file.
    """
    return _predict_examples(run, run.task.read(file_source(path), labelled=False), batch_size)


def predict_texts(
    run: "TrainedRun", texts: Sequence[str], batch_size: int = 32
) -> list[dict[str, Any]]:
    """The predictions of a trained run for typed texts, as dictionaries.

    Raises:
        ValueError: for a blank text, except where words are labelled, and for one that is no pair
            where the run needs pairs.
    """
    return _predict_examples(run, run.task.from_texts(texts), batch_size)


def _predict_examples(
    run: "TrainedRun", examples: Examples, batch_size: int
) -> list[dict[str, Any]]:
    features = run.task.featurize(examples, run.tokenizer, None, run.max_length)
    results = predict(run.model, run.task, features, run.tokenizer, run.labels, batch_size)
    rows = zip(examples.table, results, strict=True)
    return [run.task.describe(row, one, run.labels) for row, one in rows]
