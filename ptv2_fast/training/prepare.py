"""Everything of a run that can fail on bad input, done before anything is written."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from ptv2_fast.encoders import FAMILIES
from ptv2_fast.encoders.checkpointing import checkpoint_activations
from ptv2_fast.tasks import DataOptions, make_task
from ptv2_fast.tasks.sources import find_sources
from ptv2_fast.tasks.task import Examples, Features, Task, label_remarks
from ptv2_fast.training import run_folder
from ptv2_fast.training.methods import longest_input, prefix_config, prepare_model
from ptv2_fast.training.models import load_pretrained
from ptv2_fast.training.options import ModelOptions, RunConfig, TrainingOptions
from ptv2_fast.training.order import Batching
from ptv2_fast.training.start import find_starts, start_from

# Without a limit in epochs: more than any time limit allows.
_ENDLESS_EPOCHS = 10_000
# With --eval-seconds: no interval in steps.
_NEVER = 10**9


@dataclasses.dataclass
class Prepared:
    """A run that is ready to train; nothing has been written yet."""

    config: RunConfig
    task: Task
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    labels: list[str]
    max_length: int
    features: dict[str, Features]  # "train", "validation", "test"
    arguments: TrainingArguments
    folder: Path
    resume: bool
    overwrite: bool
    started_from: dict[str, Any] | None = None

    @property
    def found(self) -> dict[str, Any]:
        """What config.json keeps beside the options."""
        found = {"labels": self.labels, "max_length": self.max_length, **self.task.learnt}
        return found if self.started_from is None else {**found, "started_from": self.started_from}


def prepare(
    config: RunConfig, folder: Path, *, resume: bool = False, overwrite: bool = False
) -> Prepared:
    """Check the folder, read the data, load the model and attach what the method trains.

    Args:
        config: the run.
        folder: where `train` will write.
        resume: go on with the run in the folder.
        overwrite: delete the run in the folder when training starts.

    Raises:
        ValueError, OSError: for any bad input.
    """
    run_folder.check_output(folder, resume, overwrite)
    if config.model.method == "p-tuning-v2":
        prefix_config(config.model)  # a bad prefix is known before the data is read
    find_starts(config.model)
    goes_on = resume and (folder / run_folder.CONFIG).is_file()
    begun = run_folder.read_run_config(folder)[1] if goes_on else None
    task, examples, labels = read_data(config, begun)

    set_seed(config.training.seed)
    model, tokenizer = load_pretrained(config.model, task, labels)
    max_length = choose_max_length(config.data, model, config.model)
    features = {
        name: task.featurize(part, tokenizer, labels, max_length) for name, part in examples.items()
    }
    prepare_model(model, config.model, features["train"].table)
    started_from = start_from(model, config.model, config.data)
    if config.training.gradient_checkpointing:
        checkpoint_activations(model)
    batching = Batching.of(config.training)
    lengths = batching.lengths_of(features["train"])
    metric = task.metric if "validation" in features else None
    arguments = training_arguments(config, folder, len(lengths), batching.count(lengths), metric)
    prepared = Prepared(
        config, task, model, tokenizer, labels, max_length, features, arguments, folder,
        resume, overwrite, started_from,
    )  # fmt: skip
    if resume:
        run_folder.check_same_run(folder, config, prepared.found)
    return prepared


def read_data(
    config: RunConfig, begun: dict[str, Any] | None = None
) -> tuple[Task, dict[str, Examples], list[str]]:
    """The task, the examples of each split, and the labels of the training split.

    Args:
        config: the run.
        begun: what a run that goes on found at its start.

    Raises:
        ValueError, OSError: for bad data, or a label that the training split lacks.
    """
    task = make_task(config.data)
    examples = {name: task.read(source) for name, source in find_sources(config.data).items()}
    examples["train"] = task.trainable(examples["train"])
    # Of all training examples: the few that are drawn may lack a label of the other splits.
    labels = task.find_labels(examples["train"])
    remarks = examples["train"].remarks | label_remarks(labels)
    examples["train"] = dataclasses.replace(examples["train"], remarks=remarks)
    for part in examples.values():
        task.check_labels(part, labels)
    if begun is None:
        task.learn(examples["train"], labels)
    else:
        task.remember(begun)
    limits = {"train": config.data.max_train_examples, "test": None}
    for name, part in examples.items():
        kind = name.partition("_")[0]  # of "validation_mismatched", "test_wsj"
        count = limits.get(kind, config.data.max_eval_examples)
        if count is not None and count < len(part):
            drawn = part.draw(count, config.training.seed)
            if kind == "train":  # which may have a part of a group
                drawn = drawn[:count]
            examples[name] = dataclasses.replace(part.select(drawn), drawn_from=len(part))
    return task, examples, labels


def choose_max_length(data: DataOptions, model: PreTrainedModel, options: ModelOptions) -> int:
    """The longest input in tokens: what the data options ask for, or what the model allows.

    The default of a published data set gives way where the model allows less. Without a table of
    positions a model was made for a length, and takes a longer one that is asked for.

    Raises:
        ValueError: when more is asked for than a table of positions allows, saying how many remain.
    """
    limit, why = longest_input(model, options)
    if limit < 3:  # two special tokens and one of the text
        raise ValueError(f"num_virtual_tokens: expected room for an input, got none: {why}")
    longest = data.max_length or limit
    if longest > limit and "max_length" in data.given:
        family = FAMILIES.get(model.config.model_type)
        if family is not None and not family.has_position_table(model.config):
            return longest
        raise ValueError(f"max_length: expected at most {limit}, got {longest}; {why}")
    return min(limit, longest)


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
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        label_smoothing_factor=options.label_smoothing_factor,
        warmup_steps=options.warmup_ratio,
        # TaskTrainer multiplies the constant rate.
        lr_scheduler_type="constant" if options.schedule == "exponential" else options.schedule,
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        bf16=options.bf16,
        use_cpu=not torch.accelerator.is_available(),  # Trainer refuses bf16 on a CPU without it
        logging_steps=options.logging_steps,
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
