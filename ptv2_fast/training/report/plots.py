"""Which figures a report has beside those of sweeps: scores, their price, learning curves."""

import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

from ptv2_fast.training import run_folder
from ptv2_fast.training.report.compare import Comparison
from ptv2_fast.training.report.figures import Figure, Line, draw_dots, draw_lines, draw_points
from ptv2_fast.training.report.tables import cost_of, metric_name
from ptv2_fast.training.report.text import curve_words, finding, joined, method_name

_CURVE_POINTS = 150


def overview_figures(comparisons: Sequence[Comparison]) -> list[Figure]:
    """Scores of all methods, and scores against the part that is trained."""
    return [*_score_figure(comparisons), *_parameter_figure(comparisons)]


def _score_figure(comparisons: Sequence[Comparison]) -> list[Figure]:
    rows = []
    for one in comparisons:
        for split in one.splits:
            scores = {
                name: 100 * score.mean
                for name, score in one.scores(split).items()
                if math.isfinite(score.mean)
            }
            if scores:
                model = f", {one.model}" if len({c.model for c in comparisons}) > 1 else ""
                extra = f", {split}" if len(one.splits) > 1 else ""
                rows.append((f"{one.title}{extra}{model}", scores))
    if all(len(scores) < 2 for _, scores in rows):
        return []
    alt = " ".join(f"{one.title}, {one.model}: {finding(one)}" for one in comparisons)
    caption = "Score of each method by data set, in per cent."
    return [draw_dots("scores", caption, alt, rows, "score, per cent")]


def _parameter_figure(comparisons: Sequence[Comparison]) -> list[Figure]:
    points: dict[str, list[tuple[float, float]]] = {}
    for one in comparisons:
        for name in one.scores(one.splits[0]):
            part, ratio = cost_of(one.settings[name], "part"), one.ratio(one.splits[0], name)
            if part and ratio is not None:
                points.setdefault(name, []).append((100 * part, 100 * ratio))
    if len(points) < 2:
        return []
    words = []
    for name, pairs in points.items():
        trained, reached = (statistics.fmean(values) for values in zip(*pairs, strict=True))
        words.append(f"{method_name(name)} trains {trained:.2g} % and reaches {reached:.1f} %")
    caption = "Score against the part of the parameters that is trained; fine-tuning is 100."
    alt = f"Means over the data sets, scores as parts of fine-tuning's: {joined(words)}."
    figure = draw_points(
        "parameters", caption, alt, points,
        x_label="part trained", y_label="per cent of fine-tuning", level=100,
    )  # fmt: skip
    return [figure]


def curve_figures(comparisons: Sequence[Comparison]) -> list[Figure]:
    """Two figures for each comparison: over seconds of training, and over steps."""
    axes = (("train_seconds", "seconds of training steps"), ("step", "steps"))
    figures: list[Figure] = []
    for one in comparisons:
        for key, label in axes:
            lines = _curves(one, key)
            if lines:
                name = _unique(f"curve-{slug(one.title)}-{key.split('_')[-1]}", figures)
                figures.append(_curve_figure(one, name, label, lines))
    return figures


def _curve_figure(one: Comparison, name: str, label: str, lines: Sequence[Line]) -> Figure:
    ends: dict[str, float] = {}
    for line in lines:
        ends[line.style] = max(ends.get(line.style, 0.0), max(line.y) / 100)
    y_label = f"{metric_name(one.metric)}, validation"
    caption = f"{one.title}, {one.model}: validation {metric_name(one.metric)} over {label}."
    alt = curve_words(f"{y_label} on {one.title} over {label}", ends)
    return draw_lines(name, caption, alt, lines, x_label=label, y_label=y_label, markers=False)


def _curves(one: Comparison, key: str) -> list[Line]:
    lines = []
    for column, setting in one.settings.items():
        for result in setting.results:
            name = f"{result.prefix}_{one.metric}"
            points = [
                (line[key], 100 * line[name])
                for line in result.run.curve
                if _is_number(line.get(name)) and _is_number(line.get(key))
            ]
            points = points[:: max(1, len(points) // _CURVE_POINTS)]
            if points:
                x, y = zip(*points, strict=True)
                lines.append(Line(column, column, x, y))
    return lines


def _is_number(value: Any) -> bool:
    return run_folder.is_number(value) and math.isfinite(value)


def slug(text: str) -> str:
    """Text as a part of file names and of names in the page."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _unique(name: str, figures: Sequence[Figure]) -> str:
    taken = {figure.name for figure in figures}
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name}-{number}", number + 1
    return unique
