"""The README's tables of the experiments: python -m bench.experiment_table

Of a variant that ran with several learning rates the one is shown that ran with all seeds, since
its run with the first seed scored best on the validation split; of two such the one whose mean over
the seeds is best there, as in the report.
"""

import csv
import re
import statistics
from collections.abc import Iterator, Sequence

from bench.experiments import CSV
from ptv2_fast.training.statistic import Statistic

Row = dict[str, str]

_METHODS = ("fine-tuning", "lora", "p-tuning-v2", "prompt-tuning", "linear-probe")
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
    found = Statistic.of([100 * float(row["test"] or row["validation"]) for row in rows])
    assert found is not None
    deviation = "" if found.deviation is None else f" ±{found.deviation:.1f}"
    return f"{found.mean:.1f}{deviation}"


def lines(name: str, rows: Sequence[Row]) -> Iterator[str]:
    """A row where methods are compared, else a row a variant."""
    variants = chosen(rows)
    if not {"fine-tuning", "p-tuning-v2"} <= set(variants):
        for variant, runs in variants.items():
            yield f"| {name}, {variant} | {score(runs)} |"
        return
    prefix, full = variants["p-tuning-v2"], variants["fine-tuning"]
    split = "test" if prefix[0]["test"] else "validation"
    cells = [score(variants[method]) if method in variants else "" for method in _METHODS]
    cells.append(f"{100 * mean(prefix, split) / mean(full, split):.1f} %")
    for cost in ("step_seconds", "kept_bytes", "train_seconds"):
        cells.append(f"{mean(prefix, cost) / mean(full, cost):.2f}")
    yield f"| {name} ({prefix[0]['metric']}, {split}) | {' | '.join(cells)} |"


def main() -> None:
    experiments: dict[str, list[Row]] = {}
    with CSV.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            experiments.setdefault(row["experiment"], []).append(row)
    ratios = "v2 / fine-tuning: score | step | kept bytes | training"
    print(f"| | {' | '.join(_METHODS)} | {ratios} |")
    print("|" + "---|" * (len(_METHODS) + 5))
    for name, rows in experiments.items():
        print("\n".join(lines(name, rows)))


if __name__ == "__main__":
    main()
