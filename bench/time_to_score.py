"""How soon a recipe reaches fine-tuning's score: python -m bench.time_to_score DATA OUTPUT [TASK]

DATA is what bench.experiment_data wrote; time_to_score.yaml says what is compared. A task that is
held out runs only when it is named. Each run is a folder OUTPUT/TASK/RUN, and a row in
results/time-to-score.csv when it is finished. One whose row is there is not repeated, wherever its
folder is, unless its options have changed; one that was interrupted goes on.

With --time nothing is trained: the seconds of a step of each recipe are measured, the recipes in
turn, on a machine that does nothing else, and written into the rows that are there. Seconds to a
score are steps to it times those: whole runs take hours, and scores, unlike seconds, do not depend
on what else a machine does meanwhile. Scoring and saving are not counted. A recipe reaches a mark,
a part of the validation score that fine-tuning with the same seed ends with, where the straight
line between two evaluations does. The row with the seed "mean" has the means of a recipe's seeds,
and of a mark only where all have reached it.
"""

import argparse
import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import filelock
import transformers
import yaml

from bench import experiments
from bench.experiments import command, variant_name
from bench.measure import RESULTS, write_csv
from bench.score_rows import KEY, REFERENCE, Curve, Row, best_rates, compared, read_rows
from bench.step_times import time_steps
from ptv2_fast.recipes import read_recipe
from ptv2_fast.tasks.option_table import GIVEN
from ptv2_fast.training import run_folder
from ptv2_fast.training.dry_run import steps
from ptv2_fast.training.options import RunConfig, with_changes
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.prepared_run import PreparedRun
from ptv2_fast.training.run import train
from ptv2_fast.training.trainer_arguments import training_arguments

PLAN = Path(__file__).with_suffix(".yaml")
CSV = RESULTS / "time-to-score.csv"


@dataclasses.dataclass(frozen=True)
class ComparedRecipe:
    """Options of a run but for its seed, and the learning rates to choose from."""

    base: RunConfig
    rates: list[float]


@dataclasses.dataclass(frozen=True)
class ComparedTask:
    """Recipes by name, fine-tuning among them.

    Attributes:
        name: the task's.
        seeds: the first one chooses the learning rates.
        evaluations: in a run.
        data: the folder of the data.
        held_out: it runs when it is named.
    """

    name: str
    recipes: dict[str, ComparedRecipe]
    seeds: list[int]
    evaluations: int
    data: Path
    held_out: bool = False

    def run(self, output: Path) -> Iterator[str]:
        """Do the runs that the CSV file does not have, and write their rows; yields their names."""
        first, *others = self.seeds
        for name, recipe in self.recipes.items():
            for rate in recipe.rates:
                yield from self._run(output, name, rate, first)
            best = best_rates(self._rows(), {name: recipe.rates}, first)[name]
            for seed in others:
                yield from self._run(output, name, best, seed)

    def _run(self, output: Path, name: str, rate: float, seed: int) -> Iterator[str]:
        changes = {"learning_rate": rate, "seed": seed}
        config = self.recipes[name].base.changed(changes)
        keys = dict(zip(KEY, (self.name, name, rate, seed), strict=True))
        known = [row for row in self._rows() if all(row[key] == keys[key] for key in KEY)]
        if any(_without_interval(row["command"]) == command(config, self.data) for row in known):
            return
        run = f"{variant_name(name, rate)}-seed-{seed}"
        yield run
        train_scored(config, output / self.name / run, self.evaluations)
        row = figures(output / self.name / run, self.data)
        write_rows(self, output, [keys | {"held out": self.held_out} | row])

    def _rows(self) -> list[Row]:
        return [row for row in read_rows(CSV) if row["task"] == self.name]


def _without_interval(text: str) -> str:
    """A command without what `train_scored` adds to it."""
    return re.sub(r" --eval-steps \d+", "", text)


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
    training = config.training.changed(eval_steps=count, save_steps=None)
    return dataclasses.replace(config, training=training)


