"""Multi-task P-Tuning v2: one prefix for the data sets of a family, and a head for each.

The first stage of the paper's MPT-2; the second trains on one data set with the option start_from.
Any other method works too: what it adds is shared.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ptv2_fast.encoders.checkpointing import checkpoint_activations
from ptv2_fast.tasks.task import Features
from ptv2_fast.training import run_folder
from ptv2_fast.training.clock import StepClock
from ptv2_fast.training.divergence import require_finite
from ptv2_fast.training.methods import prefix_config, prepare_model
from ptv2_fast.training.models import load_pretrained, save_trained
from ptv2_fast.training.multitask.config import MultiTaskConfig
from ptv2_fast.training.multitask.heads import TaskHeads, take_head
from ptv2_fast.training.multitask.order import CombinedRows, MultiTaskOrder, batches_per_epoch
from ptv2_fast.training.multitask.shared_pass import SharedPass, call_as_forward, check_shared_pass
from ptv2_fast.training.order import Batching
from ptv2_fast.training.output import is_first, wait_for_all
from ptv2_fast.training.prepare import (
    Prepared,
    choose_max_length,
    read_data,
    training_arguments,
)
from ptv2_fast.training.run import (
    checkpoint_of,
    describe_data,
    describe_training,
    pace,
    score_splits,
)
from ptv2_fast.training.scoring import score
from ptv2_fast.training.start import find_starts, start_from
from ptv2_fast.training.trainer import PacedTrainer

MEAN = "mean"  # of the data sets' selecting metrics
_PARTS = "parts"  # of a batch: the rows of each data set in it, behind its number


@dataclasses.dataclass
class PreparedTasks:
    """A multi-task run that is ready to train; nothing has been written yet.

    Attributes:
        parts: the data sets by name; they share the model, the tokenizer and the arguments.
        batches: of each data set in an epoch.
    """

    config: MultiTaskConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heads: TaskHeads
    parts: dict[str, Prepared]
    batches: list[int]
    arguments: TrainingArguments
    folder: Path
    resume: bool
    overwrite: bool
    started_from: dict[str, Any] | None

    @property
    def found(self) -> dict[str, Any]:
        """What config.json keeps beside the options."""
        found = {
            "labels": {name: part.labels for name, part in self.parts.items()},
            "max_length": {name: part.max_length for name, part in self.parts.items()},
        }
        return found if self.started_from is None else {**found, "started_from": self.started_from}


def prepare_tasks(
    config: MultiTaskConfig, folder: Path, *, resume: bool = False, overwrite: bool = False
) -> PreparedTasks:
    """Check the folder, read all data, load the model and attach what the method trains.

    Args:
        config: the run.
        folder: where `train_tasks` will write.
        resume: go on with the run in the folder.
        overwrite: delete the run in the folder when training starts.

    Raises:
        ValueError, OSError: for any bad input.
    """
    run_folder.check_output(folder, resume, overwrite)
    if config.model.method == "p-tuning-v2":
        prefix_config(config.model)  # a bad prefix is known before the data is read
    find_starts(config.model)
    singles = config.singles()
    data = {name: read_data(single) for name, single in singles.items()}

    set_seed(config.training.seed)
    # Every head is made as for its data set alone; all but the first one's encoder is dropped.
    model, heads = None, []
    for task, _, labels in data.values():
        loaded, tokenizer = load_pretrained(config.model, task, labels)
        if config.mixed_batches:
            check_shared_pass(loaded)
        heads.append(take_head(loaded))
        model = model or loaded
    assert model is not None
    switch = TaskHeads(model, heads)
    lengths = {name: choose_max_length(s.data, model, s.model) for name, s in singles.items()}
    features = {
        name: {
            split: task.featurize(part, tokenizer, labels, lengths[name])
            for split, part in examples.items()
        }
        for name, (task, examples, labels) in data.items()
    }
    train = [parts["train"] for parts in features.values()]
    prepare_model(model, config.model, _token_ids(train))
    started_from = start_from(model, config.model, None)
    if config.training.gradient_checkpointing:
        checkpoint_activations(model)

    batching, sizes = Batching.of(config.training), [len(part) for part in train]
    row_lengths = [batching.lengths_of(part) for part in train]
    together = batching.count([length for part in row_lengths for length in part])
    batches = batches_per_epoch(sizes, together, config.temperature)
    scored = any("validation" in parts for parts in features.values())
    first = next(iter(singles.values()))
    order = MultiTaskOrder(row_lengths, batches, batching, seed=0)
    metric = MEAN if scored else None
    arguments = training_arguments(first, folder, len(order), sum(batches), metric)
    # A batch does not reach every head; transformers' own choice depends on checkpointing.
    arguments.ddp_find_unused_parameters = True
    parts = {
        name: Prepared(
            singles[name], task, model, tokenizer, labels, lengths[name], features[name], arguments,
            run_folder.single_folder(folder, name), resume, overwrite,
        )
        for name, (task, _, labels) in data.items()
    }  # fmt: skip
    prepared = PreparedTasks(
        config, model, tokenizer, switch, parts, batches, arguments, folder, resume, overwrite,
        started_from,
    )  # fmt: skip
    if resume:
        run_folder.check_same_run(folder, config, prepared.found)
    return prepared


def _token_ids(train: list[Features]) -> datasets.Dataset:
    """The token ids of all training examples, to start a prefix from."""
    return datasets.concatenate_datasets([part.table.select_columns("input_ids") for part in train])


class MultiTaskTrainer(PacedTrainer):
    """A Trainer whose batches go through the heads of the data sets that they are from.

    Args:
        prepared: the run.
        settings: the arguments of `PacedTrainer` beside model and data.
    """

    def __init__(self, prepared: PreparedTasks, **settings: Any) -> None:
        self.prepared = prepared
        self.collators = [
            part.task.collator(prepared.tokenizer) for part in prepared.parts.values()
        ]
        tables = [
            part.features["train"].model_inputs(prepared.tokenizer, part.task.label_columns)
            for part in prepared.parts.values()
        ]
        super().__init__(
            prepared.model,
            prepared.arguments,
            rows=CombinedRows(tables),
            collate=self.collate,
            **settings,
        )

    def collate(self, rows: list[tuple[int, dict[str, Any]]]) -> Any:
        """The batch of each data set, behind its number."""
        rows_of: dict[int, list[dict[str, Any]]] = {}
        for number, row in rows:
            rows_of.setdefault(number, []).append(row)
        if len(rows_of) > 1 and not self.prepared.config.mixed_batches:
            raise RuntimeError(f"a batch holds rows of the data sets {sorted(rows_of)}")
        return {_PARTS: [(n, self.collators[n](own)) for n, own in sorted(rows_of.items())]}

    def _get_train_sampler(self, train_dataset: Any = None) -> MultiTaskOrder:
        batching = Batching.of(self.prepared.config.training)
        parts = self.prepared.parts.values()
        lengths = [batching.lengths_of(part.features["train"]) for part in parts]
        if self.batch_tokens is None:
            batching = Batching(self.args.train_batch_size, None)
        is_mixed = self.prepared.config.mixed_batches
        return MultiTaskOrder(lengths, self.prepared.batches, batching, self.args.seed, is_mixed)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The losses of the heads of the batch's data sets, each by its part of the rows."""
        parts = inputs[_PARTS]
        if len(parts) == 1:
            ((number, batch),) = parts
            self.prepared.heads.activate(number)
            return super().compute_loss(model, batch, *args, **kwargs)
        if model is self.model:
            return self._mixed_loss(parts)
        own = cast(PreTrainedModel, self.model)
        return call_as_forward(model, own, lambda: self._mixed_loss(parts))

    def _mixed_loss(self, parts: Sequence[tuple[int, Any]]) -> Tensor:
        model = cast(PreTrainedModel, self.model)
        rows = [len(batch["input_ids"]) for _, batch in parts]
        losses: list[Tensor] = []
        pad = cast(int, self.prepared.tokenizer.pad_token_id)
        with SharedPass(model, [batch for _, batch in parts], pad) as shared:
            for shared.turn, (number, batch) in enumerate(parts):
                self.prepared.heads.activate(number)
                losses.append(cast(Tensor, super().compute_loss(model, batch)))
        weighted = [count * loss for count, loss in zip(rows, losses, strict=True)]
        return torch.stack(weighted).sum() / sum(rows)

    def floating_point_ops(self, inputs: Any) -> int:
        """As Trainer's, of all parts of a batch."""
        of_part = super().floating_point_ops
        return sum(of_part(batch) for _, batch in inputs[_PARTS])

    def scores(self) -> dict[str, dict[str, float]]:
        """See `PacedTrainer`."""
        scores = {}
        for number, (name, part) in enumerate(self.prepared.parts.items()):
            if "validation" in part.features:
                self.prepared.heads.activate(number)
                scores[name] = score(
                    cast(PreTrainedModel, self.model), part.task, part.features["validation"],
                    part.tokenizer, part.labels, self.args.eval_batch_size, self.args.bf16,
                    self.progress, self.mistakes_of(name),
                )  # fmt: skip
        return scores

    def summary(self, scores: dict[str, dict[str, float]]) -> dict[str, float]:
        """The mean of the metrics that select."""
        parts = self.prepared.parts
        return {MEAN: statistics.fmean(own[parts[n].task.metric] for n, own in scores.items())}


