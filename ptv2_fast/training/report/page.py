"""The report on runs: one HTML page that loads nothing, and its figures as PNG files."""

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

import ptv2_fast
from ptv2_fast.files import plain_name
from ptv2_fast.training.output import (
    MARKER,
    check_place,
    read_mark,
    write_bytes,
    write_mark,
)
from ptv2_fast.training.output import (
    contents as folder_contents,
)
from ptv2_fast.training.report.compare import Comparison, Names, compare, settings_of
from ptv2_fast.training.report.data import LeftOut, Run, find_runs, option_defaults
from ptv2_fast.training.report.figures import Figure
from ptv2_fast.training.report.plots import curve_figures, overview_figures
from ptv2_fast.training.report.run_tables import (
    machines_table,
    option_text,
    remarks_table,
    run_details,
    runs_table,
)
from ptv2_fast.training.report.sweeps import find_sweeps, sweep_figures, sweep_tables
from ptv2_fast.training.report.tables import (
    Published,
    Table,
    cost_of,
    cost_table,
    metrics_table,
    paper_table,
    share,
)
from ptv2_fast.training.report.text import finding, joined, lead, method_name

PAGE = "index.html"
MAX_BYTES = 1_000_000
_KIND = "report"


def write_report(
    folders: Iterable[Path], output: Path, published: Published | None = None
) -> tuple[Path, list[LeftOut]]:
    """Write the report on all runs in some folders.

    Args:
        folders: of runs, or with such folders in them at any depth.
        output: folder of the page and the PNG files; those of a former report are replaced, and
            what else is there stays.
        published: finds published figures to print beside ours.

    Returns:
        The page, and what it could not show.

    Raises:
        ValueError: for a path that is no folder, without a finished run, and for an output folder
            that holds something else.
    """
    before = _former_files(output)
    runs, left_out = find_runs(folders)
    page, figures = render(runs, left_out, published)
    contents = {f"{plain_name(figure.name, 'figure')}.png": figure.png for figure in figures}
    contents[PAGE] = page.encode()
    foreign = [name for name in contents if name not in before and (output / name).exists()]
    if foreign:
        raise ValueError(f"output: expected no files of others by our names, got {foreign}")
    output.mkdir(parents=True, exist_ok=True)
    # Known as ours before they are there, and until they are gone.
    write_mark(output, _KIND, files=sorted({*before, *contents}))
    for name in sorted(before - set(contents)):
        (output / name).unlink(missing_ok=True)
    for name, content in contents.items():
        write_bytes(output / name, content)
    write_mark(output, _KIND, files=sorted(contents))
    return output / PAGE, left_out


def _former_files(output: Path) -> set[str]:
    """The names of the files that a former report left in a folder, which may be replaced.

    Raises:
        ValueError: for a folder that holds something else.
    """
    check_place(output)
    mark = read_mark(output)
    if mark is None and not folder_contents(output):
        return set()
    names = (mark or {}).get("files")
    if mark is None or mark["kind"] != _KIND or not isinstance(names, list):
        raise ValueError(
            f"output: expected a new folder or one of a former report with {MARKER}, got "
            f"{str(output)!r}"
        )
    return {plain_name(name, f"{output / MARKER}: files") for name in names}


def render(
    runs: Sequence[Run], left_out: Sequence[LeftOut] = (), published: Published | None = None
) -> tuple[str, list[Figure]]:
    """The page, and its figures."""
    names = Names(runs)
    comparisons = compare(settings_of(runs), names)
    sweeps = find_sweeps(runs, names)
    curves = curve_figures(comparisons)
    overview = overview_figures(comparisons)
    ablations = sweep_figures(sweeps)
    content: dict[str, Any] = {
        "lead": lead(runs, comparisons),
        "findings": [(f"{one.title}, {one.model}", finding(one)) for one in comparisons],
        "tiles": tiles(runs, comparisons),
        "paper_tables": paper_tables(comparisons, published),
        "choices": choices(comparisons),
        "metrics_table": metrics_table(comparisons),
        "cost_table": cost_table(comparisons),
        "overview": overview,
        "curves": curves,
        "ablations": ablations,
        "ablation_tables": sweep_tables(sweeps),
        "runs_table": runs_table(runs, names),
        "details": [run_details(run, names.run(run)) for run in runs],
        "defaults": {name: option_text(value) for name, value in option_defaults().items()},
        "machines": machines_table(runs),
        "remarks": remarks_table(runs, names),
        "left_out": left_out,
        "date": datetime.date.today().isoformat(),
        "version": ptv2_fast.__version__,
    }
    figures = [*overview, *curves, *ablations]
    names_of = [figure.name for figure in figures]
    without_steps = [name for name in names_of if not name.endswith("-step")]
    for drawn in (names_of, without_steps, []):
        # Where drawings must go for the page's size, their words stay.
        page = _template().render(content, drawn=drawn)
        if len(page.encode()) <= MAX_BYTES:
            break
    return page, figures


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("page.html")


def paper_tables(comparisons: Sequence[Comparison], published: Published | None) -> list[Table]:
    """One table for each model."""
    models = dict.fromkeys(one.model for one in comparisons)
    return [
        paper_table(model, [one for one in comparisons if one.model == model], published)
        for model in models
    ]


def tiles(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[tuple[str, str]]:
    """A few figures for the top of the page: (figure, what it is)."""
    found = [(str(len(runs)), "finished runs")]
    found.append((str(len({one.title for one in comparisons})), "data sets"))
    ratios = [one.ratio(one.splits[0]) for one in comparisons]
    known = [value for value in ratios if value is not None]
    if known:
        mean = sum(known) / len(known)
        found.append((f"{100 * mean:.1f} %", "of fine-tuning's score by P-Tuning v2, mean"))
    parts = [cost_of(one.settings["PT-2"], "part") for one in comparisons if "PT-2" in one.settings]
    trained = [part for part in parts if part is not None]
    if trained:
        mean = sum(trained) / len(trained)
        found.append((share(mean), "of the parameters trained by P-Tuning v2, mean"))
    return found


def choices(comparisons: Sequence[Comparison]) -> list[str]:
    """Where a method was run in several settings and one had to be chosen for the tables."""
    notes = []
    for one in comparisons:
        several = [
            f"{count} settings of {method_name(name)}"
            for name, count in one.alternatives.items()
            if count > 1
        ]
        if several:
            notes.append(f"{one.title}, {one.model}: {joined(several)}")
    return notes
