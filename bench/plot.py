"""Draws the plots of the benchmarks from their CSV files only; it never measures.

python -m bench.plot
"""

import csv
import json
from pathlib import Path
from statistics import mean, median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from bench.documented import rounded
from bench.measure import RESULTS

SPEED_UP = "speed-up over "
FRONT_PICTURE = RESULTS.parents[1] / "docs" / "images" / "time-and-memory.svg"
# What the front picture shows: BERT-base, batch 8, T 128, P 20, fp32, dropout 0.1.
FRONT_CASE = "bert-base b8 t128 p20 fp32 d0.1"
FRONT_METHODS = {
    "frozen none": "ptv2-fast",
    "frozen ffn+qkv": 'ptv2-fast, recompute="ffn+qkv"',
    "prefix, peft sdpa": "PEFT prefix tuning",
    "LoRA r8, peft sdpa": "PEFT LoRA, rank 8",
    "full fine-tuning, sdpa": "full fine-tuning",
}


def read(path: Path) -> list[dict[str, str]]:
    """What was measured; of two clocks the replays of graphs, which show the kernels alone."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("status", "ok") == "ok"]
    graphs = [row for row in rows if row.get("clock") == "graph"]
    return graphs or rows


def plot_attention(path: Path) -> Path:
    """Speed-up of forward + backward over each other way, per shape.

    One line of panels per dtype and dropout, one column per density.
    """
    rows = [row for row in read(path) if row["pass"] == "forward+backward"]
    ways = [column for column in rows[0] if column.startswith(SPEED_UP)]
    ways.remove(f"{SPEED_UP}best")  # the lowest of some of the others
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    lines = list(dict.fromkeys((row["dtype"], row["dropout"]) for row in rows))
    densities = list(dict.fromkeys(row["density"] for row in rows))
    panel_width = max(5, len(shapes) * (0.25 + 0.1 * len(ways)))
    figure, axes = plt.subplots(
        len(lines), len(densities), sharex=True, sharey="row", squeeze=False, layout="constrained",
        figsize=(panel_width * len(densities), 2.5 * len(lines) + 2),
    )  # fmt: skip
    for (dtype, dropout), line in zip(lines, axes, strict=True):
        for density, axis in zip(densities, line, strict=True):
            key = (dtype, dropout, density)
            chosen = {
                row["shape"]: row
                for row in rows
                if (row["dtype"], row["dropout"], row["density"]) == key
            }
            _speed_up_bars(axis, [chosen.get(shape, {}) for shape in shapes], ways)
            axis.set_title(f"{dtype}, dropout {dropout}, {float(density):.0%} real tokens")
        line[0].set_ylabel("speed-up")
    for axis in axes[-1]:
        axis.set_xticks(range(len(shapes)), shapes, rotation=45, ha="right")
    figure.suptitle(f"ptv2-fast, forward + backward: speed-up over each way\n{rows[0]['machine']}")
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{place}") for place in range(len(ways))]
    names = [way.removeprefix(SPEED_UP) for way in ways]
    figure.legend(handles, names, loc="outside lower center", ncols=len(ways))
    return _save(figure, path.with_suffix(".png"))


def _speed_up_bars(axis: plt.Axes, rows: list[dict[str, str]], ways: list[str]) -> None:
    """A group of bars for each row, which may be empty; no room for ways that no row has."""
    measured = [way for way in ways if any(row.get(way) for row in rows)]
    width = 0.85 / max(1, len(measured))
    for place, way in enumerate(measured):
        offset = width * (place - (len(measured) - 1) / 2)
        positions = [index + offset for index in range(len(rows))]
        values = [float(row.get(way) or "nan") for row in rows]
        axis.bar(positions, values, width=width, color=f"C{ways.index(way)}")
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.grid(axis="y", linewidth=0.4)
    axis.set_axisbelow(True)
    axis.margins(x=0.01)


def plot_roofline(path: Path) -> Path:
    """Executed flop rate of ours against flops per compulsory byte, one point a row.

    The roof is what the same run measured: the rate of a matrix product, and that of a copy.
    """
    rows = read(path)
    unit = next(column for column in rows[0] if column.startswith("executed ")).split()[1]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = plt.subplots(
        1,
        len(dtypes),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
        figsize=(6 * len(dtypes), 5.5),
    )
    for dtype, axis in zip(dtypes, axes[0], strict=True):
        chosen = [row for row in rows if row["dtype"] == dtype]
        _roof(axis, chosen, unit)
        for color, dropout in enumerate(dict.fromkeys(row["dropout"] for row in chosen)):
            for marker, done in (("o", "forward"), ("^", "forward+backward")):
                points = [row for row in chosen if (row["dropout"], row["pass"]) == (dropout, done)]
                axis.scatter(
                    [_intensity(row, unit) for row in points],
                    [float(row[f"executed {unit}"]) for row in points],
                    marker=marker, s=22, alpha=0.7, color=f"C{color}",
                    label=f"{done}, dropout {dropout}",
                )  # fmt: skip
        axis.set_xlabel("flops per byte read or written at least")
    axes[0, 0].set_ylabel(f"executed {unit}")
    axes[0, 0].legend(loc="lower right", fontsize="small")
    figure.suptitle(f"prefix attention under the roof of this run: {rows[0]['machine']}")
    return _save(figure, path.with_name(f"{path.stem.replace('attention', 'roofline', 1)}.png"))


def _intensity(row: dict[str, str], unit: str) -> float:
    """Executed flops per compulsory byte."""
    giga = 1000 if unit.startswith("T") else 1
    return giga * float(row[f"executed {unit}"]) / float(row["GB/s"])


def _roof(axis: plt.Axes, rows: list[dict[str, str]], unit: str) -> None:
    """The lower of the rates of the matrix product and of the copy, medians over the rows."""
    gemm = median(float(row[f"GEMM {unit}"]) for row in rows)
    copied = median(float(row["copy GB/s"]) for row in rows)
    per_byte = copied / (1000 if unit.startswith("T") else 1)
    intensities = [_intensity(row, unit) for row in rows]
    left, corner, right = min(intensities) / 3, gemm / per_byte, max(intensities) * 2
    bends = sorted({left, min(max(left, corner), right), right})
    axis.loglog(bends, [min(gemm, per_byte * bend) for bend in bends], color="black")
    axis.set_title(f"{rows[0]['dtype']}: GEMM {gemm:.0f} {unit}, copy {copied:.0f} GB/s")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
        scale.set_major_formatter("{x:g}")
        scale.set_minor_formatter("")
    axis.grid(linewidth=0.3)


def plot_training_step(path: Path) -> Path:
    """A panel for each case: the time of a step with its p20 to p80, of every method."""
    rows = read(path)
    figure, panels = _method_panels(rows)
    for axis, chosen in panels:
        names = [row["method"] for row in chosen]
        times = [float(row["step ms"]) for row in chosen]
        below = [max(0, float(row["step ms"]) - float(row["p20 ms"])) for row in chosen]
        above = [max(0, float(row["p80 ms"]) - float(row["step ms"])) for row in chosen]
        axis.barh(names, times, xerr=(below, above), color=_method_colors(chosen))
        for place, row in enumerate(chosen):
            ratio = float(row["time / frozen none"] or "nan")
            axis.text(0, place, f" {ratio:.2f} x", va="center", fontsize="small")
        axis.set_xlabel("ms per step")
    figure.suptitle(f"one training step: {rows[0]['machine']}")
    return _save(figure, path.with_suffix(".png"))


def plot_training_memory(path: Path) -> Path:
    """A panel for each case: kept bytes of every method and, where measured, the step's peak."""
    rows = read(path)
    figure, panels = _method_panels(rows)
    for axis, chosen in panels:
        names = [row["method"] for row in chosen]
        kept = [float(row["kept B/token/layer"] or "nan") for row in chosen]
        formula = [float(row["formula B/token/layer"] or "nan") for row in chosen]
        axis.set_xlabel("bytes kept per real token and layer; line: formula")
        if kept[0] == kept[0]:
            axis.barh(names, kept, color=_method_colors(chosen))
            axis.plot(formula, names, "k|", markersize=9)
        peaks = [row.get("peak MiB") for row in chosen]
        if not any(peaks):
            continue
        if kept[0] != kept[0]:
            axis.barh(names, [float(peak or "nan") for peak in peaks], color=_method_colors(chosen))
            axis.set_xlabel("peak MiB of a step above weights and optimizer")
            continue
        for place, peak in enumerate(peaks):
            axis.text(0, place, f" peak {float(peak):.0f} MiB", va="center", fontsize="small")
    figure.suptitle(f"memory of one training step: {rows[0]['machine']}")
    name = path.stem.replace("training-step", "training-step-memory", 1)
    return _save(figure, path.with_name(f"{name}.png"))


