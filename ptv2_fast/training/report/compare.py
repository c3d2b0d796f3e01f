"""Runs brought together: seeds as one setting, methods on the same data compared."""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas

from ptv2_fast.training.finished_runs import COLUMNS, Result, Run, data_titles, short_names
from ptv2_fast.training.options import NEUTRAL_OPTIONS
from ptv2_fast.training.run_folder import COSTS
from ptv2_fast.training.seeds import over_seeds

# What two runs may differ in and still be one setting: the seed, and what leaves no mark.
_NO_SETTING = NEUTRAL_OPTIONS | {"seed", "logging_steps", "save_steps"}
_METHOD = ["title", "model", "column"]
ABLATION = ["kind", "folder", "title", "label"]  # what the points of one have in common
_VARIED = ["depth", "order", "layers", "num_virtual_tokens", "prefix_projection", "head"]


class Comparison(NamedTuple):
    """The methods on each data set with each model; a method's column is that of the table.

    Attributes:
        results: those of the settings that are shown, with title, model, column, setting (options
            but for the seed), seed, and `settings`: how many were run.
        all_scores: mean, sd and n in 0..1 by title, model, split, metric and column.
        main_scores: by column those of the metric that selects, with title, model, split, metric,
            `label` (of these two), a `result` on that data set, whether it is the data set's
            `first_split`, and means of costs. part: trained of all parameters; best: printed as
            the highest of several; chance: no better than a constant answer; ratio: part of
            fine-tuning's score, NaN where there is none or one of the two is chance.
        ablations: mean, sd and n of what they found, by the columns of ABLATION and what varied.
        titles: of the data set of each result of all runs.
    """

    results: pandas.DataFrame
    all_scores: pandas.DataFrame
    main_scores: pandas.DataFrame
    ablations: pandas.DataFrame
    titles: dict[Result, str]


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare runs, in the order of COLUMNS, on data sets in the order in which they were found.

    Of several settings of a method the one with the most seeds is shown, of these the best on the
    validation split; a run that repeats a seed says nothing more of the spread.
    """
    titles = data_titles(runs)
    every = _results(runs, titles)
    results = every.drop_duplicates([*_METHOD, "setting", "seed"])
    setting = results.groupby([*_METHOD, "setting"])["validation"]
    results = results.assign(
        settings=results.groupby(_METHOD)["setting"].transform("nunique"),
        seeds=setting.transform("size"),
        rank=setting.transform(lambda scores: scores.mean(skipna=False)).fillna(-math.inf),
    )
    ranked = results.sort_values(["seeds", "rank"], ascending=False, kind="stable")
    shown = ranked.groupby(_METHOD)["setting"].transform("first").sort_index()
    results = results[results["setting"] == shown]
    rows = [
        (row.title, row.model, split, metric, row.column, score)
        for row in results.itertuples()
        for split, values in row.result.scores.items()
        for metric, score in values.items()
    ]
    scores = over_seeds(rows, ["title", "model", "split", "metric", "column"])
    main_scores = [
        _main_scores(own, scores.xs(place, level=["title", "model"]))
        for place, own in results.groupby(["title", "model"], sort=False)
    ]
    scores = scores.rename(metric_name, level="metric")
    return Comparison(results, scores, pandas.concat(main_scores), _ablations(every), titles)


def _results(runs: Sequence[Run], titles: dict[Result, str]) -> pandas.DataFrame:
    models = short_names(run.report["model"] for run in runs)
    rows: list[dict[str, Any]] = []
    for run in runs:
        options = {name: v for name, v in run.options.items() if name not in _NO_SETTING}
        for result in run.results:
            rows.append({
                "title": titles[result], "model": models[run.report["model"]],
                "column": run.column, "seed": run.seed, "result": result,
                "setting": json.dumps((result.name, options), sort_keys=True, default=str),
                "validation": result.validation,
                **{name: run.report.get(name) for name in COSTS},
            })  # fmt: skip
    places = [*dict.fromkeys((row["title"], row["model"]) for row in rows)]
    order = [*dict.fromkeys((*COLUMNS, *(row["column"] for row in rows)))]
    rows.sort(key=lambda r: (places.index((r["title"], r["model"])), order.index(r["column"])))
    return pandas.DataFrame(rows).astype(dict.fromkeys(COSTS, float))


def _main_scores(results: pandas.DataFrame, scores: pandas.DataFrame) -> pandas.DataFrame:
    """Of one data set and model."""
    costs = results.groupby("column", sort=False)[[*COSTS]].mean()
    first = results[["title", "model", "result"]].iloc[0]
    metric = first["result"].metric
    splits = [*dict.fromkeys(split for one in results["result"] for split in one.splits)]
    tables = []
    for split in splits:
        rows = scores.query("split == @split and metric == @metric")
        rows = rows.droplevel(["split", "metric"]).join(costs)
        chances = [one.chance(split) for one in results["result"]]
        chance = max((one for one in chances if one is not None), default=-math.inf)
        above_chance = rows["mean"].where(rows["mean"] > chance)
        tables.append(mark_best(rows).assign(
            **first, split=split, label=f"{metric_name(metric)} on {split}", metric=metric,
            first_split=split == splits[0],
            part=rows["trainable_parameters"] / rows["total_parameters"],
            chance=rows["mean"] <= chance,
            ratio=above_chance / (above_chance.get("FT") or math.nan),
        ))  # fmt: skip
    return pandas.concat(tables)


def _ablations(results: pandas.DataFrame) -> pandas.DataFrame:
    rows = []
    for row in results.itertuples():
        result = row.result
        if result.run.ablation is not None:
            kind, values = result.run.ablation
            title, split = f"{row.title}, {row.model}", result.splits[0]
            rows.append({
                "kind": kind, "folder": str(result.run.folder.parent), "title": title,
                "label": f"{metric_name(result.metric)} on {split}", **values,
                "score": result.score(split),
            })  # fmt: skip
    return over_seeds(rows, [*ABLATION, *_VARIED]).reset_index()


def mark_best(scores: pandas.DataFrame) -> pandas.DataFrame:
    """With the column `best`: printed as the highest of several."""
    printed, highest = scores["mean"].map(percent), percent(scores["mean"].max())
    return scores.assign(best=(printed == highest) & (scores["mean"].count() > 1))


def percent(score: float) -> str:
    """0.8812 -> 88.1, as tables print scores."""
    return f"{100 * score:.1f}" if math.isfinite(score) else "not a number"


def metric_name(metric: str) -> str:
    """exact_match -> exact match; f1 -> F1."""
    words = metric.replace("_", " ")
    return words.upper() if len(words) <= 3 and words[-1:].isdigit() else words
