"""What sweeps compare: figures of prompt depth and length, tables of the two-way comparisons."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptv2_fast.training.report.compare import Names, Setting, settings_of
from ptv2_fast.training.report.data import Run
from ptv2_fast.training.report.figures import Figure, Line, draw_lines
from ptv2_fast.training.report.tables import Cell, Row, Table, best_columns, metric_name, percent
from ptv2_fast.training.report.tables import score_cell as cell
from ptv2_fast.training.statistic import Statistic

_PROJECTION = {False: "prefix itself", True: "computed by an MLP"}
_HEAD = {"linear": "linear layer on [CLS]", "lm": "language-model head, label words"}


@dataclass(frozen=True)
class Sweep:
    """The settings of one sweep on one data set, with what was varied in each."""

    kind: str
    title: str
    settings: tuple[Setting, ...]

    @property
    def split(self) -> str:
        return self.settings[0].first.splits[0]

    @property
    def y_label(self) -> str:
        return f"{metric_name(self.settings[0].first.metric)}, {self.split}"

    def points(self) -> list[tuple[dict[str, Any], Statistic]]:
        """What was varied, and the score; settings without one are passed over."""
        pairs = [(s.first.run.axes, s.score(self.split)) for s in self.settings]
        return [(axes, score) for axes, score in pairs if score is not None]


def find_sweeps(runs: Iterable[Run], names: Names) -> list[Sweep]:
    """The sweeps that the runs were part of, one for each folder, data set and model."""
    groups: dict[tuple[str, Path], list[Run]] = {}
    for run in runs:
        if run.sweep is not None:
            groups.setdefault((run.sweep, run.folder.parent), []).append(run)
    sweeps = []
    for (kind, _), members in groups.items():
        by_data: dict[str, list[Setting]] = {}
        for setting in settings_of(members):
            title = f"{names.title(setting.first)}, {names.model(setting.first)}"
            by_data.setdefault(title, []).append(setting)
        sweeps += [Sweep(kind, title, tuple(own)) for title, own in by_data.items()]
    return sweeps


def sweep_figures(sweeps: Sequence[Sweep]) -> list[Figure]:
    """A figure for each sweep of depth or length that has two points at least."""
    draw = {"depth": _depth, "length": _length}
    figures: list[Figure] = []
    for sweep in sweeps:
        if sweep.kind in draw and len(sweep.points()) > 1:
            name = f"{sweep.kind}-{len(figures) + 1}"
            figures.append(draw[sweep.kind](sweep, name))
    return figures


def sweep_tables(sweeps: Sequence[Sweep]) -> list[Table]:
    """The comparisons of reparameterisation and of heads, one table each."""
    parts = (
        ("reparam", "prefix_projection", _PROJECTION, "Reparameterisation of the prefix"),
        ("head", "head", _HEAD, "Classifier: linear layer or language-model head"),
    )
    tables = []
    for kind, axis, words, caption in parts:
        chosen = [sweep for sweep in sweeps if sweep.kind == kind]
        if chosen:
            tables.append(_two_way(chosen, axis, words, caption))
    return tables


def _two_way(sweeps: Sequence[Sweep], axis: str, words: dict[Any, str], caption: str) -> Table:
    rows = []
    for sweep in sweeps:
        scores = {words.get(axes.get(axis), "?"): score for axes, score in sweep.points()}
        best = best_columns(scores)
        cells = tuple(cell(scores.get(name), name in best) for name in words.values())
        rows.append(Row(Cell(sweep.title, sweep.y_label), cells))
    return Table(caption, "Data set", dict.fromkeys(words.values(), ""), tuple(rows))


def _depth(sweep: Sweep, name: str) -> Figure:
    """The paper's figure 3."""
    orders: dict[str, dict[int, tuple[str, Statistic]]] = {"descending": {}, "ascending": {}}
    for axes, score in sweep.points():
        for order in orders:
            if axes.get("order") in (order, "all"):
                orders[order][int(axes["layers"])] = (str(axes["depth"]), score)
    styles = {"descending": "PT-2", "ascending": "FT"}
    lines = []
    for order, points in orders.items():
        # The prefix in every layer belongs to both lines and is labelled once.
        notes = [
            points[n][0] if order == "descending" or points[n] not in orders["descending"].values()
            else "" for n in sorted(points)
        ]  # fmt: skip
        scores = {count: score for count, (_, score) in points.items()}
        if points:
            lines.append(_line(order, styles[order], scores, notes))
    ticks = sorted({count for points in orders.values() for count in points})
    caption = (
        f"Prompt depth on {sweep.title}: from the bottom layer up (ascending) and from the top "
        "layer down (descending). Labels are the layers with a prefix."
    )
    return draw_lines(
        name, caption, _depth_words(sweep, orders), lines, ticks=ticks,
        x_label="layers with a prefix", y_label=sweep.y_label,
    )  # fmt: skip


def _depth_words(sweep: Sweep, orders: dict[str, dict[int, tuple[str, Statistic]]]) -> str:
    both = set(orders["descending"]) & set(orders["ascending"])
    pairs = [(orders["descending"][n], orders["ascending"][n]) for n in sorted(both)]
    pairs = [(down, up) for down, up in pairs if down[0] != up[0]]
    better = sum(down[1].mean > up[1].mean for down, up in pairs)
    depth, score = max(
        (point for points in orders.values() for point in points.values()),
        key=lambda point: point[1].mean,
    )
    words = f"{sweep.y_label} on {sweep.title} by prompt depth: best is {percent(score.mean)} with "
    words += f"a prefix in layers {depth}."
    if pairs:
        words += f" Upper layers are better than as many lower ones at {better} of {len(pairs)} "
        words += "depths."
    return words


def _length(sweep: Sweep, name: str) -> Figure:
    """The paper's figure 4."""
    by_projection: dict[bool, dict[int, Statistic]] = {}
    for axes, score in sweep.points():
        points = by_projection.setdefault(bool(axes.get("prefix_projection")), {})
        points[int(axes["num_virtual_tokens"])] = score
    styles = {False: "PT-2", True: "FT"}
    lines = [
        _line(_PROJECTION[projection], styles[projection], points)
        for projection, points in sorted(by_projection.items())
    ]
    ticks = sorted({length for points in by_projection.values() for length in points})
    words = []
    for projection, points in sorted(by_projection.items()):
        best = max(points, key=lambda length: points[length].mean)
        words.append(
            f"{_PROJECTION[projection]}, best is {percent(points[best].mean)} at length {best}"
        )
    alt = f"{sweep.y_label} on {sweep.title} by prefix length: {'; '.join(words)}."
    return draw_lines(
        name, f"Prefix length on {sweep.title}.", alt, lines, ticks=ticks, logarithmic=True,
        x_label="prefix length", y_label=sweep.y_label,
    )  # fmt: skip


def _line(label: str, style: str, points: dict[int, Statistic], notes: Sequence[str] = ()) -> Line:
    x = sorted(points)
    return Line(
        label, style, x, [100 * points[n].mean for n in x],
        [100 * (points[n].deviation or 0.0) for n in x], notes,
    )  # fmt: skip