def plot_front(path: Path) -> Path:
    """Time of a step and what it keeps for the backward pass beside the peers', for README."""
    rows = {(row["case"], row["method"]): row for row in read(path)}
    measured = {"step ms": "ms a training step", "kept MiB": "MiB kept for the backward pass"}
    figure, axes = plt.subplots(1, 2, sharey=True, layout="constrained", figsize=(9, 2.9))
    for axis, (column, title) in zip(axes, measured.items(), strict=True):
        for place, (lengths, color) in enumerate((("full", "C0"), ("pad50", "C1"))):
            chosen = [rows[f"{FRONT_CASE} {lengths}", method] for method in FRONT_METHODS]
            values = [float(row[column]) for row in chosen]
            heights = [place * 0.4 - 0.2 + index for index in range(len(values))]
            label = {"full": "no padding", "pad50": "half of the tokens are padding"}[lengths]
            bars = axis.barh(heights, values, height=0.38, color=color, label=label)
            axis.bar_label(
                bars, [f"{int(rounded(value)):,}" for value in values], padding=3, fontsize=8
            )
        axis.set_title(title, fontsize="medium")
        axis.margins(x=0.12)
        axis.xaxis.set_visible(False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0].set_yticks(range(len(FRONT_METHODS)), list(FRONT_METHODS.values()))
    axes[0].invert_yaxis()
    axes[1].legend(loc="lower right", bbox_to_anchor=(1, 0.62), fontsize=8, frameon=False)
    # The same bytes from the same figures: no date, no random names, and text that stays text.
    with plt.rc_context({"svg.hashsalt": "ptv2-fast", "svg.fonttype": "none"}):
        figure.savefig(FRONT_PICTURE, metadata={"Date": None})
    plt.close(figure)
    return FRONT_PICTURE


