"""Training of a prepared run, and its report."""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

import ptv2_fast
from ptv2_fast.encoders import get_nb_trainable_parameters
from ptv2_fast.tasks.comparison import baseline
from ptv2_fast.training import averaging, run_folder
from ptv2_fast.training.checkpoints import last_checkpoint
from ptv2_fast.training.clock import StepClock
from ptv2_fast.training.divergence import StopWhenDiverged, require_finite
from ptv2_fast.training.machine import describe_machine
from ptv2_fast.training.measure import kept_bytes, peak_memory_bytes
from ptv2_fast.training.models import save_trained
from ptv2_fast.training.options import TrainingOptions
from ptv2_fast.training.order import Batching
from ptv2_fast.training.output import is_first, wait_for_all
from ptv2_fast.training.prepare import Prepared
from ptv2_fast.training.scoring import score
from ptv2_fast.training.trainer import PacedTrainer, TaskTrainer


def train(prepared: Prepared, callbacks: list[TrainerCallback] | None = None) -> dict[str, Any]:
    """Train, save what was trained, score it and write the report.

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
        if is_first():
            prepared.tokenizer.save_pretrained(folder / run_folder.TOKENIZER)
        clock = StepClock(config.training.max_seconds, config.training.eval_seconds)
        trainer = TaskTrainer(
            prepared.model,
            prepared.arguments,
            task=prepared.task,
            tokenizer=prepared.tokenizer,
            labels=prepared.labels,
            train=prepared.features["train"],
            validation=prepared.features.get("validation"),
            **pace(config.training, clock, folder, callbacks),
        )
        trainer.train(resume_from_checkpoint=checkpoint_of(prepared))
        require_finite(prepared.model)
        if is_first():
            save_trained(prepared.model, config.model.method, folder)
        wait_for_all()
        known, known_mistakes = trainer.final_scores.get(""), trainer.final_mistakes.get("")
        metrics, wrong = score_splits(prepared, known, known_mistakes)
        report = _report(prepared, clock, trainer, metrics)
        if is_first():
            run_folder.finish(folder, report, wrong)
        return report


def checkpoint_of(prepared: Any) -> str | None:
    """The checkpoint from which a resumed run goes on; None = from the beginning.

    Args:
        prepared: a run of one task or of several, begun.
    """
    if not prepared.resume:
        return None
    arguments: TrainingArguments = prepared.arguments
    found = last_checkpoint(
        prepared.folder / run_folder.CHECKPOINTS,
        arguments.world_size,
        arguments.load_best_model_at_end,
        (averaging.FILE,) if prepared.config.training.ema_decay else (),
    )
    return None if found is None else str(found)


def pace(
    options: TrainingOptions,
    clock: StepClock,
    folder: Path,
    callbacks: list[TrainerCallback] | None = None,
) -> dict[str, Any]:
    """The arguments of `PacedTrainer` beside the model and what it learns from."""
    return {
        "clock": clock,
        "progress": options.progress,
        "head_learning_rate": options.head_learning_rate,
        "bias_learning_rate": options.bias_learning_rate,
        "low_rank_learning_rate": options.low_rank_learning_rate,
        "epoch_decay": options.schedule_decay if options.schedule == "exponential" else None,
        "decay": (options.decay_ratio, options.decay_type),
        "ema_decay": options.ema_decay,
        "batch_tokens": options.batch_tokens,
        "callbacks": [
            StopWhenDiverged(),
            _BestCheckpoint(),
            _MetricsFile(folder / run_folder.METRICS),
            *(callbacks or []),
        ],
    }


class _BestCheckpoint(TrainerCallback):
    """Finds the best checkpoint of a resumed run again, whatever its folder is called now."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        # What the state says is a path on the machine where it was written.
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        known = type(state.best_global_step) is int and best.is_dir()
        state.best_model_checkpoint = str(best) if known else None


class _MetricsFile(TrainerCallback):
    """Keeps metrics.jsonl equal to Trainer's log, also after a resume."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if not state.is_world_process_zero:
            return
        lines = [json.dumps(entry) + "\n" for entry in state.log_history]
        run_folder.write_text(self.path, "".join(lines))


def _report(
    prepared: Prepared, clock: StepClock, trainer: PacedTrainer, metrics: dict[str, Any]
) -> dict[str, Any]:
    return {
        "task": prepared.config.data.task,
        "metric": prepared.task.metric,
        "metric_title": prepared.task.titles(prepared.labels)[prepared.task.metric],
        "metrics": metrics,
        "saved_bytes": run_folder.saved_bytes(prepared.folder),
        "started_from": prepared.started_from,
        **describe_data(prepared),
        **describe_training(prepared, clock, trainer.state.global_step),
    }


def score_splits(
    prepared: Prepared, validation: dict[str, float] | None, wrong: dict[str, Any] | None
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Any]]]:
    """The metrics of every split but the training data, and what `mistakes` finds there.

    Args:
        prepared: with the trained model.
        validation, wrong: those of the validation split, when they are known.
    """
    options = prepared.config.training
    metrics = {} if validation is None else {"validation": validation}
    found = {} if validation is None else {"validation": wrong or {}}
    for name, features in prepared.features.items():
        if name != "train" and name not in metrics:
            metrics[name] = score(
                prepared.model, prepared.task, features, prepared.tokenizer, prepared.labels,
                options.eval_batch_size, options.bf16, options.progress, found.setdefault(name, {}),
            )  # fmt: skip
    return metrics, {name: own for name, own in found.items() if own}


def describe_data(prepared: Prepared) -> dict[str, dict[str, Any]]:
    """What report.json says about the examples, and of a constant answer to them, by split."""
    features = prepared.features.items()
    return {
        "examples": {name: len(f.examples) for name, f in features},
        "drawn_from": {n: f.examples.drawn_from for n, f in features if f.examples.drawn_from},
        "truncated_examples": {name: f.truncated for name, f in features},
        "remarks": {name: f.examples.remarks for name, f in features if f.examples.remarks},
        "baselines": {
            name: found
            for name, f in features
            if name != "train" and (found := baseline(prepared.task, f.examples, prepared.labels))
        },
    }


def describe_training(prepared: Prepared, clock: StepClock, steps: int) -> dict[str, Any]:
    """What report.json says about the model, the method, time and memory."""
    model = prepared.model
    trainable, total = get_nb_trainable_parameters(model)
    return {
        "method": prepared.config.model.method,
        "model": prepared.config.model.model,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "steps": steps,
        "train_seconds": clock.seconds,
        "step_seconds": statistics.median(clock.step_seconds) if clock.step_seconds else None,
        "kept_bytes": measure_kept_bytes(prepared, Batching.of(prepared.config.training)),
        "peak_memory_bytes": peak_memory_bytes(model.device),
        "machine": describe_machine(model.device),
        "versions": {
            "ptv2_fast": ptv2_fast.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def measure_kept_bytes(prepared: Prepared, batching: Batching) -> int:
    """Bytes kept for backward in a step on the first training examples that make a batch."""
    features, task = prepared.features["train"], prepared.task
    table = features.model_inputs(prepared.tokenizer, task.label_columns)
    indices = batching.first(list(range(len(table))), batching.lengths_of(features))
    rows = [table[index] for index in indices]
    batch = task.collator(prepared.tokenizer)(rows).to(prepared.model.device)
    model = prepared.model.train()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=prepared.config.training.bf16):
        result = kept_bytes(lambda: model(**batch).loss, model)
    model.eval()
    return result
