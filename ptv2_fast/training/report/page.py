"""The report on runs: one HTML page that loads nothing, and its figures as PNG files."""

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2

import ptv2_fast
from ptv2_fast.training.finished_runs import COLUMNS, LeftOut, Run, find_runs
from ptv2_fast.training.options import defaults
from ptv2_fast.training.output import check_replaceable, replace_files
from ptv2_fast.training.report import figures, tables
from ptv2_fast.training.report.compare import compare

PAGE = "index.html"
MAX_BYTES = 1_000_000


def write_report(
    folders: Iterable[Path], output: Path, published: tables.Published | None = None
) -> tuple[Path, list[LeftOut]]:
    """Write the report on all runs in some folders, and in folders in them at any depth.

    In `output` a former report is replaced, and what else is there stays. `published` finds figures
    to print beside ours. Returns the page, and what it could not show; raises a ValueError as
    `find_runs` and `replace_files` do.
    """
    check_replaceable(output, "report")
    runs, left_out = find_runs(folders)
    page, drawings = render(runs, left_out, published)
    files = {f"{one.name}.png": one.png for one in drawings} | {PAGE: page.encode()}
    replace_files(output, "report", files)
    return output / PAGE, left_out


def render(
    runs: Sequence[Run], left_out: Sequence[LeftOut] = (), published: tables.Published | None = None
) -> tuple[str, list[figures.Drawing]]:
    """The page, and its figures."""
    comparison = compare(runs)
    overview = figures.overview_drawings(comparison.main_scores)
    curves = figures.curve_drawings(comparison.results)
    ablations = figures.ablation_drawings(comparison.ablations)
    content = {
        "runs": runs, "left_out": left_out, "published": published, "comparison": comparison,
        "tables": tables, "DataFrame": tables.pandas.DataFrame, "overview": overview,
        "curves": curves, "ablations": ablations, "defaults": defaults(),
        "today": datetime.date.today(), "version": ptv2_fast.__version__,
    }  # fmt: skip
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {
        "percent": tables.percent, "text": tables.text_of,
        "method": lambda column: str(COLUMNS.get(column, column)).partition(" (")[0],
    }  # fmt: skip
    drawings = [*overview, *curves, *ablations]
    names = [one.name for one in drawings]
    without_steps = [name for name in names if not name.endswith("-step")]
    # Where examples and drawings must go for the page's size, the drawings' words stay.
    for drawn, most in ((names, 20), (names, 5), (without_steps, 5), ([], 5)):
        page = environment.get_template("page.html").render(content, drawn=drawn, most=most)
        if len(page.encode()) <= MAX_BYTES:
            break
    return page, drawings
