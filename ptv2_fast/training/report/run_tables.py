"""The tables of a report about single runs: their options, commands, machines and remarks."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ptv2_fast.training import run_folder
from ptv2_fast.training.report.compare import Names
from ptv2_fast.training.report.data import Run, option_defaults
from ptv2_fast.training.report.tables import NONE, Cell, Row, Table, percent


@dataclass(frozen=True)
class RunDetails:
    """One run at the end of the page."""

    name: str
    options: dict[str, str]
    command: str


def option_text(value: Any) -> str:
    """An option's value for a reader."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def runs_table(runs: Sequence[Run], names: Names) -> Table:
    """Every run with its score and every option that is not the same in all of them."""
    hidden = {"method", "task", "tasks", "seed"}
    differing = [
        name
        for name in dict.fromkeys(name for run in runs for name in run.options)
        if name not in hidden
        and len({option_text(r.options[name]) for r in runs if name in r.options}) > 1
    ]
    rows = []
    for number, run in enumerate(runs, 1):
        scores = [
            f"{names.title(result)} {split} {percent(result.scores[split][result.metric])}"
            for result in run.results
            for split in result.splits
            if result.metric in result.scores[split]
        ]
        cells = [Cell(run.column), Cell("; ".join(scores) or NONE), Cell(option_text(run.seed))]
        values = {**run.options, "model": names.model(run.results[0])}
        cells += [Cell(option_text(values.get(name))) for name in differing]
        rows.append(Row(Cell(names.run(run), link=f"#run-{number}"), tuple(cells)))
    columns = {"Method": "", "Score": "in per cent", "Seed": ""} | dict.fromkeys(differing, "")
    caption = f"All runs in {names.top}, with the options in which they differ"
    return Table(caption, "Run", columns, tuple(rows), numeric=False)


def machines_table(runs: Sequence[Run]) -> Table:
    """The machines and versions that runs used, and how many runs used them."""
    counts: dict[tuple[tuple[str, str], ...], int] = {}
    for run in runs:
        values = {**run.report.get("machine", {}), **run.report.get("versions", {})}
        key = tuple((name, option_text(value)) for name, value in values.items())
        counts[key] = counts.get(key, 0) + 1
    names = list(dict.fromkeys(name for key in counts for name, _ in key))
    rows = [
        Row(Cell(f"{count} of {len(runs)}"), tuple(Cell(dict(key).get(n, NONE)) for n in names))
        for key, count in counts.items()
    ]
    columns = {name.replace("ptv2_fast", "ptv2-fast"): "" for name in names}
    return Table("Hardware and versions", "Runs", columns, tuple(rows), numeric=False)


def remarks_table(runs: Sequence[Run], names: Names) -> Table:
    """What was odd in the data but accepted, and how many examples were cut; each said once."""
    found: dict[tuple[str, str, str], int] = {}
    for run in runs:
        title = names.titles(run)
        examples = run.report.get("examples", {})
        counted = [
            (split, count, f"{count} of {examples.get(split, '?')} examples cut to fit the model")
            for split, count in run.report.get("truncated_examples", {}).items()
        ] + [
            (split, total, f"{examples.get(split, '?')} of {total} examples, drawn by the seed")
            for split, total in run.report.get("drawn_from", {}).items()
        ]
        for split, count, what in counted:
            if count:
                found[title, split, what] = found.get((title, split, what), 0) + 1
        for split, remarks in run.report.get("remarks", {}).items():
            for name, value in remarks.items():
                what = f"{name}: {option_text(value)}"
                found[title, split, what] = found.get((title, split, what), 0) + 1
    rows = tuple(
        Row(Cell(title), (Cell(split), Cell(what), Cell(str(count))))
        for (title, split, what), count in found.items()
    )
    columns = {"Split": "", "Remark": "", "Runs": ""}
    return Table("Remarks on the data", "Data set", columns, rows, numeric=False)


def run_details(run: Run, name: str) -> RunDetails:
    """A run's options that are not the defaults, and the command that repeats it."""
    defaults = option_defaults()
    given = {
        option: value
        for option, value in run.options.items()
        if option not in defaults or value != _plain(defaults[option])
    }
    several = "tasks" in run.options
    words = ["ptv2-fast", "multitask" if several else "train", "--output", f"{run.folder}-again"]
    if several or not set(given) <= set(defaults):
        words += ["--config", str(run.folder / run_folder.CONFIG)]
    else:
        named = {"method": run.options.get("method", defaults["method"])}  # else a preset is taken
        for option, value in (named | given).items():
            words += _argument(option, value)
    tasks = {f"data set {part.get('name')}": part for part in given.pop("tasks", ())}
    options = {option: option_text(value) for option, value in given.items()}
    for title, part in tasks.items():
        own = {k: v for k, v in part.items() if k != "name" and v != _plain(defaults.get(k))}
        options[title] = ", ".join(f"{k} {option_text(v)}" for k, v in own.items())
    return RunDetails(name, options, shlex.join(words))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _argument(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{name.replace('_', '-')}"]
    if isinstance(value, list):
        return [flag, ",".join(map(str, value))]
    return [flag, str(value)]
