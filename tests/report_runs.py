"""Run folders written by hand, for the report."""

import json
from pathlib import Path
from typing import Any

_SECTIONS = {
    "data": ("train_file", "data_dir", "max_train_examples", "max_eval_examples", "head"),
    "training": ("learning_rate",),
}


def write_run(
    folder: Path,
    scores: dict[str, dict[str, float]],
    *,
    task: str = "rte",
    method: str = "p-tuning-v2",
    model: str = "tiny-bert",
    seed: int = 11,
    curve: list[tuple[int, float]] = (),
    metric: str = "accuracy",
    report: dict[str, Any] | None = None,
    mistakes: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """config.json, metrics.jsonl and report.json as a training writes them.

    Args:
        scores: split -> metric -> value.
        curve: (step, validation score) pairs.
        report: entries of report.json that are not the usual ones.
        mistakes: of mistakes.json; None = a run by a version that kept none.
        options: of config.json, flat.
    """
    folder.mkdir(parents=True)
    config = {
        "data": {"task": task, "max_length": 128},
        "model": {"model": model, "method": method},
        "training": {"seed": seed, "batch_size": 16},
        "found": {"labels": ["0", "1"], "max_length": 128},
    }
    if "tasks" in options:
        config["tasks"] = options.pop("tasks")
        del config["data"]
    for name, value in options.items():
        if name == "mixed_batches":
            config[name] = value
            continue
        section = next((s for s, names in _SECTIONS.items() if name in names), "model")
        config[section][name] = value
    lines = [
        {f"eval_{metric}": value, "step": step, "train_seconds": step / 10} for step, value in curve
    ]
    content = {
        "task": task,
        "method": method,
        "model": model,
        "metric": metric,
        "metrics": scores,
        "trainable_parameters": 1_000,
        "total_parameters": 100_000,
        "saved_bytes": 4_321,
        "steps": 40,
        "train_seconds": 90.0,
        "step_seconds": 0.25,
        "kept_bytes": 2_500_000,
        "peak_memory_bytes": 1_200_000_000,
        "examples": {"train": 2490, "validation": 277},
        "truncated_examples": {"train": 0, "validation": 0},
        "remarks": {},
        "machine": {"processor": "Abacus 3000", "cores": 2, "threads": 2, "accelerator": None},
        "versions": {"ptv2_fast": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "report.json").write_text(json.dumps(content | (report or {})))
    if mistakes is not None:
        (folder / "mistakes.json").write_text(json.dumps(mistakes))
    return folder


def write_sweep(folder: Path, kind: str, runs: dict[str, dict[str, Any]], **options: Any) -> Path:
    """A sweep's folder; each run has its axes, `seed`, and `score` on the validation split."""
    for name, axes in runs.items():
        varied = {k: v for k, v in axes.items() if k not in ("order", "layers", "seed", "score")}
        scores = {"validation": {"accuracy": axes["score"]}}
        write_run(folder / name, scores, seed=axes["seed"], **varied, **options)
    listed = {n: {k: v for k, v in axes.items() if k != "score"} for n, axes in runs.items()}
    (folder / "sweep.json").write_text(json.dumps({"kind": kind, "runs": listed}))
    return folder
