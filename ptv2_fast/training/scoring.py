"""Running a model over examples: predictions in their order, and scores."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ptv2_fast.tasks.comparison import compare, mistakes
from ptv2_fast.tasks.sources import TYPED, Part, Source, file_source
from ptv2_fast.tasks.task import Examples, Features, Task
from ptv2_fast.training.models import TaskModel
from ptv2_fast.training.predictions import Predictions
from ptv2_fast.training.progress import scoring_bar


@torch.no_grad()
def run_model(
    run: TaskModel,
    features: Features,
    batch_size: int = 32,
    bf16: bool = False,
    progress: bool | None = None,
) -> Predictions:
    """The predictions of a model.

    Runs in eval mode, in batches of similar length, and draws nothing from torch's generator.
    A bar shows how far it is: with `progress`, or when that is None, on a terminal.
    """
    model, predictions = run.model, Predictions(run, features)
    order = sorted(range(len(features)), key=features.lengths.__getitem__, reverse=True)
    was_training = model.training
    model.eval()
    batches = range(0, len(order), batch_size)
    for first in scoring_bar(batches, features.examples.source.name, progress):
        numbers = order[first : first + batch_size]
        batch = predictions.collate(numbers).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            outputs = model(**predictions.inputs(batch))
        predictions.take(numbers, batch, outputs)
    model.train(was_training)
    return predictions


def score(
    run: TaskModel,
    features: Features,
    batch_size: int = 32,
    bf16: bool = False,
    progress: bool | None = None,
    wrong: dict[str, Any] | None = None,
) -> dict[str, float]:
    """The metrics of the task on labelled features; `wrong` receives what `mistakes` finds."""
    results = run_model(run, features, batch_size, bf16, progress).results
    if wrong is not None:
        wrong |= mistakes(run.task, results, features.examples, run.labels)
    return run.task.metrics(results, features.examples, run.labels)


def evaluate_file(
    run: TaskModel, path: Path, batch_size: int = 32
) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """The scores of a trained run on a labelled file, and its predictions.

    Returns:
        The metrics; how much of the file was seen, and what was odd in it; `baseline`, the metrics
        of the best of the constant answers; `classes`, the figures of each; and `note` where the
        model gives one answer only. And the lines of `predict_file`, with `expected` in each.

    Raises:
        ValueError: for a missing or malformed file, or a label the run does not know.
    """
    task, labels = run.task, run.labels
    examples = task.read(file_source(path))
    features = run.featurize(examples, labelled=True)
    predictions = run_model(run, features, batch_size)
    scores: dict[str, Any] = dict(task.metrics(predictions.results, examples, labels))
    scores |= {"examples": len(examples), "truncated_examples": features.truncated}
    if examples.remarks:
        scores["remarks"] = examples.remarks
    scores |= compare(task, predictions.results, examples, labels)
    pairs = zip(predictions.lines(), task.expected(examples), strict=True)
    return scores, ({**line, "expected": expected} for line, expected in pairs)


def predict_file(run: TaskModel, path: Path, batch_size: int = 32) -> list[dict[str, Any]]:
    """The predictions of a trained run for the examples of a file, as dictionaries.

    Raises:
        ValueError: for a missing or malformed file.
    """
    return _predict_examples(run, run.task.read(file_source(path), labelled=False), batch_size)


def predict_texts(
    run: TaskModel, texts: Sequence[str], batch_size: int = 32
) -> list[dict[str, Any]]:
    """The predictions of a trained run for typed texts, as dictionaries.

    Raises:
        ValueError: for a blank text, except where words are labelled, and for one that is no pair
            where the run needs pairs.
    """
    return _predict_examples(run, run.task.from_texts(texts), batch_size)


def predict_parts(
    run: TaskModel, parts: Iterable[Examples], batch_size: int = 32
) -> Iterator[list[dict[str, Any]]]:
    """The predictions of a trained run for examples that come a part after the other.

    Args:
        parts: of `Task.read_parts`, or of `typed_parts`; no more than one is held.

    Returns:
        Those of each part, as soon as it has run.

    Raises:
        ValueError: when a part cannot be read.
    """
    for examples in parts:
        alone = examples.source.part is None  # else the parts are what a bar shows
        yield _predict_examples(run, examples, batch_size, None if alone else False)


def typed_parts(task: Task, texts: Iterable[str]) -> Iterator[Examples]:
    """Typed texts as examples, a batch of `typed_batches` at a time.

    Raises:
        ValueError: as `Task.from_texts`.
    """
    return (task.from_texts(batch, source) for batch, source in typed_batches(texts))


def typed_batches(texts: Iterable[str]) -> Iterator[tuple[list[str], Source]]:
    """Typed texts, some at a time, each time with a source that numbers them.

    Where nothing is typed that is an empty batch, for the task to refuse.
    """
    remaining, first = iter(texts), 1
    batch = [*itertools.islice(remaining, Task.part_rows)]
    while True:
        yield batch, dataclasses.replace(TYPED, part=Part(range(first, first + len(batch))))
        first += len(batch)
        batch = [*itertools.islice(remaining, Task.part_rows)]
        if not batch:
            return


def _predict_examples(
    run: TaskModel, examples: Examples, batch_size: int, progress: bool | None = None
) -> list[dict[str, Any]]:
    features = run.featurize(examples)
    return [*run_model(run, features, batch_size, progress=progress).lines()]
