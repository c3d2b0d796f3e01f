"""The experiments on real data: python -m bench.experiments DATA OUTPUT [NAME ...]

DATA is what bench.experiment_data wrote; experiments.yaml says what is compared. Each experiment
is a sweep in OUTPUT/NAME, which goes on where it was interrupted. After each one
results/experiments.csv is written from all that is in OUTPUT, beside the rows of other experiments
that it holds already.
"""

import argparse
import csv
import dataclasses
import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import transformers
import yaml

from bench.experiment_data import minilm_folder
from bench.measure import RESULTS
from ptv2_fast.training import run_folder
from ptv2_fast.training.finished_runs import find_runs, flags
from ptv2_fast.training.multitask.config import MultiTaskConfig
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.run import train
from ptv2_fast.training.sweeps import ablation
from ptv2_fast.training.sweeps.plan import SWEEP, Sweep, sweep_of
from ptv2_fast.training.sweeps.sweep import run_sweep

PLAN = Path(__file__).with_suffix(".yaml")
CSV = RESULTS / "experiments.csv"
_FILES = ("model", "data_dir", "train_file", "validation_file", "test_file")
_COSTS = (
    "trainable_parameters", "total_parameters", "saved_bytes", "kept_bytes", "steps",
    "step_seconds", "train_seconds",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment of the plan.

    Attributes:
        base: the options that its runs share.
        variants: by name, options and the learning rates to choose from by the validation score of
            the first seed.
        ablation: instead of variants, a kind of ablation and its settings.
    """

    base: RunConfig
    seeds: list[int]
    variants: dict[str, tuple[dict[str, Any], list[float]]]
    ablation: dict[str, Any]

    def run(self, folder: Path) -> None:
        """Run what is not finished in the folder."""
        if self.ablation:
            settings = dict(self.ablation)
            plan = getattr(ablation, f"{settings.pop('kind')}_sweep")
            _run(plan(self.base, seeds=self.seeds, **settings), folder)
            return
        settings_of = {
            (name, rate): {**options, "learning_rate": rate}
            for name, (options, rates) in self.variants.items()
            for rate in rates
        }
        first, *others = self.seeds
        _run(self._sweep(settings_of, [first]), folder)
        chosen = {
            (name, best_rate(folder, name, rates, first)): None
            for name, (_, rates) in self.variants.items()
        }
        if others:
            _run(self._sweep({key: settings_of[key] for key in chosen}, others), folder)

    def _sweep(self, settings_of: dict[tuple[str, float], Any], seeds: list[int]) -> Sweep:
        named = {variant_name(*key): settings for key, settings in settings_of.items()}
        return sweep_of("table", self.base, named, seeds)


def variant_name(name: str, rate: float) -> str:
    """What a variant's runs are called, before their seed."""
    return f"{name}-lr-{rate:g}"


def best_rate(folder: Path, name: str, rates: list[float], seed: int) -> float:
    """The rate whose run has the best validation score; a run that failed has none."""

    def score(rate: float) -> float:
        file = folder / f"{variant_name(name, rate)}-seed-{seed}" / run_folder.REPORT
        if not file.is_file():
            return -math.inf
        report = run_folder.read_json(file)
        return report["metrics"]["validation"][report["metric"]]

    return max(rates, key=score)


def _run(sweep: Sweep, folder: Path) -> None:
    run_sweep(sweep, folder, resume=(folder / SWEEP).is_file(), announce=print)


def read_plan(data: Path, output: Path) -> tuple[dict[str, Experiment], dict[str, MultiTaskConfig]]:
    """The experiments and the multi-task runs of the plan, by name."""
    plan = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    shared = plan["shared"] | {"model": str(minilm_folder())}

    def placed(options: dict[str, Any]) -> dict[str, Any]:
        """Files under DATA, runs under OUTPUT."""
        options = {k: str(data / v) if k in _FILES else v for k, v in options.items()}
        if "start_from" in options:
            options["start_from"] = str(output / options["start_from"])
        return options

    experiments = {}
    for name, experiment in plan["experiments"].items():
        kind = plan["kinds"].get(experiment.get("kind"), {"options": {}, "variants": {}})
        base = RunConfig.from_dict(shared | kind["options"] | placed(experiment["options"]))
        variants = {}
        every = kind["variants"] | experiment.get("variants", {})
        for variant in experiment.get("only", every):
            options = every[variant]
            options = placed(options | experiment.get(variant, {}))
            variants[variant] = (options, options.pop("learning_rates"))
        experiments[name] = Experiment(
            base, experiment.get("seeds", plan["seeds"]), variants, experiment.get("ablation", {})
        )
    multitask = {
        name: MultiTaskConfig.from_dict(
            shared | options | {"tasks": [placed(task) for task in options["tasks"]]}
        )
        for name, options in plan["multitask"].items()
    }
    return experiments, multitask


def rows(output: Path, data: Path) -> Iterator[dict[str, Any]]:
    """The finished runs as rows of the CSV file, one for each task of a multi-task run.

    Raises:
        ValueError: where there is none.
    """
    for run in find_runs([output])[0]:
        name = run.folder.relative_to(output).parts[0]
        report = run.report
        several = "tasks" in report
        for result in run.results:
            scores = {
                f"{split}_{key}": value
                for split, values in result.scores.items()
                for key, value in values.items()
            }
            yield {
                "experiment": name,
                "run": result.data["name"] if several else run.folder.name,
                "task": result.task,
                "method": report["method"],
                "seed": run.seed,
                "metric": result.metric,
                "validation": scores.get(f"validation_{result.metric}"),
                "test": scores.get(f"test_{result.metric}"),
                **{cost: report.get(cost) for cost in _COSTS},
                "scores": json.dumps({key: round(value, 5) for key, value in scores.items()}),
                "threads": report["machine"]["threads"],
                "processor": report["machine"]["processor"],
                "versions": json.dumps(report["versions"]),
                "command": f"python -m bench.experiments DATA runs {name}"
                if several
                else command(RunConfig.from_dict(run.options), data),
            }


def command(config: RunConfig, data: Path) -> str:
    """The `ptv2-fast train` command of a run, with DATA for the folder of the data."""
    defaults = RunConfig.from_dict({"task": config.data.task, "model": config.model.model}).flat()
    named = ("task", "model", "method")
    given = {n: v for n, v in config.flat().items() if n in named or v != defaults[n]}
    words = [
        word.replace(str(minilm_folder()), "all-MiniLM-L6-v2").replace(str(data), "DATA")
        for word in flags(given)
    ]
    return shlex.join(["ptv2-fast", "train", *words])


def write_csv(output: Path, data: Path) -> None:
    """Replace the rows of every experiment in `output`, keep the others'."""
    new = list(rows(output, data))
    found = {row["experiment"] for row in new}
    kept = []
    if CSV.is_file():
        with CSV.open(encoding="utf-8", newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["experiment"] not in found]
    table = sorted([*kept, *new], key=lambda row: (row["experiment"], row["run"]))
    run_folder.write_csv(CSV, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("names", nargs="*", help="experiments (default: all)")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    experiments, multitask = read_plan(arguments.data, arguments.output)
    known = [*multitask, *experiments]
    unknown = set(arguments.names) - set(known)
    if unknown:
        parser.error(f"expected names of {known}, got {sorted(unknown)}")
    for name in arguments.names or known:
        folder = arguments.output / name
        if name in experiments:
            experiments[name].run(folder)
        elif not (folder / run_folder.REPORT).is_file():
            resume = (folder / run_folder.CONFIG).is_file()
            train(prepare(multitask[name], folder, resume=resume))
        write_csv(arguments.output, arguments.data)


if __name__ == "__main__":
    main()