def train_tasks(
    prepared: PreparedTasks, callbacks: list[TrainerCallback] | None = None
) -> dict[str, Any]:
    """Train, save what was trained once for each data set, score it and write the report.

    Args:
        prepared: the run; its model is the trained one afterwards.
        callbacks: further callbacks of Trainer.

    Returns:
        The report, as in report.json.

    Raises:
        DivergedError: when the training loss or what was trained becomes infinite or NaN.
    """
    config, folder = prepared.config, prepared.folder
    with run_folder.begun(
        folder, config, prepared.found, resume=prepared.resume, overwrite=prepared.overwrite
    ):
        clock = StepClock(config.training.max_seconds, config.training.eval_seconds)
        trainer = MultiTaskTrainer(prepared, **pace(config.training, clock, folder, callbacks))
        trainer.train(resume_from_checkpoint=checkpoint_of(prepared))
        require_finite(prepared.model)
        if is_first():
            for number in range(len(prepared.parts)):
                _save_single(prepared, number)
        wait_for_all()
        report, mistakes = _report(prepared, clock, trainer)
        if is_first():
            run_folder.finish(folder, report, mistakes)
        return report


def _save_single(prepared: PreparedTasks, number: int) -> None:
    """Write the model of one data set as a run of that data set is written."""
    part = list(prepared.parts.values())[number]
    found = {**part.found, "trained_with": list(prepared.parts)}
    run_folder.write_config(part.folder, part.config, found)
    part.tokenizer.save_pretrained(part.folder / run_folder.TOKENIZER)
    with prepared.heads.alone(number) as model:
        save_trained(model, part.config.model.method, part.folder)


