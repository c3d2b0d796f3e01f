"""What a prepared run would do: its options as they hold, labels, steps, and what it would take."""

import math
import time
from typing import Any, cast

import torch
from torch import nn

from ptv2_fast.tasks.task import Features
from ptv2_fast.training.measure import kept_bytes
from ptv2_fast.training.optimization import own_rates
from ptv2_fast.training.order import Batching
from ptv2_fast.training.prepared_run import PreparedRun, RunPart
from ptv2_fast.training.trainer_arguments import runs_until_stopped

_LABELS = 100  # how many are listed
_STATES = 3  # a gradient and AdamW's two moments for each trained parameter, beside an average


def describe_run(run: PreparedRun) -> dict[str, dict[str, Any]]:
    """The options as they hold, without those that are not set, and under "run" what follows.

    A training step and a batch of scoring of each data set are run to estimate time and memory.
    """
    options = without_nothing(run.config.to_dict())
    data = options["tasks"] if "tasks" in options else [options["data"]]
    for table, part in zip(data, run.parts.values(), strict=True):
        table["max_length"] = part.max_length
    options["training"] |= _training_options(run)
    parts = {name: _describe_data(part) for name, part in run.parts.items()}
    if run.heads is None:
        described: dict[str, Any] = parts[""]
    else:
        for table, count in zip(parts.values(), run.batches, strict=True):
            table["batches_per_epoch"] = count
        described = {"tasks": parts}
    described["steps"] = steps(run)
    described["estimate"] = _estimate(run)
    return options | {"run": without_nothing(described)}


def of_all_runs(one: dict[str, Any], count: int) -> dict[str, Any]:
    """The estimate of runs one after another that each take what one of them does."""
    seconds = ("training_seconds", "scoring_seconds")
    whole = {name: round(count * one[name], 1) for name in seconds}
    return {"runs": count, **whole, "memory_bytes": one["memory_bytes"]}


def _training_options(run: PreparedRun) -> dict[str, Any]:
    """The training options that were found."""
    arguments, options = run.arguments, run.config.training
    found: dict[str, Any] = {"learning_rate": arguments.learning_rate}
    found["head_learning_rate"] = options.head_learning_rate or arguments.learning_rate
    for name, (parameters, rate) in own_rates(run.model, options, arguments.learning_rate).items():
        if parameters and rate is not None:
            found[name] = rate
    if steps(run) is not None and arguments.max_steps < 0:
        found["num_train_epochs"] = arguments.num_train_epochs
    if arguments.eval_strategy != "no" and not options.eval_seconds:
        found["eval_steps"] = arguments.eval_steps
    if arguments.save_strategy != "no" and not options.eval_seconds:
        found["save_steps"] = arguments.save_steps
    return found


def _describe_data(part: RunPart) -> dict[str, Any]:
    """Examples and labels of each split with their counts, and what the metric means."""
    task = part.task
    counts = {name: task.count_labels(f.examples) for name, f in part.features.items()}
    return {
        "metric": f"{task.metric} = {task.titles(part.labels)[task.metric]}",
        "examples": {name: len(f.examples) for name, f in part.features.items()},
        "labels": {name: dict(count.most_common(_LABELS)) for name, count in counts.items()},
    }


def steps(run: PreparedRun) -> int | None:
    """Optimizer steps of the whole run; None where time alone ends it."""
    arguments = run.arguments
    if runs_until_stopped(run.config.training):
        return None
    if arguments.max_steps > 0:
        return arguments.max_steps
    epoch = math.ceil(sum(run.batches) / arguments.gradient_accumulation_steps)
    return math.ceil(arguments.num_train_epochs * epoch)


def _estimate(run: PreparedRun) -> dict[str, Any]:
    """Seconds of a step, of training and of scoring, and bytes of memory, on this machine."""
    model, arguments, options = run.model, run.arguments, run.config.training
    cast(nn.Module, model).to(arguments.device)
    step_seconds, scoring_seconds, kept = 0.0, 0.0, 0
    for (_, part), count in zip(run.active_parts(), run.batches, strict=True):
        seconds, size = _step(run, part)
        step_seconds += count / sum(run.batches) * seconds * arguments.gradient_accumulation_steps
        kept = max(kept, size)
        scoring_seconds += _scoring_seconds(run, part)
    total, states = steps(run), _STATES + (options.ema_decay is not None)
    whole = math.inf if total is None else step_seconds * total
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return {
        "device": str(model.device),
        "step_seconds": round(step_seconds, 4),
        "training_seconds": round(min(whole, options.max_seconds or math.inf), 1),
        "scoring_seconds": round(scoring_seconds, 1),
        "memory_bytes": held + states * trained + kept,
    }


def _step(run: PreparedRun, part: RunPart) -> tuple[float, int]:
    """Seconds of a training step on one batch, and bytes kept in one on the longest examples."""
    model, train, bf16 = run.model, part.features["train"], run.config.training.bf16
    batching = Batching.of(run.config.training)
    lengths = batching.lengths_of(train)
    order = sorted(range(len(train)), key=lengths.__getitem__, reverse=True)
    model.train()
    part.loss(train, order[:1], bf16).backward()  # what a first step alone needs is not counted
    longest = batching.first(order, lengths)
    kept = kept_bytes(lambda: part.loss(train, longest, bf16), model)
    drawn = batching.first(_drawn(train), lengths)
    started = time.perf_counter()
    part.loss(train, drawn, bf16).backward()
    _wait(model.device)
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    model.eval()
    return seconds, kept


def _scorings(run: PreparedRun) -> int:
    """How often the validation examples are scored, the last time included."""
    options, total = run.config.training, steps(run)
    if options.eval_seconds is not None and options.max_seconds is not None:
        return math.ceil(options.max_seconds / options.eval_seconds)
    return 1 if total is None else math.ceil(total / int(run.arguments.eval_steps or total))


def _scoring_seconds(run: PreparedRun, part: RunPart) -> float:
    """Of all scorings during training and of a last one of each split not scored by then."""
    seconds = 0.0
    for name, features in part.features.items():
        if name == "train":
            continue
        count = min(run.arguments.per_device_eval_batch_size, len(features))
        rows = _drawn(features)[:count]
        started = time.perf_counter()
        with torch.no_grad():
            part.loss(features, rows, run.config.training.bf16)
        _wait(run.model.device)
        row = (time.perf_counter() - started) / count
        seconds += row * len(features) * (_scorings(run) if name == "validation" else 1)
    return seconds


def _drawn(features: Features) -> list[int]:
    """All rows in a random order that is the same each time."""
    return torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).tolist()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def without_nothing(value: Any) -> Any:
    """Tables and lists without entries that are None."""
    if isinstance(value, dict):
        return {key: without_nothing(part) for key, part in value.items() if part is not None}
    return [without_nothing(part) for part in value] if isinstance(value, list) else value
