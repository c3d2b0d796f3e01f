"""What a report says in sentences."""

import math
from collections.abc import Sequence

from ptv2_fast.training.report.compare import Comparison
from ptv2_fast.training.report.data import COLUMNS, Run
from ptv2_fast.training.report.tables import (
    best_columns,
    cost_of,
    metric_name,
    percent,
    share,
)
from ptv2_fast.training.statistic import Statistic

_NAMES = {
    "FT": "fine-tuning", "PT": "prompt tuning", "PT-2": "P-Tuning v2",
    "MPT-2": "P-Tuning v2 from a multi-task prefix", "Multi-task": "the shared multi-task prefix",
    "LP": "the linear probe", "P-tuning": "P-tuning v1", "LoRA": "LoRA",
}  # fmt: skip


def method_name(column: str) -> str:
    """The name of a column inside a sentence."""
    return _NAMES.get(column, column)


def joined(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else ""


def lead(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> str:
    """What was compared, and how P-Tuning v2 stands in all."""
    columns = [name for name in COLUMNS if any(name in one.settings for one in comparisons)]
    columns += sorted({n for one in comparisons for n in one.settings} - set(COLUMNS))
    titles = list(dict.fromkeys(one.title for one in comparisons))
    models = list(dict.fromkeys(one.model for one in comparisons))
    text = (
        f"{_count(len(runs), 'run')} of {joined([method_name(name) for name in columns])} on "
        f"{joined(titles)} with {joined(models)}."
    )
    found = [one.ratio(one.splits[0]) for one in comparisons]
    ratios = [value for value in found if value is not None]
    if ratios:
        low, high = (f"{100 * value:.1f}" for value in (min(ratios), max(ratios)))
        reach = f"{low} %" if low == high else f"{low} to {high} %"
        ahead = sum(value >= 1 for value in ratios)
        text += (
            f" P-Tuning v2 reaches {reach} of fine-tuning's score; it is level or ahead in "
            f"{ahead or 'none'} of {_count(len(ratios), 'comparison')}."
        )
    return text


def finding(one: Comparison) -> str:
    """Which method is best on a data set, and where P-Tuning v2 stands."""
    split = one.splits[0]
    scores = {n: score for n, score in one.scores(split).items() if math.isfinite(score.mean)}
    what = f"{metric_name(one.metric)} on {split}"
    if not scores:
        return f"no run has {what}."
    if len(scores) == 1:
        ((name, score),) = scores.items()
        return f"{what}: only {method_name(name)} has a score, {percent(score.mean)}."
    best = [name for name in scores if name in best_columns(scores)]
    text = f"{what}: {joined([method_name(name) for name in best])} "
    text += f"{'are' if len(best) > 1 else 'is'} best with {percent(scores[best[0]].mean)}."
    if "PT-2" in scores:
        text += _standing(one, scores, best)
    chance = [method_name(name) for name in scores if one.is_chance(name, split)]
    if chance:
        text += f" No better than a constant answer: {joined(chance)}."
    return text


def _standing(one: Comparison, scores: dict[str, Statistic], best: Sequence[str]) -> str:
    own = scores["PT-2"]
    text = "" if "PT-2" in best else f" P-Tuning v2 reaches {percent(own.mean)}"
    ratio = one.ratio(one.splits[0])
    if ratio is not None:
        words = f"{100 * ratio:.1f} % of fine-tuning's {percent(scores['FT'].mean)}"
        text += f", {words}" if text else f" P-Tuning v2 reaches {words}"
    part = cost_of(one.settings["PT-2"], "part")
    if text and part is not None:
        text += f", and trains {share(part)} of the parameters"
    text += "." if text else ""
    named = {"FT", "PT-2", *best}
    rivals = [n for n, score in scores.items() if n not in named and score.mean > own.mean]
    if rivals:
        text += f" It is behind {joined([method_name(name) for name in rivals])} too."
    if ratio is not None and _within_spread(own, scores["FT"]):
        text += " The difference from fine-tuning is within the spread of the seeds."
    return text


def _within_spread(one: Statistic, other: Statistic) -> bool:
    spread = max(one.deviation or 0.0, other.deviation or 0.0)
    return abs(one.mean - other.mean) < spread


def curve_words(what: str, ends: dict[str, float]) -> str:
    """The alternative text of learning curves: each method's best score."""
    order = sorted(ends, key=lambda name: ends[name], reverse=True)
    words = [f"{method_name(name)} {percent(ends[name])}" for name in order]
    return f"{what}. Best values reached: {joined(words)}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