def _score_evenly(prepared: PreparedRun, evaluations: int) -> None:
    total = steps(prepared)
    if total is None:
        raise ValueError("num_train_epochs: expected a run that ends by its steps")
    part = prepared.part
    config = _scored_every(part.config, max(1, round(total / evaluations)))
    prepared.config = part.config = config
    prepared.arguments = training_arguments(
        config, prepared.folder, len(part.features["train"]), *prepared.batches, part.task.metric
    )


def curve_of(folder: Path, metric: str) -> Curve:
    """The validation score over training steps."""
    text = (folder / run_folder.METRICS).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    name = f"eval_{metric}"
    return [(line["step"], line[name]) for line in lines if name in line]


def figures(run: Path, data: Path) -> Row:
    """What a run alone says: its row but for the key and for what compares it with others."""
    report = run_folder.read_report(run)
    config, _ = run_folder.read_run_config(run)
    metric, metrics = report["metric"], report["metrics"]
    curve = [(count, round(value, 5)) for count, value in curve_of(run, metric)]
    return {
        "method": report["method"],
        "metric": metric,
        "validation": metrics["validation"][metric],
        "test": metrics.get("test", {}).get(metric),
        "steps": report["steps"],
        "kept bytes": report["kept_bytes"],
        "trainable parameters": report["trainable_parameters"],
        "curve": json.dumps(curve),
        "threads": report["machine"]["threads"],
        "processor": report["machine"]["processor"],
        "versions": json.dumps(report["versions"]),
        "command": command(config, data),
    }


def read_plan(data: Path, output: Path) -> dict[str, ComparedTask]:
    """The tasks of time_to_score.yaml, by name."""
    plan = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    known, _ = experiments.read_plan(data, output)
    tasks = {}
    for name, entry in plan["tasks"].items():
        experiment = known[entry.get("experiment", name)]
        own: dict[str, Any] = {k: str(data / v) for k, v in entry.get("files", {}).items()}
        own |= plan["options"] | entry.get("options", {})
        base = with_changes(experiment.base.options(), own)
        recipes = {
            recipe: make_recipe(options | entry.get(recipe, {}), base, experiment.variants)
            for recipe, options in plan["recipes"][entry["recipes"]].items()
        }
        seeds = entry.get("seeds", plan["seeds"])
        tasks[name] = ComparedTask(
            name, recipes, seeds, plan["evaluations"], data, entry.get("held_out", False)
        )
    return tasks


def make_recipe(
    options: dict[str, Any], base: dict[str, Any], variants: dict[str, Any]
) -> ComparedRecipe:
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
        data = {**plain.data.model_dump(), GIVEN: plain.data.given}
        values = with_changes(data, shipped | {"model": base["model"], "progress": False})
        rates = [RunConfig.from_dict(values).learning_rate]
    rates = options.pop("learning_rates", rates)
    return ComparedRecipe(RunConfig.from_dict(with_changes(values, options)), rates)


def write_rows(
    task: ComparedTask, output: Path, rows: list[Row], seconds: dict[str, Row] | None = None
) -> None:
    """Write runs of a task into the CSV file, and compare all of the task's that it has.

    Several processes may do so, each with a task of its own.

    Args:
        task: the runs'.
        output: has the lock.
        rows: of `figures`, with their keys; they take the place of those with the same keys.
        seconds: what `time_steps` found, by recipe.
    """
    with filelock.FileLock(output / "csv.lock"):
        known = {tuple(row[key] for key in KEY): row for row in [*read_rows(CSV), *rows]}
        own = [row for row in known.values() if row["task"] == task.name]
        for row in own:
            row |= (seconds or {}).get(row["recipe"], {})
        others = [row for row in known.values() if row["task"] != task.name]
        rates = {name: recipe.rates for name, recipe in task.recipes.items()}
        every = [*others, *compared(own, rates, task.seeds)]
        # Whichever process writes last, the file and the tables made from it have one order.
        write_csv(CSV, sorted(every, key=lambda row: (row["task"], row["recipe"])))


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
                write_rows(task, arguments.output, [], time_steps(configs))
            else:
                for run in task.run(arguments.output):
                    print(f"{name}/{run}", flush=True)


if __name__ == "__main__":
    main()
