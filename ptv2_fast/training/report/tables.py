"""The tables of a report."""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy
import pandas

from ptv2_fast.tasks.comparison import ERROR
from ptv2_fast.training.finished_runs import COLUMNS, COUNTS, Result, Run
from ptv2_fast.training.report.compare import SWEEP, mark_best, metric_name, percent
from ptv2_fast.training.report.figures import WORDS
from ptv2_fast.training.seeds import over_seeds

# (task, model) -> the published figures; as ptv2_fast.recipes.published.published.
Published = Callable[[str, str], Sequence[Any]]
NONE = "–"  # noqa: RUF001
_LABELS = 20  # of a table of who was taken for whom
_PAPER = ("FT", "PT", "PT-2", "MPT-2")  # its columns
# Units by the value from which on they are printed: (from, how much one is, name).
SHARES = ((0, 0.01, "%"),)
_TIMES = ((7200, 3600, "h"), (120, 60, "min"), (1, 1, "s"), (0, 1e-3, "ms"))
_SIZES = ((1e9, 1e9, "GB"), (1e6, 1e6, "MB"), (1e3, 1e3, "kB"), (0, 1, "B"))
_COSTS: dict[str, tuple[str, Any]] = {
    "Trained parameters": ("trainable_parameters", ()),
    "Part trained": ("part", SHARES),
    "Saved": ("saved_bytes", _SIZES),
    "A step": ("step_seconds", _TIMES),
    "Training": ("train_seconds", _TIMES),
    "Kept for backward": ("kept_bytes", _SIZES),
    "Peak memory": ("peak_memory_bytes", _SIZES),
}


class Html(str):
    """Text that is HTML already."""

    def __html__(self) -> "Html":  # what jinja2 asks for
        return self


class Table(NamedTuple):
    """A table of text and of Html."""

    caption: str
    cells: pandas.DataFrame
    notes: Sequence[str] = ()
    kind: str = "numeric"

    @property
    def html(self) -> Html:
        """The element of the page."""
        cells = self.cells.astype(object).fillna(NONE).map(_escaped)
        cells = cells.rename(index=_escaped, columns=_escaped)
        with pandas.option_context("display.max_colwidth", None):
            text = cells.to_html(escape=False, index_names=False, border=0, classes=self.kind)
        head, _, body = text.replace("<th></th>", "<td></td>").partition("<tbody>")
        head = head.replace("<thead>", f"<caption>{escape(self.caption)}</caption><thead>")
        head = head.replace("<th>", '<th scope="col">').replace(' style="text-align: right;"', "")
        body = re.sub("<th(?=[ >])", '<th scope="row"', body.replace(' valign="top"', ""))
        return Html(f"{head}<tbody>{body}")


def _escaped(text: object) -> str:
    return text if isinstance(text, Html) else escape(str(text))


def _cell(text: str, *details: str, best: bool = False) -> Html:
    """Text, and smaller lines under it."""
    first = f"<b>{escape(text)}</b>" if best else escape(text)
    lines = [f"<small>{escape(line)}</small>" for line in details if line]
    return Html("<br>".join([first, *lines]))


def score_cells(scores: pandas.DataFrame, more: Mapping[Any, str] | None = None) -> pandas.Series:
    """Mean, standard deviation and number of seeds, and more under them; the best in bold."""
    more = more or {}
    cells = {name: _cell(NONE, text) for name, text in more.items()}
    for row in scores.itertuples():
        spread = "" if pandas.isna(row.sd) else f"±{100 * row.sd:.1f}, n={row.n}"
        best = getattr(row, "best", False)
        cells[row.Index] = _cell(percent(row.mean), spread, more.get(row.Index, ""), best=best)
    return pandas.Series(cells, dtype=object).rename_axis(index=scores.index.names)


def scaled(value: float, units: Any) -> str:
    """A cost with three digits."""
    if pandas.isna(value):
        return NONE
    for start, size, unit in units:
        if value >= start:
            return f"{float(f'{value / size:.3g}'):g} {unit}"
    return f"{value:,.0f}"


