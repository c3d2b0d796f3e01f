"""Running a model over examples: predictions in their order, and scores."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptv2_fast.tasks.comparison import compare, mistakes
from ptv2_fast.tasks.sources import file_source
from ptv2_fast.tasks.table_parts import text_parts
from ptv2_fast.tasks.task import Examples, Features, Task
from ptv2_fast.training.progress import scoring_bar

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
    progress: bool | None = None,
) -> list[Any]:
    """The results of `task`, one per example, in order.

    Runs in eval mode, in batches of similar length, and draws nothing from torch's generator.
    A bar shows how far it is: with `progress`, or when that is None, on a terminal.
    """
    rows = features.model_inputs(tokenizer, task.label_columns)
    collate = task.collator(tokenizer)
    order = sorted(range(len(rows)), key=features.lengths.__getitem__, reverse=True)
    predicted: list[Any] = [None] * len(rows)
    was_training = model.training
    model.eval()
    batches = range(0, len(order), batch_size)
    for first in scoring_bar(batches, features.examples.source.name, progress):
        indices = order[first : first + batch_size]
        batch = collate([rows[i] for i in indices]).to(model.device)
        inputs = {name: t for name, t in batch.items() if name not in task.label_columns}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            outputs = model(**inputs)
        found = task.predictions(outputs, batch, labels)
        for index, prediction in zip(indices, found, strict=True):
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
    progress: bool | None = None,
    wrong: dict[str, Any] | None = None,
) -> dict[str, float]:
    """The metrics of `task` on labelled features; `wrong` receives what `mistakes` finds."""
    results = predict(model, task, features, tokenizer, labels, batch_size, bf16, progress)
    if wrong is not None:
        wrong |= mistakes(task, results, features.examples, labels)
    return task.metrics(results, features.examples, labels)


def evaluate_file(
    run: "TrainedRun", path: Path, batch_size: int = 32
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
    features = task.featurize(examples, run.tokenizer, labels, run.max_length)
    results, lines = _describe(run, features, batch_size)
    scores: dict[str, Any] = dict(task.metrics(results, examples, labels))
    scores |= {"examples": len(examples), "truncated_examples": features.truncated}
    if examples.remarks:
        scores["remarks"] = examples.remarks
    scores |= compare(task, results, examples, labels)
    pairs = zip(lines, task.expected(examples), strict=True)
    return scores, ({**line, "expected": expected} for line, expected in pairs)


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


def predict_parts(
    run: "TrainedRun", parts: Iterable[Examples], batch_size: int = 32
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
    """Typed texts as examples, `part_rows` of the task at a time.

    Raises:
        ValueError: as `Task.from_texts`.
    """
    for part, source in text_parts(texts, task.part_rows):
        yield task.from_texts(part, source)


def _predict_examples(
    run: "TrainedRun", examples: Examples, batch_size: int, progress: bool | None = None
) -> list[dict[str, Any]]:
    features = run.task.featurize(examples, run.tokenizer, None, run.max_length)
    return list(_describe(run, features, batch_size, progress)[1])


def _describe(
    run: "TrainedRun", features: Features, batch_size: int, progress: bool | None = None
) -> tuple[list[Any], Iterator[dict[str, Any]]]:
    """The results of the examples, and how they are printed, made when asked for."""
    task, labels = run.task, run.labels
    results = predict(
        run.model, task, features, run.tokenizer, labels, batch_size, progress=progress
    )
    rows = zip(features.examples.table, results, strict=True)
    return results, (task.describe(row, one, labels) for row, one in rows)
