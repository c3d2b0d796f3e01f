"""The rows of time_to_score: marks on curves, what stands beside fine-tuning, means over seeds."""

import contextlib
import csv
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REFERENCE = "fine-tuning"
MARKS = (90, 95, 98)
MEAN = "mean"  # in place of a seed
KEY = ("task", "recipe", "learning rate", "seed")
_MEANS = ("validation", "test", "train seconds", "step seconds", "kept bytes")
_WORDS = {"": None, "True": True, "False": False}

Row = dict[str, Any]  # of the CSV file
Curve = list[tuple[float, float]]  # (steps, score) of each evaluation


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


def best_rates(
    rows: list[Row], rates: Mapping[str, Sequence[float]], seed: int
) -> dict[str, float]:
    """Of each recipe the learning rate that validates best with a seed.

    Args:
        rows: of one task.
        rates: of each recipe, those to choose from.
        seed: the one to choose by.
    """

    def score(*run: Any) -> float:
        own = (row["validation"] for row in rows if tuple(row[key] for key in KEY[1:]) == run)
        return max(own, default=-math.inf)

    return {
        recipe: max(own, key=lambda rate, recipe=recipe: score(recipe, rate, seed))
        for recipe, own in rates.items()
    }


def compared(
    rows: list[Row], rates: Mapping[str, Sequence[float]], seeds: Sequence[int]
) -> list[Row]:
    """The rows of a task beside fine-tuning with the same seed, and a row of means for each recipe
    whose seeds are all there.

    Args:
        rows: of one task.
        rates: of each recipe, those to choose from.
        seeds: all of them; the first one chooses.
    """
    chosen = best_rates(rows, rates, seeds[0])
    order = {name: place for place, name in enumerate(rates)}
    rows = [row for row in rows if row["seed"] != MEAN]
    rows.sort(
        key=lambda row: (order.get(row["recipe"], len(order)), row["learning rate"], row["seed"])
    )
    for row in rows:
        if row["recipe"] in chosen:
            row["chosen"] = row["learning rate"] == chosen[row["recipe"]]
    references = {r["seed"]: r for r in rows if r["recipe"] == REFERENCE and r["chosen"]}
    table = []
    for _, own in itertools.groupby(rows, lambda row: (row["recipe"], row["learning rate"])):
        runs = [row | ratios(row, references.get(row["seed"])) for row in own]
        table += runs
        if runs[0]["chosen"] and {row["seed"] for row in runs} == {*seeds}:
            table.append(_mean(runs))
    return table


def ratios(row: Row, reference: Row | None) -> Row:
    """Seconds of a run, and what they and its scores are beside fine-tuning's with the same seed.

    Seconds of runs whose steps were timed on different machines are not compared.
    """
    step = row.get("step seconds")
    seconds = _product(row["steps"], step)
    if reference is None:
        return {"train seconds": seconds}
    is_alike = row.get("timed on") == reference.get("timed on")
    its_step = reference.get("step seconds") if is_alike else None
    its_seconds = _product(reference["steps"], its_step)
    goal = reference["validation"]
    found = {
        "train seconds": seconds,
        "validation / fine-tuning": _ratio(row["validation"], goal),
        "test / fine-tuning": _ratio(row["test"], reference["test"]),
        "seconds / fine-tuning's whole": _ratio(seconds, its_seconds),
    }
    curve, its_curve = json.loads(row["curve"]), json.loads(reference["curve"])
    for mark in MARKS if goal > 0 else ():
        reached = _product(steps_to(curve, goal * mark / 100), step)
        its = _product(steps_to(its_curve, goal * mark / 100), its_step)
        found |= {
            f"seconds to {mark} %": reached,
            f"to {mark} % / fine-tuning's": _ratio(reached, its),
            f"to {mark} % / fine-tuning's whole": _ratio(reached, its_seconds),
        }
    return found


def _product(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value * other


def _ratio(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else value / other


def _mean(rows: list[Row]) -> Row:
    """The means over the seeds, None where a seed has no value."""
    first = rows[0]
    more = [name for name in first if "/ fine-tuning" in name or name.startswith("seconds to ")]
    row = {name: first[name] for name in (*KEY, "held out", "chosen", "method", "metric")}
    row["seed"] = MEAN
    for name in (*_MEANS, *more):
        found = [r.get(name) for r in rows]
        row[name] = None if None in found else statistics.fmean(found)
    return row


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file, numbers read; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
