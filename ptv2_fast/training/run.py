"""Training of a prepared run, and its report."""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

import ptv2_fast
from ptv2_fast.encoders import get_nb_trainable_parameters
from ptv2_fast.encoders.adapter_files import AVERAGE_NAME
from ptv2_fast.tasks.comparison import baseline
from ptv2_fast.training import run_folder
from ptv2_fast.training.callbacks import (
    FindBestCheckpoint,
    MetricsFile,
    StepClock,
    StopWhenDiverged,
    require_finite,
)
from ptv2_fast.training.checkpoints import last_checkpoint
from ptv2_fast.training.machine import describe_machine
from ptv2_fast.training.measure import kept_bytes, peak_memory_bytes
from ptv2_fast.training.models import save_trained
from ptv2_fast.training.multitask.config import MultiTaskConfig
from ptv2_fast.training.order import Batching
from ptv2_fast.training.output import is_first, wait_for_all
from ptv2_fast.training.prepared_run import PreparedRun, RunPart
from ptv2_fast.training.scoring import score
from ptv2_fast.training.trainer import MEAN, TaskTrainer


def train(run: PreparedRun, callbacks: Sequence[TrainerCallback] | None = None) -> dict[str, Any]:
    """Train, save what was trained, score it and write the report.

    Args:
        run: its model is the trained one afterwards.
        callbacks: further callbacks of Trainer.

    Returns:
        The report, as in report.json.

    Raises:
        DivergedError: when the training loss or what was trained becomes infinite or NaN.
        ValueError: when another process has taken the folder since it was checked.
    """
    options, folder = run.config.training, run.folder
    with run_folder.locked_run(
        folder, run.config, run.metadata, resume=run.resume, overwrite=run.overwrite
    ):
        if is_first() and run.heads is None:  # what opens its checkpoints needs it
            run.tokenizer.save_pretrained(folder / run_folder.TOKENIZER)
        clock = StepClock(options.max_seconds, options.eval_seconds)
        trainer = TaskTrainer(run, clock, [
            StopWhenDiverged(), FindBestCheckpoint(), MetricsFile(folder / run_folder.METRICS),
            *(callbacks or ()),
        ])  # fmt: skip
        trainer.train(resume_from_checkpoint=_checkpoint_of(run))
        require_finite(run.model)
        if is_first():
            _save(run)
        wait_for_all()
        report, mistakes = _report(run, trainer)
        if is_first():
            run_folder.finish(folder, report, mistakes)
        return report


def _checkpoint_of(run: PreparedRun) -> str | None:
    """The checkpoint from which a resumed run goes on; None = from the beginning."""
    if not run.resume:
        return None
    checkpoint = last_checkpoint(
        run.folder / run_folder.CHECKPOINTS,
        run.arguments.world_size,
        run.arguments.load_best_model_at_end,
        (AVERAGE_NAME,) if run.config.training.ema_decay else (),
    )
    return None if checkpoint is None else str(checkpoint)


def _save(run: PreparedRun) -> None:
    """Write what was trained; of several data sets each as the run of that one is written."""
    method = run.config.model.method
    if run.heads is None:
        save_trained(run.model, method, run.folder)
        return
    for number, part in enumerate(run.parts.values()):
        metadata = {**part.metadata, "trained_with": list(run.parts)}
        run_folder.write_config(part.folder, part.config, metadata)
        part.tokenizer.save_pretrained(part.folder / run_folder.TOKENIZER)
        with run.heads.alone(number) as model:
            save_trained(model, method, part.folder)


