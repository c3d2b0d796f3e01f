"""What a prepared run would do: its options as they hold, labels, steps, and what it would take."""

import math
import time
from typing import Any, cast

import torch
from torch import Tensor, nn

from ptv2_fast.tasks.task import Features
from ptv2_fast.training.measure import kept_bytes
from ptv2_fast.training.prepare import Prepared, runs_until_stopped

_LABELS = 100  # how many are listed
_STATES = 3  # a gradient and AdamW's two moments for each trained parameter


def describe_run(prepared: Prepared) -> dict[str, dict[str, Any]]:
    """The options as they hold, without those that are not set, and under "run" what follows.

    One training step and one batch of scoring are run to estimate time and memory.
    """
    tables = without_nothing(prepared.config.to_dict())
    arguments, total = prepared.arguments, steps(prepared)
    tables["data"]["max_length"] = prepared.max_length
    tables["training"]["learning_rate"] = arguments.learning_rate
    tables["training"].setdefault("head_learning_rate", arguments.learning_rate)
    if total is not None and arguments.max_steps < 0:
        tables["training"]["num_train_epochs"] = arguments.num_train_epochs
    if arguments.eval_strategy != "no" and not prepared.config.training.eval_seconds:
        tables["training"]["eval_steps"] = arguments.eval_steps
    if arguments.save_strategy != "no" and not prepared.config.training.eval_seconds:
        tables["training"]["save_steps"] = arguments.save_steps
    run: dict[str, Any] = describe_data(prepared)
    run["steps"] = total
    run["estimate"] = estimate(prepared, total)
    return tables | {"run": without_nothing(run)}


def describe_data(prepared: Prepared) -> dict[str, Any]:
    """Examples and labels of each split with their counts, and what the metric means."""
    task = prepared.task
    counts = {name: task.count_labels(f.examples) for name, f in prepared.features.items()}
    return {
        "metric": f"{task.metric} = {task.titles(prepared.labels)[task.metric]}",
        "examples": {name: len(f.examples) for name, f in prepared.features.items()},
        "labels": {name: dict(count.most_common(_LABELS)) for name, count in counts.items()},
    }


def steps(prepared: Prepared) -> int | None:
    """Optimizer steps of the whole run; None where time alone ends it."""
    if runs_until_stopped(prepared.config.training):
        return None
    arguments, rows = prepared.arguments, len(prepared.features["train"])
    if arguments.max_steps > 0:
        return arguments.max_steps
    batches = math.ceil(rows / arguments.per_device_train_batch_size)
    epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
    return math.ceil(arguments.num_train_epochs * epoch)


def estimate(prepared: Prepared, total: int | None) -> dict[str, Any]:
    """Seconds of a step, of training and of scoring, and bytes of memory, on this machine.

    Args:
        total: optimizer steps; None = until max_seconds.
    """
    model, arguments = prepared.model, prepared.arguments
    cast(nn.Module, model).to(arguments.device)
    train, size = prepared.features["train"], arguments.per_device_train_batch_size
    order = sorted(range(len(train)), key=train.lengths.__getitem__, reverse=True)
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    model.train()
    loss = _loss(prepared, train, order[:1])
    loss.backward()  # what happens in a first step alone is not counted
    kept = kept_bytes(lambda: _loss(prepared, train, order[:size]), model)
    started = time.perf_counter()
    _loss(prepared, train, drawn[:size]).backward()
    _wait(model.device)
    step_seconds = (time.perf_counter() - started) * arguments.gradient_accumulation_steps
    model.zero_grad(set_to_none=True)
    model.eval()
    scored = _scoring_seconds(prepared, total)
    limit = prepared.config.training.max_seconds
    seconds = math.inf if total is None else step_seconds * total
    seconds = min(seconds, limit or math.inf)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return {
        "device": str(model.device),
        "step_seconds": round(step_seconds, 4),
        "training_seconds": round(seconds, 1),
        "scoring_seconds": round(scored, 1),
        "memory_bytes": held + _STATES * trained + kept,
    }


def _scoring_seconds(prepared: Prepared, total: int | None) -> float:
    """Of all scorings during training and of the last one of every split."""
    arguments, watched = prepared.arguments, prepared.watched
    times = 0 if total is None else int(total // (arguments.eval_steps or total))
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
        seconds += row * len(features)
        if name == "validation" and watched is not None:
            seconds += row * len(watched) * times
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


def without_nothing(value: Any) -> Any:
    """Tables and lists without entries that are None."""
    if isinstance(value, dict):
        return {key: without_nothing(part) for key, part in value.items() if part is not None}
    return [without_nothing(part) for part in value] if isinstance(value, list) else value