def _report(
    prepared: PreparedTasks, clock: StepClock, trainer: MultiTaskTrainer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What report.json and mistakes.json say."""
    known, known_mistakes = trainer.final_scores, trainer.final_mistakes
    metrics: dict[str, Any] = {}
    mistakes: dict[str, Any] = {}
    data: dict[str, dict[str, Any]] = {}
    tasks: dict[str, dict[str, Any]] = {}
    for number, (name, part) in enumerate(prepared.parts.items()):
        prepared.heads.activate(number)
        scores, wrong = score_splits(part, known.get(name), known_mistakes.get(name))
        metrics |= {f"{name}/{split}": own for split, own in scores.items()}
        mistakes |= {f"{name}/{split}": own for split, own in wrong.items()}
        for key, values in describe_data(part).items():
            data.setdefault(key, {}).update({f"{name}/{s}": v for s, v in values.items()})
        tasks[name] = {
            "task": part.config.data.task,
            "metric": part.task.metric,
            "metric_title": part.task.titles(part.labels)[part.task.metric],
            "labels": len(part.labels),
            "batches_per_epoch": prepared.batches[number],
        }
    prepared.heads.activate(0)
    first = next(iter(prepared.parts.values()))
    report = {
        "task": first.config.data.family,
        "tasks": tasks,
        "temperature": prepared.config.temperature,
        "mixed_batches": prepared.config.mixed_batches,
        "metric": MEAN,
        "metrics": metrics,
        "saved_bytes": sum(run_folder.saved_bytes(p.folder) for p in prepared.parts.values()),
        "started_from": prepared.started_from,
        **data,
        **describe_training(first, clock, trainer.state.global_step),
    }
    return report, mistakes