def _report(run: PreparedRun, trainer: TaskTrainer) -> tuple[dict[str, Any], dict[str, Any]]:
    """What report.json and mistakes.json say.

    Names of splits have that of their data set in front where there are several.
    """
    metrics: dict[str, Any] = {}
    mistakes: dict[str, Any] = {}
    data: dict[str, dict[str, Any]] = {}
    for name, part in run.active_parts():
        scores, wrong = _score_splits(run, part, trainer.final_scores(name))
        for table, own in ((metrics, scores), (mistakes, wrong)):
            table |= _with_name(name, own)
        for key, own in _describe_data(part).items():
            data.setdefault(key, {}).update(_with_name(name, own))
    report = {
        **_describe_task(run),
        "metrics": metrics,
        "saved_bytes": sum(run_folder.saved_bytes(part.folder) for part in run.parts.values()),
        "started_from": run.started_from,
        **data,
        **_describe_training(run, trainer),
    }
    return report, mistakes


def _with_name(name: str, splits: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}/{split}" if name else split: value for split, value in splits.items()}


def _describe_task(run: PreparedRun) -> dict[str, Any]:
    """The task, or the family of several, and by which metric it selects."""
    tasks: dict[str, dict[str, Any]] = {
        name: {
            "task": part.config.data.task,
            "metric": part.task.metric,
            "metric_title": part.task.titles(part.labels)[part.task.metric],
        }
        for name, part in run.parts.items()
    }
    if not isinstance(run.config, MultiTaskConfig):
        return tasks[""]
    for (name, part), batches in zip(run.parts.items(), run.batches, strict=True):
        tasks[name] |= {"labels": len(part.labels), "batches_per_epoch": batches}
    return {
        "task": run.config.tasks[0].family,
        "tasks": tasks,
        "temperature": run.config.temperature,
        "mixed_batches": run.config.mixed_batches,
        "metric": MEAN,
    }


def _score_splits(
    run: PreparedRun, part: RunPart, known: tuple[dict[str, float], dict[str, Any]] | None
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Any]]]:
    """The metrics of every split but the training data, and what `mistakes` finds there.

    Args:
        part: whose head is active.
        known: both for the validation split, when it has been scored.
    """
    options = run.config.training
    metrics, wrong = {}, {}
    if known is not None:
        metrics["validation"], wrong["validation"] = known
    for name, features in part.features.items():
        if name != "train" and name not in metrics:
            wrong[name] = {}
            metrics[name] = score(
                part, features, options.eval_batch_size, options.bf16, options.progress, wrong[name]
            )
    return metrics, {name: own for name, own in wrong.items() if own}


def _describe_data(part: RunPart) -> dict[str, dict[str, Any]]:
    """What report.json says about the examples, and of a constant answer to them, by split."""
    features = part.features.items()
    return {
        "examples": {name: len(f.examples) for name, f in features},
        "drawn_from": {n: f.examples.drawn_from for n, f in features if f.examples.drawn_from},
        "truncated_examples": {name: f.truncated for name, f in features},
        "remarks": {name: f.examples.remarks for name, f in features if f.examples.remarks},
        "baselines": {
            name: constant
            for name, f in features
            if name != "train" and (constant := baseline(part.task, f.examples, part.labels))
        },
    }


def _describe_training(run: PreparedRun, trainer: TaskTrainer) -> dict[str, Any]:
    """What report.json says about the model, the method, time and memory."""
    model, clock = run.model, trainer.clock
    trainable, total = get_nb_trainable_parameters(model)
    return {
        "method": run.config.model.method,
        "model": run.config.model.model,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "steps": trainer.state.global_step,
        "train_seconds": clock.seconds,
        "step_seconds": statistics.median(clock.step_seconds) if clock.step_seconds else None,
        "kept_bytes": measure_kept_bytes(run, Batching.of(run.config.training)),
        "peak_memory_bytes": peak_memory_bytes(model.device),
        "machine": describe_machine(model.device),
        "versions": {
            "ptv2_fast": ptv2_fast.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def measure_kept_bytes(run: PreparedRun, batching: Batching) -> int:
    """Bytes kept for backward in a step on the first training examples that make a batch, of the
    first data set."""
    part = next(iter(run.parts.values()))
    features = part.features["train"]
    indices = batching.first(list(range(len(features))), batching.lengths_of(features))
    model = run.model.train()
    result = kept_bytes(lambda: part.loss(features, indices, run.config.training.bf16), model)
    model.eval()
    return result
