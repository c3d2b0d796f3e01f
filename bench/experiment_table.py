"""The tables of docs/experiments.md: python -m bench.experiment_table

Of a variant that ran with several learning rates the one is shown that ran with all seeds, since
its run with the first seed scored best on the validation split; of two such the one whose mean over
the seeds is best there, as in the report.
"""

import csv
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence

from bench.experiments import CSV

Row = dict[str, str]

_METHODS = ("fine-tuning", "lora", "p-tuning-v2", "prompt-tuning", "linear-probe")
# Where fine-tuning or P-Tuning v2 is within two standard errors of a constant answer, with the
# score of that: one as a part of the other says nothing there.
_CHANCE = {"boolq": 0.613, "disfl_qa": 0.307, "multirc": 0.599, "rte": 0.527, "wsc": 0.635}
_RUN = re.compile(r"(?P<variant>.+?)(-lr-(?P<rate>.+))?-seed-\d+")


def chosen(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Variant -> its runs, one a seed."""
    settings: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        parts = _RUN.fullmatch(row["run"])
        variant, rate = (parts["variant"], parts["rate"]) if parts else (row["run"], None)
        settings.setdefault(variant, {}).setdefault(rate or "", []).append(row)

    def rank(runs: list[Row]) -> tuple[int, float]:
        return len(runs), mean(runs, "validation")

    return {variant: max(rates.values(), key=rank) for variant, rates in settings.items()}


def mean(rows: Sequence[Row], column: str) -> float:
    """Over the seeds."""
    return statistics.fmean(float(row[column]) for row in rows)


def score(rows: Sequence[Row]) -> str:
    """Mean and sample standard deviation in per cent, of the test split where there is one."""
    values = [100 * float(row["test"] or row["validation"]) for row in rows]
    deviation = f" ±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


def compare(name: str, variants: dict[str, list[Row]]) -> str:
    """A row of the table of methods."""
    prefix, full = variants["p-tuning-v2"], variants["fine-tuning"]
    split = "test" if prefix[0]["test"] else "validation"
    cells = [score(variants[method]) if method in variants else "" for method in _METHODS]
    if name in _CHANCE:
        cells.append(f"chance ({100 * _CHANCE[name]:.1f})")
    else:
        cells.append(f"{100 * mean(prefix, split) / mean(full, split):.1f} %")
    for cost in ("step_seconds", "kept_bytes", "train_seconds"):
        cells.append(f"{mean(prefix, cost) / mean(full, cost):.2f}")
    return table_row(f"{name} ({prefix[0]['metric']}, {split})", cells)


def beside(experiments: dict[str, dict[str, list[Row]]]) -> Iterator[str]:
    """A table of experiments with the same variants: a column each."""
    yield from head("", experiments)
    for variant in next(iter(experiments.values())):
        yield table_row(variant, [score(found[variant]) for found in experiments.values()])


def head(corner: str, columns: Iterable[str]) -> Iterator[str]:
    columns = list(columns)
    yield table_row(corner, columns)
    yield "|" + "---|" * (len(columns) + 1)


def table_row(name: str, cells: Iterable[str]) -> str:
    return f"| {' | '.join((name, *cells))} |"


def main() -> None:
    rows: dict[str, list[Row]] = {}
    with CSV.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["experiment"], []).append(row)
    print(
        *head("", (*_METHODS, "v2 / fine-tuning: score", "step", "kept bytes", "training")),
        sep="\n",
    )
    others: dict[frozenset[str], dict[str, dict[str, list[Row]]]] = {}
    for name, runs in rows.items():
        variants = chosen(runs)
        if {"fine-tuning", "p-tuning-v2"} <= set(variants):
            print(compare(name, variants))
        else:
            others.setdefault(frozenset(variants), {})[name] = variants
    for experiments in others.values():
        print("", *beside(experiments), sep="\n")


if __name__ == "__main__":
    main()
