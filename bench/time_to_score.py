"""How soon a recipe reaches fine-tuning's score: python -m bench.time_to_score DATA OUTPUT [TASK]

DATA is what bench.experiment_data wrote; time_to_score.yaml says what is compared. A task that is
held out runs only when it is named. Each run is a folder OUTPUT/TASK/RUN: a finished one is not
repeated, one that was interrupted goes on. After each run results/time-to-score.csv is written from
all that is in OUTPUT, beside the rows of other runs that it holds already.

With --time nothing is trained: the seconds of a step of each recipe are measured, the recipes in
turn, on a machine that does nothing else. Seconds to a score are steps to it times those: whole
runs take hours, and scores, unlike seconds, do not depend on what else a machine does meanwhile.
Scoring and saving are not counted. A recipe reaches a mark, a part of the validation score that
fine-tuning with the same seed ends with, where the straight line between two evaluations does. The
row with the seed "mean" has the means of a recipe's seeds, and of a mark only where all have
reached it.
"""

import argparse
import dataclasses
import itertools
import json
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import filelock
import transformers
import yaml

from bench import experiments
from bench.experiments import best_rate, command, variant_name
from bench.measure import RESULTS, merge_csv
from bench.step_times import TIMES, size_of_epoch, time_steps
from ptv2_fast.recipes import read_recipe
from ptv2_fast.training import run_folder
from ptv2_fast.training.dry_run import steps
from ptv2_fast.training.options import RunConfig, with_changes
from ptv2_fast.training.prepare import Prepared, prepare, training_arguments
from ptv2_fast.training.run import train

PLAN = Path(__file__).with_suffix(".yaml")
CSV = RESULTS / "time-to-score.csv"
REFERENCE = "fine-tuning"
MARKS = (90, 95, 98)
KEY = ("task", "recipe", "learning rate", "seed")
_MEANS = ("validation", "test", "train seconds", "step seconds", "kept bytes")

