"""What a sweep found: results.csv, a row a run, and summary.json, means over seeds."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas

from ptv2_fast.training import run_folder
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.seeds import over_seeds
from ptv2_fast.training.sweeps.plan import Sweep

RESULTS = "results.csv"
SUMMARY = "summary.json"


@dataclasses.dataclass
class Outcome:
    """What became of the runs of a sweep so far.

    Attributes:
        reports: of the finished ones, by name, as in report.json.
        failures: of the others that were tried, by name, what was wrong.
    """

    reports: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)


def write_sweep_results(folder: Path, sweep: Sweep, outcome: Outcome) -> None:
    """Write both files anew; each is replaced as a whole."""
    run_folder.write_csv(folder / RESULTS, result_rows(sweep, outcome))
    run_folder.write_json(folder / SUMMARY, summarize(sweep, outcome))


def result_rows(sweep: Sweep, outcome: Outcome) -> list[dict[str, Any]]:
    """One row for each run that was tried: name, options that differ, metrics and costs."""
    configs = sweep.configs()
    differing = differing_options(configs)
    rows = []
    for name, config in configs.items():
        if name not in outcome.reports and name not in outcome.failures:
            continue
        options, report = config.flat(), outcome.reports.get(name, {})
        row = {"name": name, **{option: options[option] for option in differing}}
        row["error"] = outcome.failures.get(name, "")
        for split, scores in report.get("metrics", {}).items():
            row |= {f"{split}_{metric}": value for metric, value in scores.items()}
        row |= {cost: report[cost] for cost in run_folder.COSTS if report.get(cost) is not None}
        row |= {f"machine_{key}": value for key, value in report.get("machine", {}).items()}
        rows.append(row)
    return rows


def differing_options(configs: dict[str, RunConfig]) -> list[str]:
    """The options in which the runs differ, and the seed, last."""
    first, *others = [config.flat() for config in configs.values()]
    names = [name for name in first if any(other[name] != first[name] for other in others)]
    return [*(name for name in names if name != "seed"), "seed"]


def summarize(sweep: Sweep, outcome: Outcome) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of each setting.

    Returns:
        kind; groups, each with the options that set it apart, its runs, and by split and metric
        {"n", "mean", "sd"} (sd divides by n - 1 and is None for one seed); failures by name; how
        many runs there are and how many are finished.
    """
    configs = sweep.configs()
    differing = differing_options(configs)[:-1]
    settings: dict[str, list[str]] = {}
    for name, config in configs.items():
        options = config.flat()
        settings.setdefault(json.dumps({n: options[n] for n in differing}), []).append(name)
    groups = []
    for setting, names in settings.items():
        finished = [name for name in names if name in outcome.reports]
        groups.append({
            "options": json.loads(setting),
            "seeds": [configs[name].training.seed for name in names],
            "runs": names,
            "finished": finished,
            "metrics": _over_seeds([outcome.reports[name]["metrics"] for name in finished]),
        })  # fmt: skip
    return {
        "kind": sweep.kind,
        "runs": len(configs),
        "finished": len(outcome.reports),
        "groups": groups,
        "failures": outcome.failures,
    }


def _over_seeds(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """n, mean and sd by split and metric."""
    scores = [
        (split, metric, score)
        for run in runs
        for split, metrics in run.items()
        for metric, score in metrics.items()
    ]
    table = over_seeds(scores, ["split", "metric"])[["n", "mean", "sd"]].astype(object)
    table["sd"] = table["sd"].where(pandas.notna(table["sd"]), None)
    splits = table.groupby("split", sort=False)
    return {split: own.droplevel("split").to_dict("index") for split, own in splits}
