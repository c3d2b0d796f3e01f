"""What a sweep found: results.csv, a row a run, and summary.json, means over seeds."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ptv2_fast.training import run_folder
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.seeds import over_seeds
from ptv2_fast.training.sweeps.plan import Sweep

RESULTS = "results.csv"
SUMMARY = "summary.json"

_COSTS = (
    "trainable_parameters", "saved_bytes", "steps", "step_seconds", "train_seconds", "kept_bytes",
    "peak_memory_bytes",
)  # fmt: skip


@dataclasses.dataclass
class Outcome:
    """What became of the runs of a sweep so far.

    Attributes:
        reports: of the finished ones, by name, as in report.json.
        failures: of the others that were tried, by name, what was wrong.
    """

    reports: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)


def write_results(folder: Path, sweep: Sweep, outcome: Outcome) -> None:
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
        for split, metrics in scores_of(report).items():
            row |= {f"{split}_{metric}": value for metric, value in metrics.items()}
        row |= {cost: report[cost] for cost in _COSTS if report.get(cost) is not None}
        row |= {f"machine_{key}": value for key, value in report.get("machine", {}).items()}
        rows.append(row)
    return rows


def differing_options(configs: dict[str, RunConfig]) -> list[str]:
    """The options in which the runs differ, and the seed, last."""
    tables = [config.flat() for config in configs.values()]
    names = [name for name in tables[0] if any(t[name] != tables[0][name] for t in tables)]
    return [*(name for name in names if name != "seed"), "seed"]


def scores_of(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The numbers under metrics, by split and name."""
    return {
        split: {name: v for name, v in scores.items() if isinstance(v, int | float)}
        for split, scores in report.get("metrics", {}).items()
    }


def summarize(sweep: Sweep, outcome: Outcome) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of each setting.

    Returns:
        kind; groups, each with the options that set it apart, its runs, and by split and metric
        {"n", "mean", "sd"} (sd divides by n - 1 and is None for one seed); failures by name; how
        many runs there are and how many are finished.
    """
    configs = sweep.configs()
    apart = differing_options(configs)[:-1]
    settings: dict[str, list[str]] = {}
    for name, config in configs.items():
        options = config.flat()
        settings.setdefault(json.dumps({o: options[o] for o in apart}), []).append(name)
    groups = []
    for setting, names in settings.items():
        reports = {name: outcome.reports[name] for name in names if name in outcome.reports}
        groups.append({
            "options": json.loads(setting),
            "seeds": [configs[name].training.seed for name in names],
            "runs": names,
            "finished": list(reports),
            "metrics": _spread([scores_of(report) for report in reports.values()]),
        })  # fmt: skip
    return {
        "kind": sweep.kind,
        "runs": len(configs),
        "finished": len(outcome.reports),
        "groups": groups,
        "failures": outcome.failures,
    }


def _spread(scores: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, Any]]]:
    rows = [
        (split, name, value)
        for score in scores
        for split, metrics in score.items()
        for name, value in metrics.items()
    ]
    spread: dict[str, dict[str, dict[str, Any]]] = {}
    for row in over_seeds(rows, ["split", "metric"]).reset_index().itertuples():
        sd = None if math.isnan(row.sd) else row.sd
        found = {"n": row.n, "mean": row.mean, "sd": sd}
        spread.setdefault(row.split, {})[row.metric] = found
    return spread