Curve = list[tuple[float, float]]  # (steps, score) of each evaluation


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Options of a run but for its seed, and the learning rates to choose from."""

    base: RunConfig
    rates: list[float]


@dataclasses.dataclass(frozen=True)
class Task:
    """Recipes by name, fine-tuning among them.

    Attributes:
        seeds: the first one chooses the learning rates.
        evaluations: in a run.
        held_out: it runs when it is named.
    """

    recipes: dict[str, Recipe]
    seeds: list[int]
    evaluations: int
    held_out: bool = False

    def run(self, folder: Path) -> Iterator[str]:
        """Do the runs that are not finished; yields the name of each."""
        first, *others = self.seeds
        for name, recipe in self.recipes.items():
            for rate in recipe.rates:
                yield self._run(folder, name, rate, first)
            for seed in others:
                yield self._run(folder, name, best_rate(folder, name, recipe.rates, first), seed)

    def _run(self, folder: Path, name: str, rate: float, seed: int) -> str:
        changes = {"learning_rate": rate, "seed": seed}
        config = RunConfig.from_dict(self.recipes[name].base.flat() | changes)
        run = f"{variant_name(name, rate)}-seed-{seed}"
        train_scored(config, folder / run, self.evaluations)
        return run


def train_scored(config: RunConfig, folder: Path, evaluations: int) -> None:
    """A run that is scored so many times, evenly over its steps; nothing when it is finished.

    Raises:
        ValueError: when the run in the folder is another.
    """
    begun = (folder / run_folder.CONFIG).is_file()
    if begun:
        before, _ = run_folder.read_run_config(folder)
        config = _scored_every(config, before.training.eval_steps)
        run_folder.check_same_run(folder, config)
        if (folder / run_folder.REPORT).is_file():
            return
    prepared = prepare(config, folder, resume=begun)
    if not begun:
        _score_evenly(prepared, evaluations)
    train(prepared)
    shutil.rmtree(folder / run_folder.MODEL, ignore_errors=True)  # of fine-tuning: large


def _scored_every(config: RunConfig, count: int | None) -> RunConfig:
    training = dataclasses.replace(config.training, eval_steps=count, save_steps=None)
    return dataclasses.replace(config, training=training)


def _score_evenly(prepared: Prepared, evaluations: int) -> None:
    examples, batches = size_of_epoch(prepared)
    total = steps(prepared, batches)
    if total is None:
        raise ValueError("num_train_epochs: expected a run that ends by its steps")
    prepared.config = _scored_every(prepared.config, max(1, round(total / evaluations)))
    prepared.arguments = training_arguments(
        prepared.config, prepared.folder, examples, batches, prepared.task.metric
    )


def curve_of(folder: Path, metric: str) -> Curve:
    """The validation score over training steps."""
    text = (folder / run_folder.METRICS).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    name = f"eval_{metric}"
    return [(line["step"], line[name]) for line in lines if name in line]


def steps_to(curve: Curve, mark: float) -> float | None:
    """When a score is first reached, on straight lines between evaluations; None = never.

    The first evaluation counts whole: what came before it is not known.
    """
    if curve and curve[0][1] >= mark:
        return curve[0][0]
    for (start, low), (end, high) in itertools.pairwise(curve):
        if high >= mark:
            return start + (end - start) * (mark - low) / (high - low)
    return None


def rows_of(task: Task, name: str, folder: Path, data: Path) -> list[dict[str, Any]]:
    """The finished runs of a task, and a row of means for each recipe whose seeds are all there."""
    first = task.seeds[0]
    chosen = {
        recipe: best_rate(folder, recipe, options.rates, first)
        for recipe, options in task.recipes.items()
    }
    references = {
        seed: _finished(folder, REFERENCE, chosen[REFERENCE], seed) for seed in task.seeds
    }
    times = run_folder.read_json(folder / TIMES) if (folder / TIMES).is_file() else {}
    rows = []
    for recipe, options in task.recipes.items():
        for rate in options.rates:
            own = []
            for seed in task.seeds:
                run = _finished(folder, recipe, rate, seed)
                if run is None:
                    continue
                keys = dict(zip(KEY, (name, recipe, rate, seed), strict=True))
                more = {"held out": task.held_out, "chosen": rate == chosen[recipe]}
                figures = _figures(run, recipe, references[seed], times)
                own.append(keys | more | figures | _origin(run, data))
            rows += own
            if len(own) == len(task.seeds) and rate == chosen[recipe]:
                rows.append(_mean(own))
    return rows


def _finished(folder: Path, recipe: str, rate: float, seed: int) -> Path | None:
    run = folder / f"{variant_name(recipe, rate)}-seed-{seed}"
    return run if (run / run_folder.REPORT).is_file() else None


def _figures(
    run: Path, recipe: str, reference: Path | None, times: dict[str, Any]
) -> dict[str, Any]:
    """The figures of a run.

    Args:
        run: its folder.
        recipe: its name.
        reference: the folder of fine-tuning with the same seed, if that has run.
        times: what `time_steps` wrote; without it there are no seconds.
    """
    report = run_folder.read_report(run)
    metric, metrics = report["metric"], report["metrics"]
    timed = times.get(recipe, {})
    step = timed.get("step seconds")
    row = {
        "method": report["method"],
        "metric": metric,
        "validation": metrics["validation"][metric],
        "test": metrics.get("test", {}).get(metric),
        "train seconds": _product(report["steps"], step),
        "steps": report["steps"],
        "step seconds": step,
        "cores used by others": timed.get("cores used by others"),
        "kept bytes": report["kept_bytes"],
        "trainable parameters": report["trainable_parameters"],
    }
    curve = curve_of(run, metric)
    if reference is not None:
        whole = run_folder.read_report(reference)
        goal = whole["metrics"]["validation"][metric]
        its_step = times.get(REFERENCE, {}).get("step seconds")
        its_seconds = _product(whole["steps"], its_step)
        row["validation / fine-tuning"] = _ratio(row["validation"], goal)
        row["test / fine-tuning"] = _ratio(
            row["test"], whole["metrics"].get("test", {}).get(metric)
        )
        row["seconds / fine-tuning's whole"] = _ratio(row["train seconds"], its_seconds)
        for mark in MARKS if goal > 0 else ():
            seconds = _product(steps_to(curve, goal * mark / 100), step)
            its = _product(steps_to(curve_of(reference, metric), goal * mark / 100), its_step)
            row |= {
                f"seconds to {mark} %": seconds,
                f"to {mark} % / fine-tuning's": _ratio(seconds, its),
                f"to {mark} % / fine-tuning's whole": _ratio(seconds, its_seconds),
            }
    return row | {"curve": json.dumps([(count, round(v, 5)) for count, v in curve])}


def _product(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value * other


def _ratio(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else value / other


def _origin(run: Path, data: Path) -> dict[str, Any]:
    report = run_folder.read_report(run)
    config, _ = run_folder.read_run_config(run)
    return {
        "threads": report["machine"]["threads"],
        "processor": report["machine"]["processor"],
        "versions": json.dumps(report["versions"]),
        "command": command(config, data),
    }


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The means over the seeds, None where a seed has no value."""
    first = rows[0]
    ratios = [name for name in first if "/ fine-tuning" in name or name.startswith("seconds to ")]
    row = {name: first[name] for name in (*KEY, "held out", "chosen", "method", "metric")}
    row["seed"] = "mean"
    for name in (*_MEANS, *ratios):
        found = [r.get(name) for r in rows]
        row[name] = None if None in found else statistics.fmean(found)
    return row


