"""What a prepared run would do: its options as they hold, labels, steps, and what it would take."""

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ptv2_fast.tasks.option_table import GIVEN
from ptv2_fast.tasks.task import Features
from ptv2_fast.training import run_folder
from ptv2_fast.training.measure import kept_bytes
from ptv2_fast.training.order import Batching
from ptv2_fast.training.prepare import Prepared, runs_until_stopped
from ptv2_fast.training.trainer import update_parameters, vector_parameters, vector_rate

if TYPE_CHECKING:
    from ptv2_fast.training.multitask.train import PreparedTasks

_LABELS = 100  # how many are listed
_STATES = 3  # a gradient and AdamW's two moments for each trained parameter, beside an average


def describe_run(prepared: Prepared) -> dict[str, dict[str, Any]]:
    """The options as they hold, without those that are not set, and under "run" what follows.

    One training step and one batch of scoring are run to estimate time and memory.
    """
    tables = _options_set(prepared.config)
    tables["data"]["max_length"] = prepared.max_length
    batching = Batching.of(prepared.config.training)
    batches = batching.count(batching.lengths_of(prepared.features["train"]))
    total = _describe_training(tables["training"], prepared, batches)
    run: dict[str, Any] = describe_data(prepared)
    run["steps"] = total
    run["estimate"] = estimate([prepared], [1.0], total)
    return tables | {"run": without_nothing(run)}


def describe_tasks(prepared: "PreparedTasks") -> dict[str, dict[str, Any]]:
    """The same of a multi-task run, with a step of each data set; data sets are in "tasks"."""
    tables = _options_set(prepared.config)
    parts, batches = list(prepared.parts.values()), prepared.batches
    for table, part in zip(tables["tasks"], parts, strict=True):
        table["max_length"] = part.max_length
    total = _describe_training(tables["training"], parts[0], sum(batches))
    run: dict[str, Any] = {"tasks": {}, "steps": total}
    for (name, part), count in zip(prepared.parts.items(), batches, strict=True):
        run["tasks"][name] = {**describe_data(part), "batches_per_epoch": count}
    shares = [count / sum(batches) for count in batches]
    run["estimate"] = estimate(parts, shares, total, prepared.heads.activate)
    return tables | {"run": without_nothing(run)}


def of_all_runs(one: dict[str, Any], count: int) -> dict[str, Any]:
    """The estimate of runs one after another that each take what one of them does."""
    seconds = ("training_seconds", "scoring_seconds")
    whole = {name: round(count * one[name], 1) for name in seconds}
    return {"runs": count, **whole, "memory_bytes": one["memory_bytes"]}


def _describe_training(table: dict[str, Any], prepared: Prepared, batches: int) -> int | None:
    """Fill in the training options that were found; returns the optimizer steps.

    Args:
        table: those that were given.
        prepared: the run, or one of its data sets.
        batches: of an epoch.
    """
    arguments, options = prepared.arguments, prepared.config.training
    total = steps(prepared, batches)
    table["learning_rate"] = arguments.learning_rate
    table.setdefault("head_learning_rate", arguments.learning_rate)
    if vector_parameters(prepared.model):
        rate = vector_rate(options.bias_learning_rate, table["head_learning_rate"])
        table["bias_learning_rate"] = rate
    if update_parameters(prepared.model):
        table["low_rank_learning_rate"] = options.low_rank_learning_rate
    if total is not None and arguments.max_steps < 0:
        table["num_train_epochs"] = arguments.num_train_epochs
    if arguments.eval_strategy != "no" and not options.eval_seconds:
        table["eval_steps"] = arguments.eval_steps
    if arguments.save_strategy != "no" and not options.eval_seconds:
        table["save_steps"] = arguments.save_steps
    return total


def describe_data(prepared: Prepared) -> dict[str, Any]:
    """Examples and labels of each split with their counts, and what the metric means."""
    task = prepared.task
    counts = {name: task.count_labels(f.examples) for name, f in prepared.features.items()}
    return {
        "metric": f"{task.metric} = {task.titles(prepared.labels)[task.metric]}",
        "examples": {name: len(f.examples) for name, f in prepared.features.items()},
        "labels": {name: dict(count.most_common(_LABELS)) for name, count in counts.items()},
    }


