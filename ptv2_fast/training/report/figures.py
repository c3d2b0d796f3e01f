"""The figures of a report, each as a PNG and as SVG for its page."""

import html
import io
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy
import pandas
from matplotlib.figure import Figure

from ptv2_fast.training.report.compare import ABLATION, metric_name

_INK, _FAINT = "#1b2430", "#7d8794"  # the page has its own colour of text instead of the first
# Seen on white and on black, apart in the common forms of colour blindness; shapes differ too.
STYLES: dict[str, tuple[str, str, Any]] = {
    "FT": ("#c8591a", "s", "-"), "PT": ("#12876a", "^", (0, (4, 2))),
    "PT-2": ("#2f79cc", "o", "-"), "MPT-2": ("#b8509a", "D", (0, (6, 2, 1, 2))),
    "Multi-task": ("#7a62cc", "P", (0, (1, 1.5))), "LP": ("#6b7684", "v", (0, (1, 1.5))),
    "P-tuning": ("#97751a", "X", (0, (4, 2))), "LoRA": ("#5a7090", "<", (0, (6, 2, 1, 2))),
    "": ("#747f8c", "h", "-"),  # any other
}  # fmt: skip
_SETTINGS: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9.5, "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK, "text.color": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": _FAINT,
    "grid.alpha": 0.25, "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.4,
}  # fmt: skip
# By kind of ablation: what is drawn along the axis, what a line is of, and the axis' label.
_ABLATIONS = {
    "depth": ("layers", "order", "layers with a prefix"),
    "length": ("num_virtual_tokens", "prefix_projection", "prefix length"),
}
WORDS = {
    False: "prefix itself", True: "computed by an MLP", "linear": "linear layer on [CLS]",
    "lm": "language-model head, label words",
}  # fmt: skip


class Drawing(NamedTuple):
    """A drawn figure; `alt` says what it shows, and `name` is that of the PNG file."""

    name: str
    caption: str
    alt: str
    svg: str
    png: bytes


def draw(
    name: str, caption: str, points: pandas.DataFrame, x_label: str, y_label: str = "", *,
    rows: Sequence[str] = (), joined: bool = True, ticks: Any = (), base: int = 0,
) -> Drawing:  # fmt: skip
    """Draw points with x, y and `label`, which is a key of STYLES unless there is a `style`; and as
    far as there are with `line` (which of several of a label), `sd` of y and `note`.

    `rows` are names that y counts, from the top. With `base` the x axis is logarithmic.
    """
    labels = [textwrap.fill(row, 22) for row in rows]
    lines = max(2, *(label.count("\n") + 1 for label in labels)) if rows else 2
    height = 1.2 + 0.16 * len(rows) * lines if rows else 3.0
    plain = {"line": 0, "sd": 0.0, "note": "", "style": points["label"]}
    points = points.assign(**{n: v for n, v in plain.items() if n not in points})
    points["below"] = points["y"] < points.groupby("x")["y"].transform("max")
    with matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": name}):
        canvas = Figure(figsize=(4.2, height), layout="constrained")  # readable on a telephone
        axes = canvas.subplots()
        handles: dict[str, Any] = {}
        for (label, style, _), own in points.groupby(["label", "style", "line"], sort=False):
            colour, marker, dashes = STYLES.get(style, STYLES[""])
            handles[label] = axes.errorbar(
                own["x"], own["y"], own["sd"] if own["sd"].any() else None, color=colour,
                marker=marker if len(own) <= 12 or not joined else "", capsize=2.5,
                markersize=4.5 if joined else 7, linestyle=dashes if joined else "",
            )  # fmt: skip
            for x, y, note, below in own[["x", "y", "note", "below"]].itertuples(index=False):
                axes.annotate(note, (x, y), (5, -5 if below else 5), textcoords="offset points",
                              fontsize=8, va="top" if below else "bottom")  # fmt: skip
        if base:
            axes.set_xscale("log", base=base)
        if len(ticks):
            axes.set_xticks(ticks)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.margins(y=0.12)
        axes.set(xlabel=x_label, ylabel=y_label)
        if rows:
            axes.set_yticks(range(len(rows)), labels, fontsize=8.5)
            axes.set_ylim(len(rows) - 0.5, -0.5)
        canvas.legend([*handles.values()], [*handles], loc="outside upper left", ncols=4)
        png, svg = io.BytesIO(), io.StringIO()
        canvas.savefig(png, format="png", dpi=200, facecolor="white")
        canvas.savefig(svg, format="svg", transparent=True)
    highest = points.groupby("label", sort=False)["x" if rows else "y"].max()
    words = ", ".join(f"{label} {value:.1f}" for label, value in highest.items())
    alt = f"{caption} Highest: {words}."
    return Drawing(name, caption, alt, _inline(svg.getvalue(), name, alt), png.getvalue())