def plot_time_to_score(path: Path) -> Path:
    """A panel for each task: the validation score over seconds of training steps, of every recipe
    whose steps were timed.

    A line for each seed. Dashed: 90, 95 and 98 % of what fine-tuning ends with, mean over seeds.
    """
    rows = [row for row in read(path) if row["curve"] and row["chosen"] == "True"]
    rows = [row for row in rows if row["step seconds"]]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    lines, columns = -(-len(tasks) // 3), min(3, len(tasks))
    figure, axes = plt.subplots(
        lines, columns, squeeze=False, layout="constrained", figsize=(5.5 * columns, 3.8 * lines)
    )
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    for axis, task in zip(axes.flat, tasks, strict=False):
        chosen = [row for row in rows if row["task"] == task]
        goals = [float(row["validation"]) for row in chosen if row["recipe"] == "fine-tuning"]
        for part in (0.9, 0.95, 0.98) if goals else ():
            axis.axhline(part * mean(goals), color="black", linewidth=0.6, linestyle="--")
        for row in chosen:
            steps, scores = zip(*json.loads(row["curve"]), strict=True)
            seconds = [count * float(row["step seconds"]) for count in steps]
            axis.plot(seconds, scores, color=f"C{recipes.index(row['recipe'])}", linewidth=1)
        machine = f"{chosen[0]['processor']}, {chosen[0]['threads']} threads"
        axis.set_title(f"{task} ({chosen[0]['metric']})\n{machine}", fontsize="small")
        axis.set_xlabel("seconds of training steps")
        axis.grid(linewidth=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("validation score")
    figure.suptitle("score over time")
    handles = [plt.Line2D([], [], color=f"C{place}") for place in range(len(recipes))]
    figure.legend(handles, recipes, loc="outside lower center", ncols=len(recipes))
    return _save(figure, path.with_suffix(".png"))


def plot_serving(path: Path) -> Path:
    """A panel for each case: texts a second over the number of adapters, a line for each way."""
    rows = read(path)
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = plt.subplots(
        1, len(cases), squeeze=False, layout="constrained", figsize=(max(9, 5 * len(cases)), 4.5)
    )
    for axis, case in zip(axes[0], cases, strict=True):
        chosen = [row for row in rows if row["case"] == case]
        for way in dict.fromkeys(row["way"] for row in chosen):
            points = [(int(r["adapters"]), float(r["texts/s"])) for r in chosen if r["way"] == way]
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=way)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_title(f"{case}\n{chosen[0]['machine']}", fontsize="small")
        axis.set_xlabel("adapters in the batch")
        axis.grid(linewidth=0.3)
    axes[0, 0].set_ylabel("texts a second")
    figure.suptitle("many adapters, one batch")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return _save(figure, path.with_suffix(".png"))


def _method_panels(
    rows: list[dict[str, str]],
) -> tuple[plt.Figure, list[tuple[plt.Axes, list[dict[str, str]]]]]:
    """Four panels a line, one for each case with its rows, the first method on top."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    lines = -(-len(cases) // 4)
    columns = min(4, len(cases))
    figure, axes = plt.subplots(
        lines, columns, squeeze=False, layout="constrained", figsize=(5.5 * columns, 3.4 * lines)
    )
    for axis in axes.flat[len(cases) :]:
        axis.remove()
    panels = []
    for axis, case in zip(axes.flat, cases, strict=False):
        axis.set_title(case, fontsize="medium")
        panels.append((axis, [row for row in rows if row["case"] == case][::-1]))
    return figure, panels


def _method_colors(rows: list[dict[str, str]]) -> list[str]:
    return ["C1" if row["method"].startswith(("frozen", "hook")) else "C0" for row in rows]


def _save(figure: plt.Figure, output: Path) -> Path:
    figure.savefig(output, dpi=110)
    plt.close(figure)
    return output


PLOTS = {
    "attention-*.csv": (plot_attention, plot_roofline),
    "training-step-cpu.csv": (plot_front,),
    "training-step-*.csv": (plot_training_step, plot_training_memory),
    "memory-*.csv": (plot_training_memory,),
    "time-to-score.csv": (plot_time_to_score,),
    "serving-cpu.csv": (plot_serving,),
    "gpu-*/attention.csv": (plot_attention, plot_roofline),
    "gpu-*/step.csv": (plot_training_step,),
    "gpu-*/memory.csv": (plot_training_memory,),
}


def main() -> None:
    for pattern, plots in PLOTS.items():
        for path in sorted(RESULTS.glob(pattern)):
            for plot in plots:
                print(plot(path))


if __name__ == "__main__":
    main()
