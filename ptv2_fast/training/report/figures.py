"""The figures of a report, each as a PNG and as SVG that takes its colours from the page."""

import html
import io
import itertools
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

INK, FAINT, PAGE = "#1b2430", "#8a94a3", "#fefefe"
# Colours that stay apart in the common forms of colour blindness; markers and dashes differ too.
# The page defines the same names for light and dark.
STYLES = {
    "FT": ("#b8470a", "s", "-"),
    "PT": ("#00785a", "^", (0, (4, 2))),
    "PT-2": ("#0a5fb8", "o", "-"),
    "MPT-2": ("#a23b7c", "D", (0, (6, 2, 1, 2))),
    "Multi-task": ("#6a4fc0", "P", (0, (1, 1.5))),
    "LP": ("#5d6875", "v", (0, (1, 1.5))),
    "P-tuning": ("#8a6500", "X", (0, (4, 2))),
    "LoRA": ("#2f3a48", "<", (0, (6, 2, 1, 2))),
}
_OTHER = ("#5d6876", "h", "-")
VARIABLES = {INK: "ink", FAINT: "faint", PAGE: "page", _OTHER[0]: "series-other"} | {
    colour: f"series-{name.lower()}" for name, (colour, _, _) in STYLES.items()
}
_WIDTH = 4.2  # inches; readable when shrunk to a telephone's width
_LABEL = 22  # characters in a line of a row's label
_SETTINGS: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "ptv2-fast", "text.parse_math": False,
    "font.size": 9.5, "font.family": "sans-serif", "axes.edgecolor": FAINT,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": FAINT, "ytick.color": FAINT,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": FAINT, "grid.alpha": 0.25,
    "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
    "lines.linewidth": 1.4, "lines.markersize": 4.5,
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A drawn figure.

    Attributes:
        name: of the PNG file, and of its place in the page.
        alt: what it shows, in words.
    """

    name: str
    caption: str
    alt: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Line:
    """Points that belong together; `style` is a column of the table."""

    label: str
    style: str
    x: Sequence[float]
    y: Sequence[float]
    deviations: Sequence[float] | None = None
    notes: Sequence[str] = ()


def draw_lines(
    name: str, caption: str, alt: str, lines: Sequence[Line], *, x_label: str, y_label: str,
    ticks: Sequence[float] = (), logarithmic: bool = False, markers: bool = True,
) -> Figure:  # fmt: skip
    """Lines over a common x axis; those of the same label count as one in the legend."""

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for line in lines:
            _draw_line(axes, line, markers)
        _draw_notes(axes, lines)
        if logarithmic:
            axes.set_xscale("log", base=2)
        if ticks:
            axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        if any(any(line.notes) for line in lines):
            axes.margins(y=0.12)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _legend(canvas, axes)

    return _figure(name, caption, alt, draw, 3.0)


def draw_dots(
    name: str, caption: str, alt: str, rows: Sequence[tuple[str, dict[str, float]]], x_label: str
) -> Figure:
    """One row a task, one dot a column of the table."""
    labels = [textwrap.fill(label, _LABEL) for label, _ in rows]
    # A row of one or two lines is one high, each further line adds a half.
    heights = [max(1.0, (label.count("\n") + 1) / 2) for label in labels]
    ends = list(itertools.accumulate(heights))
    places = [end - height / 2 for end, height in zip(ends, heights, strict=True)]

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        columns = list(dict.fromkeys(column for _, values in rows for column in values))
        for place, (_, values) in zip(places, rows, strict=True):
            axes.plot([min(values.values()), max(values.values())], [place, place],
                      color=FAINT, linewidth=1.0, zorder=1)  # fmt: skip
        for column in columns:
            points = [(v[column], place) for place, (_, v) in zip(places, rows, strict=True)
                      if column in v]  # fmt: skip
            colour, marker, _ = STYLES.get(column, _OTHER)
            axes.plot(*zip(*points, strict=True), linestyle="none", marker=marker, color=colour,
                      markersize=7, label=column, markeredgecolor=PAGE,
                      markeredgewidth=0.7)  # fmt: skip
        axes.set_yticks(places, labels, fontsize=8.5, linespacing=1.1)
        axes.set_ylim(ends[-1], 0.0)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(x_label)
        _legend(canvas, axes)

    return _figure(name, caption, alt, draw, 1.2 + 0.32 * ends[-1])


def draw_points(
    name: str, caption: str, alt: str, points: dict[str, list[tuple[float, float]]], *,
    x_label: str, y_label: str, level: float | None = None,
) -> Figure:  # fmt: skip
    """Points of each column of the table over a logarithmic x axis, in per cent."""

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        if level is not None:
            axes.axhline(level, color=FAINT, linewidth=1.0, zorder=1)
        for column, pairs in points.items():
            colour, marker, _ = STYLES.get(column, _OTHER)
            axes.plot(*zip(*pairs, strict=True), linestyle="none", marker=marker, color=colour,
                      markersize=7, label=column, markeredgecolor=PAGE,
                      markeredgewidth=0.7)  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _legend(canvas, axes)

    return _figure(name, caption, alt, draw, 3.0)


def _draw_line(axes: Axes, line: Line, markers: bool) -> None:
    colour, marker, dashes = STYLES.get(line.style, _OTHER)
    axes.plot(line.x, line.y, color=colour, linestyle=dashes, label=line.label,
              zorder=3 if line.style == "PT-2" else 2,
              marker=marker if markers or len(line.x) == 1 else "")  # fmt: skip
    if line.deviations is not None and any(line.deviations):
        axes.errorbar(line.x, line.y, line.deviations, color=colour, linestyle="none",
                      capsize=2.5, elinewidth=1.0)  # fmt: skip


def _draw_notes(axes: Axes, lines: Sequence[Line]) -> None:
    """Above the highest point of a place, below the others."""
    highest: dict[float, float] = {}
    for line in lines:
        for x, y in zip(line.x, line.y, strict=True):
            highest[x] = max(y, highest.get(x, y))
    for line in lines:
        for x, y, note in zip(line.x, line.y, line.notes, strict=False):
            below = y < highest[x]
            axes.annotate(note, (x, y), xytext=(5, -5 if below else 5), fontsize=8,
                          textcoords="offset points", ha="left",
                          va="top" if below else "bottom")  # fmt: skip


def _legend(canvas: Canvas, axes: Axes) -> None:
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if handles:
        columns = min(5, len(handles))
        # Matplotlib fills column by column; the entries are to be read row by row.
        labels = [label for c in range(columns) for label in list(handles)[c::columns]]
        canvas.legend([handles[label] for label in labels], labels, loc="outside upper left",
                      ncols=columns, columnspacing=1.0, handlelength=1.8)  # fmt: skip


def _figure(
    name: str, caption: str, alt: str, draw: Callable[[Canvas], None], height: float
) -> Figure:
    with matplotlib.rc_context(_SETTINGS):
        canvas = Canvas(figsize=(_WIDTH, height), layout="constrained")
        draw(canvas)
        png, svg = io.BytesIO(), io.StringIO()
        canvas.savefig(png, format="png", dpi=200, facecolor="white")
        none: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(svg, format="svg", transparent=True, metadata=none)
    return Figure(name, caption, alt, _for_page(svg.getvalue(), name, alt), png.getvalue())


def _for_page(svg: str, name: str, alt: str) -> str:
    """An SVG file as an element of the page.

    Colours become the page's variables, the font the page's, and names of elements unique.
    """
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None
    inner = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    inner = re.sub(r"<style.*?</style>| font-family: [^;]*;", "", inner, flags=re.DOTALL)
    inner = re.sub(r' transform="rotate\(-0 [^"]*"', "", inner)
    used = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', inner))
    inner = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", inner)
    inner = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", inner)
    inner = inner.replace("xlink:href", "href")
    for colour, variable in VARIABLES.items():
        inner = inner.replace(colour, f"var(--{variable})")
    numbers = r' (?:d|x|y|width|height|transform)="[^"]*"'
    inner = re.sub(numbers, lambda match: _shorter(match[0]), inner)
    inner = re.sub(r"\s*\n\s*", "\n", inner).strip()
    title = f'<title id="{name}-alt">{html.escape(alt)}</title>'
    opening = f'<svg viewBox="{box[1]}" role="img" aria-labelledby="{name}-alt">'
    return f"{opening}{title}{inner}</svg>"


def _shorter(attribute: str) -> str:
    """Coordinates to a tenth of a point, without line ends and what SVG lets one leave out."""
    text = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.1f}", attribute)
    text = " " + " ".join(text.split())
    if "C" not in text:
        text = text.replace(" L ", " ")  # points after M are lines anyway
    return text.replace(".0 ", " ").replace('.0"', '"')