def paper_tables(standing: pandas.DataFrame, find: Published | None = None) -> list[Table]:
    """The table in the paper's form for each model: a row for each data set and split."""
    tables = []
    for model, own in standing.groupby("model", sort=False):
        rows: dict[Html, dict[str, Any]] = {}
        sources: dict[str, str] = {}
        for (title, split), scores in own.groupby(["title", "split"], sort=False):
            metric, result = scores["metric"].iloc[0], scores["result"].iloc[0]
            whole = all(result.data.get(name) is None for name in COUNTS)
            printed = {}
            for one in find(result.task, result.run.report["model"]) if find and whole else ():
                asked = (one.metric, one.split, one.head) == (metric, split, "linear")
                if asked and one.column not in printed:
                    mark = "" if one.verified else "†"
                    printed[one.column] = f"published {one.value:.1f}{mark}"
                    sources[one.source] = sources.get(one.source, "") or mark
            row = rows[_cell(title, f"{split}, {metric_name(metric)}")] = dict.fromkeys(
                _PAPER, NONE
            )
            row |= {**score_cells(scores, printed), "PT-2 / FT": _ratio(scores)}
        heads = pandas.Index([*rows], dtype=object)  # which keeps it Html
        cells = pandas.DataFrame([*rows.values()], heads, dtype=object)
        cells = cells[sorted(cells, key=lambda name: [*COLUMNS, name, "PT-2 / FT"].index(name))]
        notes = [f"Published: {', '.join(sorted(sources))} (Liu et al. 2022)."] if sources else []
        if any(sources.values()):
            notes.append("† could not be compared with the printed table.")
        if (cells["PT-2 / FT"] == "chance").any():
            notes.append("chance: one of the two is no better than a constant answer.")
        tables.append(Table(f"{model}: scores in per cent", cells, notes))
    return tables


def _ratio(scores: pandas.DataFrame) -> str:
    """P-Tuning v2's score as a part of fine-tuning's."""
    known = scores.reindex(["FT", "PT-2"])
    if pandas.notna(known["ratio"]["PT-2"]):
        return f"{percent(known['ratio']['PT-2'])} %"
    return "chance" if known["mean"].notna().all() and known["chance"].any() else NONE


def metrics_table(scores: pandas.DataFrame) -> Table:
    """Every metric on every split."""
    cells = score_cells(scores).unstack("column", sort=False)
    cells.index = pandas.MultiIndex.from_tuples(
        (f"{title}, {model}", f"{split}, {metric_name(metric)}")
        for title, model, split, metric in cells.index
    )
    return Table("Every metric on every split, times 100", cells)


def cost_table(standing: pandas.DataFrame) -> Table:
    """Score and cost of each method, by data set and model."""
    table = standing[standing["first"]]
    groups = table["title"] + ", " + table["model"] + ": " + table["metric"].map(metric_name)
    table = table.set_index([groups + " on " + table["split"], table.index])
    cells = pandas.DataFrame({"Score": score_cells(table)})
    for title, (name, units) in _COSTS.items():
        cells[title] = [scaled(value, units) for value in table[name]]
    return Table("Scores beside what they cost; means over seeds", cells)


def sweep_tables(sweeps: pandas.DataFrame) -> list[Table]:
    """The comparisons of reparameterisation and of heads, one table each."""
    tables = []
    for kind, axis, caption in (
        ("reparam", "prefix_projection", "Reparameterisation of the prefix"),
        ("head", "head", "Classifier: linear layer or language-model head"),
    ):
        rows = {
            f"{title}: {label}": score_cells(mark_best(own.set_index(own[axis].map(WORDS))))
            for (_, _, title, label), own in sweeps[sweeps["kind"] == kind].groupby(SWEEP)
        }
        tables += [Table(caption, pandas.DataFrame(rows).T)] if rows else []
    return tables


