"""Trainer's arguments for our options."""

import math
from pathlib import Path

import torch
from transformers import TrainingArguments

from ptv2_fast.training import run_folder
from ptv2_fast.training.options import RunConfig, TrainingOptions

# Without a limit in epochs: more than any time limit allows.
_ENDLESS_EPOCHS = 10_000
# With --eval-seconds: no interval in steps.
_NEVER = 10**9
# Options that are Trainer's own.
_SAME = (
    "gradient_accumulation_steps", "weight_decay", "adam_beta1", "adam_beta2",
    "label_smoothing_factor", "max_grad_norm", "seed", "bf16", "logging_steps",
)  # fmt: skip


def runs_until_stopped(options: TrainingOptions) -> bool:
    """Whether time alone ends a run."""
    no_end = options.num_train_epochs is None and options.max_steps is None
    return no_end and options.max_seconds is not None


def training_arguments(
    config: RunConfig, folder: Path, rows: int, batches: int, metric: str | None
) -> TrainingArguments:
    """Trainer's arguments for our options.

    Args:
        config: the run.
        folder: of the run.
        rows, batches: of an epoch.
        metric: that selects the best checkpoint; None = there is no validation split.

    Raises:
        ValueError: for options that do not go together, or that this machine cannot serve.
    """
    options = config.training
    epoch = math.ceil(batches / options.gradient_accumulation_steps)
    eval_steps = options.eval_steps or (_NEVER if options.eval_seconds else epoch)
    save_steps = eval_steps if options.save_steps is None else options.save_steps
    has_validation = metric is not None
    load_best = options.load_best and has_validation and save_steps > 0
    if load_best and save_steps != eval_steps:
        # Trainer knows the best step of all; when that one was not saved, it keeps a worse one.
        expected = (
            "None beside eval_seconds" if eval_steps == _NEVER else f"eval_steps {eval_steps}"
        )
        raise ValueError(f"save_steps: expected {expected} with load_best, got {save_steps}")
    epochs, max_steps = options.num_train_epochs, options.max_steps
    if epochs is not None and max_steps is not None:  # Trainer would pass over the epochs
        max_steps = min(max_steps, math.ceil(epochs * epoch))
    if epochs is None:
        epochs = _ENDLESS_EPOCHS if runs_until_stopped(options) else 3
    arguments = TrainingArguments(
        output_dir=str(folder / run_folder.CHECKPOINTS),
        num_train_epochs=epochs,
        max_steps=max_steps or -1,
        per_device_train_batch_size=options.batch_size or max(1, round(rows / batches)),
        per_device_eval_batch_size=options.eval_batch_size,
        learning_rate=config.learning_rate,
        **{name: getattr(options, name) for name in _SAME},
        warmup_steps=options.warmup_ratio,
        # TaskTrainer multiplies the constant rate.
        lr_scheduler_type="constant" if options.schedule == "exponential" else options.schedule,
        use_cpu=not torch.accelerator.is_available(),  # Trainer refuses bf16 on a CPU without it
        logging_nan_inf_filter=False,  # StopWhenDiverged sees every loss
        eval_strategy="steps" if has_validation else "no",
        eval_steps=eval_steps,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or eval_steps,
        save_total_limit=2,
        load_best_model_at_end=load_best,
        metric_for_best_model=metric,
        greater_is_better=True if has_validation else None,
        disable_tqdm=True,  # Progress has its own bars
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    devices = arguments.world_size * max(1, arguments.n_gpu)
    if devices > 1 and options.batch_tokens is not None:
        raise ValueError(f"batch_tokens: expected None on several devices, got {devices} devices")
    return arguments