def steps(prepared: Prepared, batches: int) -> int | None:
    """Optimizer steps of the whole run; None where time alone ends it.

    Args:
        prepared: the run, or one of its data sets.
        batches: of an epoch.
    """
    if runs_until_stopped(prepared.config.training):
        return None
    arguments = prepared.arguments
    if arguments.max_steps > 0:
        return arguments.max_steps
    epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
    return math.ceil(arguments.num_train_epochs * epoch)


def estimate(
    parts: Sequence[Prepared],
    shares: Sequence[float],
    total: int | None,
    activate: Callable[[int], object] = lambda number: None,
) -> dict[str, Any]:
    """Seconds of a step, of training and of scoring, and bytes of memory, on this machine.

    Args:
        parts: the data sets of one model.
        shares: the part of all batches that is of each data set.
        total: optimizer steps; None = until max_seconds.
        activate: is called with the number of a data set before its step.
    """
    model, arguments = parts[0].model, parts[0].arguments
    cast(nn.Module, model).to(arguments.device)
    step_seconds, scored, kept = 0.0, 0.0, 0
    for number, (part, share) in enumerate(zip(parts, shares, strict=True)):
        activate(number)
        seconds, size = _step(part)
        step_seconds += share * seconds * arguments.gradient_accumulation_steps
        kept = max(kept, size)
        scored += _scoring_seconds(part, total)
    activate(0)
    options = parts[0].config.training
    limit, states = options.max_seconds, _STATES + (options.ema_decay is not None)
    whole = math.inf if total is None else step_seconds * total
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return {
        "device": str(model.device),
        "step_seconds": round(step_seconds, 4),
        "training_seconds": round(min(whole, limit or math.inf), 1),
        "scoring_seconds": round(scored, 1),
        "memory_bytes": held + states * trained + kept,
    }


def _step(prepared: Prepared) -> tuple[float, int]:
    """Seconds of a training step on one batch, and bytes kept in one on the longest examples."""
    model, train = prepared.model, prepared.features["train"]
    batching = Batching.of(prepared.config.training)
    lengths = batching.lengths_of(train)
    order = sorted(range(len(train)), key=lengths.__getitem__, reverse=True)
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    model.train()
    _loss(prepared, train, order[:1]).backward()  # what a first step alone needs is not counted
    kept = kept_bytes(lambda: _loss(prepared, train, batching.first(order, lengths)), model)
    started = time.perf_counter()
    _loss(prepared, train, batching.first(drawn, lengths)).backward()
    _wait(model.device)
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    model.eval()
    return seconds, kept


def scorings(prepared: Prepared, total: int | None) -> int:
    """How often the validation examples are scored, the last time included.

    Args:
        total: optimizer steps; None = until max_seconds.
    """
    arguments, options = prepared.arguments, prepared.config.training
    if options.eval_seconds is not None and options.max_seconds is not None:
        return math.ceil(options.max_seconds / options.eval_seconds)
    if total is None:
        return 1
    return math.ceil(total / int(arguments.eval_steps or total))


def _scoring_seconds(prepared: Prepared, total: int | None) -> float:
    """Of all scorings during training and of a last one of each split not scored by then."""
    arguments = prepared.arguments
    times = scorings(prepared, total)
    seconds = 0.0
    for name, features in prepared.features.items():
        if name == "train":
            continue
        count = min(arguments.per_device_eval_batch_size, len(features))
        rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).tolist()
        started = time.perf_counter()
        with torch.no_grad():
            _loss(prepared, features, rows[:count])
        _wait(prepared.model.device)
        row = (time.perf_counter() - started) / count
        seconds += row * len(features) * (times if name == "validation" else 1)
    return seconds


def _loss(prepared: Prepared, features: Features, indices: list[int]) -> Tensor:
    task, model = prepared.task, prepared.model
    table = features.model_inputs(prepared.tokenizer, task.label_columns)
    rows = [table[index] for index in indices]
    batch = task.collator(prepared.tokenizer)(rows).to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=prepared.config.training.bf16):
        return model(**batch).loss


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _options_set(config: run_folder.Config) -> dict[str, Any]:
    """The tables of a run's options, without those that are not set."""
    tables = config.to_dict()
    for table in (tables, *tables.get("tasks", ())):
        del table[GIVEN]
    return without_nothing(tables)


def without_nothing(value: Any) -> Any:
    """Tables and lists without entries that are None."""
    if isinstance(value, dict):
        return {key: without_nothing(part) for key, part in value.items() if part is not None}
    return [without_nothing(part) for part in value] if isinstance(value, list) else value