def _inline(svg: str, name: str, alt: str) -> str:
    """An SVG file as an element of the page, whose font and colour of text are the page's."""
    inner = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    inner = re.sub(r"<(metadata|style).*?</\1>| font-family: [^;]*;", "", inner, flags=re.DOTALL)
    used = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', inner))
    inner = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", inner)
    inner = inner.replace("xlink:href", "href").replace(_INK, "currentColor")
    numbers = r' (?:d|x|y|transform)="[^"]*"'
    inner = re.sub(numbers, lambda m: re.sub(r"(\.\d)\d+", r"\1", m[0]), inner)
    box = svg.partition('viewBox="')[2].partition('"')[0]
    opening = f'<svg viewBox="{box}" role="img" aria-labelledby="{name}-alt">'
    return f'{opening}<title id="{name}-alt">{html.escape(alt)}</title>{inner}</svg>'


def overview_drawings(main_scores: pandas.DataFrame) -> list[Drawing]:
    """Scores of all methods, and scores against the part that is trained."""
    table, drawings = main_scores.dropna(subset="mean"), []
    names = table["title"] + ", " + table["split"]
    names = names + ", " + table["model"] if table["model"].nunique() > 1 else names
    rows = [*dict.fromkeys(names)]
    table = table.assign(label=table.index, x=100 * table["mean"], y=names.map(rows.index), sd=0.0)
    if table["label"].nunique() > 1:
        caption = "Score of each method by data set, in per cent."
        drawings.append(draw("scores", caption, table, "score, per cent", rows=rows, joined=False))
    table = table.assign(x=100 * table["part"], y=100 * table["ratio"]).dropna(subset=["x", "y"])
    table = table[table["first_split"] & (table["x"] > 0)]
    if table["label"].nunique() > 1:
        caption = "Score against the part of the parameters that is trained; fine-tuning is 100."
        drawings.append(draw("parameters", caption, table, "part trained, per cent",
                             "per cent of fine-tuning", joined=False, base=10))  # fmt: skip
    return drawings


def curve_drawings(results: pandas.DataFrame) -> list[Drawing]:
    """Two for each data set and model: over seconds of training, and over steps."""
    drawings: dict[str, Drawing] = {}
    axes = {"seconds": ("train_seconds", "seconds of training steps"), "step": ("step", "steps")}
    models = results.groupby("title")["model"].nunique()
    for (title, model), own in results.groupby(["title", "model"], sort=False):
        words = title if models[title] == 1 else f"{title} {model}"
        start = f"curve-{re.sub('[^a-z0-9]+', '-', words.lower()).strip('-')}"
        start += f"-{len(drawings)}" * any(name.startswith(f"{start}-s") for name in drawings)
        for axis, (key, label) in axes.items():
            lines = []
            for number, (column, result) in enumerate(own[["column", "result"]].values):
                score = "_".join(filter(None, ("eval", result.name, result.metric)))
                table = pandas.DataFrame(result.run.curve).reindex(columns=[key, score])
                table = table.apply(pandas.to_numeric, errors="coerce").set_axis(["x", "y"], axis=1)
                table = table[numpy.isfinite(table).all(axis=1)]
                table = table.iloc[:: max(1, len(table) // 150)]  # no more are seen
                lines.append(table.assign(y=100 * table["y"], label=column, line=number))
            points = pandas.concat(lines)
            if len(points):
                y_label = f"{metric_name(result.metric)} on validation"
                caption, name = f"{title}, {model}: {y_label} over {label}.", f"{start}-{axis}"
                drawings[name] = draw(name, caption, points, label, y_label)
    return [*drawings.values()]


def ablation_drawings(ablations: pandas.DataFrame) -> list[Drawing]:
    """The paper's figures 3 and 4, of ablations of depth and length that have two points at least.

    The prefix in every layer belongs to both lines of figure 3.
    """
    drawings: list[Drawing] = []
    for (kind, _, title, y_label), own in ablations.groupby(ABLATION, sort=False):
        if kind not in _ABLATIONS or len(own) < 2:
            continue
        x, by, x_label = _ABLATIONS[kind]
        own = own.assign(x=own[x], y=100 * own["mean"], sd=100 * own["sd"].fillna(0))
        own = own.assign(note=own["depth"]) if kind == "depth" else own
        whole = own[own[by] == "all"]
        lines = {"all": whole.assign(label="all")} if len(whole) == len(own) else {}
        for value, line in own.drop(whole.index).groupby(by, sort=False):
            line = pandas.concat([line, whole]).assign(label=WORDS.get(value, value))
            lines[value] = line.sort_values("x")
        styles = ["PT-2", "FT", *lines][: len(lines)]
        points = pandas.concat(lines.values(), keys=styles, names=["style"]).reset_index(0)
        caption = f"Prefix {kind} on {title}."
        if {"ascending", "descending"} <= lines.keys():
            pairs = lines["descending"].merge(lines["ascending"], on="x")
            pairs = pairs[pairs["depth_x"] != pairs["depth_y"]]
            better = (pairs["mean_x"] > pairs["mean_y"]).sum()
            caption += (
                " Labels are the layers with a prefix, from the bottom (ascending) or the top "
            )
            caption += "(descending). Upper layers are better than as many lower ones at "
            caption += f"{better} of {len(pairs)} depths."
        name, base = f"{kind}-{len(drawings) + 1}", 2 if kind == "length" else 0
        drawings.append(
            draw(name, caption, points, x_label, y_label, ticks=own["x"].unique(), base=base)
        )
    return drawings