def class_tables(results: pandas.DataFrame) -> list[Table]:
    """How well each class is found, where there are any."""
    rows = [
        (f"{row.title}, {row.model}: {split}", f"{name} ({values['support']:.0f})", row.column,
         values["f1"])
        for row in results.itertuples()
        for split in row.result.splits
        for name, values in (row.result.mistakes(split) or {}).get("classes", {}).items()
    ]  # fmt: skip
    if not rows:
        return []
    names = ["group", "class", "column"]
    scores = over_seeds(pandas.DataFrame(rows, columns=[*names, "score"]), names)
    cells = score_cells(scores).unstack("column", sort=False)
    return [Table("F1 of each class, times 100 (how often it is right)", cells)]


def mistake_tables(results: pandas.DataFrame, most: int) -> Iterator[tuple[str, list[Table]]]:
    """Of the first seed of each method: a title, who was taken for whom, and the worst errors."""
    for row in results.drop_duplicates(["title", "model", "column"]).itertuples():
        for split, found in [(split, row.result.mistakes(split)) for split in row.result.splits]:
            if found is None:
                continue
            counts, tables = pandas.DataFrame.from_dict(found["confusion"], orient="index"), []
            labels = counts.index.union(counts.columns, sort=False)
            counts = counts.reindex(index=labels, columns=labels).fillna(0).astype(int)
            confused = counts.sum() + counts.sum(axis=1) - 2 * numpy.diag(counts)
            kept = labels[labels.isin(confused.nlargest(_LABELS).index)]
            if len(kept):
                caption = "Right labels (rows) and given ones"
                caption += f", the {len(kept)} of {len(labels)} confused most" * (
                    kept.size < labels.size
                )
                cells = counts.loc[kept, kept].astype(object).replace(0, NONE)
                tables.append(Table(caption, cells))
            if errors := found["errors"][:most]:
                cells = pandas.DataFrame(errors, columns=ERROR).set_index("where")
                tables.append(Table(f"The worst {len(errors)}", cells, kind="plain"))
            title = f"{row.title}, {row.model}, {row.column}, seed {row.seed}"
            yield f"{title}: {found['wrong']} wrong on {split}", tables


def runs_table(runs: Sequence[Run], titles: Mapping[Result, str]) -> Table:
    """Every run with its score and every option that is not the same in all of them."""
    options = pandas.DataFrame([run.options for run in runs], dtype=object).map(text_of)
    cells = options.loc[:, options.nunique() > 1]
    cells = cells.drop(columns=["method", "task", "tasks", "seed"], errors="ignore")
    scores = [
        "; ".join(
            f"{titles[result]} {split} {percent(result.scores[split].get(result.metric, math.nan))}"
            for result in run.results
            for split in result.splits
        )
        for run in runs
    ]
    cells.insert(0, "Method", [run.column for run in runs])
    cells.insert(1, "Score", scores)
    cells.insert(2, "Seed", [run.seed for run in runs])
    top = os.path.commonpath([run.folder.parent.absolute() for run in runs])
    names = [escape(os.path.relpath(run.folder, top)) for run in runs]
    links = [Html(f'<a href="#run-{number}">{name}</a>') for number, name in enumerate(names, 1)]
    cells.index = pandas.Index(links, dtype=object)
    return Table(f"All runs in {top}, with the options in which they differ", cells, kind="plain")


def machines_table(runs: Sequence[Run]) -> Table:
    """The machines and versions that runs used, and how many runs used them."""
    rows = [run.report.get("machine", {}) | run.report.get("versions", {}) for run in runs]
    counts = pandas.DataFrame(rows, dtype=object).map(text_of).value_counts(sort=False)
    return Table("Hardware and versions", counts.rename("runs").reset_index(), kind="plain")


def remarks_table(runs: Sequence[Run], titles: Mapping[Result, str]) -> Table:
    """What was odd in the data but accepted, and how many examples were cut; each said once."""
    rows = [
        (", ".join(titles[result] for result in run.results), split, f"{what}: {text_of(found)}")
        for run in runs
        for split, what, found in run.remarks()
    ]
    table = pandas.DataFrame(rows, columns=["Data set", "Split", "Remark"])
    counts = table.value_counts(sort=False).rename("Runs").reset_index()
    return Table("Remarks on the data", counts.set_index("Data set"), kind="plain")


def text_of(value: Any) -> str:
    """A value of a JSON file for a reader."""
    if value is None or value != value:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