def read_plan(data: Path, output: Path) -> dict[str, Task]:
    """The tasks of time_to_score.yaml, by name."""
    plan = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    known, _ = experiments.read_plan(data, output)
    tasks = {}
    for name, entry in plan["tasks"].items():
        experiment = known[entry.get("experiment", name)]
        own: dict[str, Any] = {k: str(data / v) for k, v in entry.get("options", {}).items()}
        own |= plan["options"]
        base = experiment.base.flat() | own
        recipes = {
            recipe: make_recipe(options | entry.get(recipe, {}), base, experiment.variants)
            for recipe, options in plan["recipes"][entry["recipes"]].items()
        }
        tasks[name] = Task(
            recipes, plan["seeds"], plan["evaluations"], entry.get("held_out", False)
        )
    return tasks


def make_recipe(options: dict[str, Any], base: dict[str, Any], variants: dict[str, Any]) -> Recipe:
    """A recipe of the plan.

    Args:
        options: `from`, perhaps `learning_rates`, and options of a run.
        base: of the task's experiment, flat.
        variants: of the experiment: options and learning rates by name.
    """
    start = options.pop("from")
    if start in variants:
        before, rates = variants[start]
        values = with_changes(base, before)
    else:
        shipped = {} if start == "defaults" else read_recipe(start)
        plain = RunConfig.from_dict(base)
        values = with_changes(dataclasses.asdict(plain.data), shipped)
        values |= {"model": base["model"], "progress": False}
        rates = [RunConfig.from_dict(values).learning_rate]
    rates = options.pop("learning_rates", rates)
    return Recipe(RunConfig.from_dict(with_changes(values, options)), rates)


def run_task(name: str, task: Task, data: Path, output: Path) -> None:
    """Do what is not finished of a task, and write the CSV file after each run."""
    for run in task.run(output / name):
        print(f"{name}/{run}", flush=True)
        write_rows(name, task, data, output)


def write_rows(name: str, task: Task, data: Path, output: Path) -> None:
    """Write what is finished of a task into the CSV file, of which other runs' rows stay.

    Several processes may do so, each with a task of its own.
    """
    with filelock.FileLock(output / "csv.lock"):
        merge_csv(CSV, rows_of(task, name, output / name, data), KEY)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("names", nargs="*", help="tasks (default: all that are not held out)")
    parser.add_argument("--recipes", nargs="+", help="these alone, and fine-tuning")
    parser.add_argument("--time", action="store_true", help="measure the seconds of steps instead")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    tasks = read_plan(arguments.data, arguments.output)
    unknown = set(arguments.names) - set(tasks)
    if unknown:
        parser.error(f"expected names of {list(tasks)}, got {sorted(unknown)}")
    recipes = {recipe for task in tasks.values() for recipe in task.recipes}
    unknown = set(arguments.recipes or []) - recipes
    if unknown:
        parser.error(f"expected recipes of {sorted(recipes)}, got {sorted(unknown)}")
    names = arguments.names or [name for name, task in tasks.items() if not task.held_out]
    wanted = {REFERENCE, *(arguments.recipes or [])}
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in names:
        task = tasks[name]
        if arguments.recipes:
            found = {key: recipe for key, recipe in task.recipes.items() if key in wanted}
            task = dataclasses.replace(task, recipes=found)
        with filelock.FileLock(arguments.output / f"{name}.lock", timeout=0):
            if arguments.time:
                configs = {key: recipe.base for key, recipe in task.recipes.items()}
                time_steps(configs, arguments.output / name)
                write_rows(name, task, arguments.data, arguments.output)
            else:
                run_task(name, task, arguments.data, arguments.output)


if __name__ == "__main__":
    main()
