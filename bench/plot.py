"""Draws the plots of the benchmarks from their CSV files only; it never measures.

python -m bench.plot
"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.measure import RESULTS


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def plot_attention(path: Path) -> Path:
    """Speed-up of forward + backward over each baseline, per shape, one panel per dtype."""
    rows = [row for row in read(path) if row["pass"] == "forward+backward"]
    groups = sorted({(row["dtype"], row["dropout"]) for row in rows}, reverse=True)
    figure, axes = plt.subplots(2, -(-len(groups) // 2), figsize=(12, 8), squeeze=False)
    for axis, (dtype, dropout) in zip(axes.flat, groups, strict=False):
        chosen = [row for row in rows if (row["dtype"], row["dropout"]) == (dtype, dropout)]
        for offset, baseline in enumerate(("concat+sdpa", "concat+eager", "split")):
            values = [float(row[f"speed-up over {baseline}"] or "nan") for row in chosen]
            positions = [index + 0.27 * (offset - 1) for index in range(len(chosen))]
            axis.bar(positions, values, width=0.25, label=baseline)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks(
            range(len(chosen)), [row["shape"] for row in chosen], rotation=30, ha="right"
        )
        axis.set_ylabel("speed-up of ptv2-fast")
        axis.set_title(f"{dtype}, dropout {dropout}")
    figure.suptitle(f"prefix attention, forward + backward: {rows[0]['machine']}")
    axes[0, 0].legend(title="against", loc="lower left", bbox_to_anchor=(0, 1.01))
    return _save(figure, path)


def plot_training_step(path: Path) -> Path:
    """Step time and kept memory of every method, per case."""
    rows = read(path)
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = plt.subplots(2, len(cases), figsize=(4 * len(cases), 7), squeeze=False)
    for column, case in enumerate(cases):
        chosen = [row for row in rows if row["case"] == case][::-1]
        names = [row["method"] for row in chosen]
        for line, (field, unit) in enumerate(
            (("step ms", "ms per step"), ("kept MiB", "kept MiB"))
        ):
            axis = axes[line][column]
            axis.barh(names, [float(row[field]) for row in chosen])
            axis.set_xlabel(unit)
            axis.set_title(case)
            if column:
                axis.set_yticklabels([])
    figure.suptitle(f"one training step, dropout 0.1: {rows[0]['machine']}")
    return _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.tight_layout()
    output = path.with_suffix(".png")
    figure.savefig(output, dpi=110)
    plt.close(figure)
    return output


def main() -> None:
    plots = {"attention": plot_attention, "training-step": plot_training_step}
    for path in sorted(RESULTS.glob("*.csv")):
        for prefix, plot in plots.items():
            if path.name.startswith(prefix):
                print(plot(path))


if __name__ == "__main__":
    main()
