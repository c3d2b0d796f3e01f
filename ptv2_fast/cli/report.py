"""ptv2-fast report."""

import sys
from pathlib import Path
from typing import Any

from ptv2_fast.cli.parser import BadInput, add_command, checked

_EXAMPLE = """examples:
  ptv2-fast report runs/rte-p-tuning-v2 runs/rte-fine-tuning
  ptv2-fast report runs --output report
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "report", _report, "compare finished runs on one HTML page", _EXAMPLE
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="FOLDER",
        help="a run, or a folder with runs in it at any depth, as sweeps have them",
    )
    parser.add_argument(
        "--output", default="report", help="folder of index.html and the figures (default: report)"
    )


def _report(options: dict[str, Any]) -> None:
    from ptv2_fast.recipes.published import published

    try:
        from ptv2_fast.training.report.page import write_report
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "matplotlib"):
            raise
        raise BadInput(
            f"{error.name} is not installed; pip install 'ptv2-fast[report]' brings it"
        ) from error
    folders = [Path(folder) for folder in options["runs"]]
    page, left_out = checked(write_report, folders, Path(options["output"]), published)
    for item in left_out:
        print(f"left out: {item.folder}: {item.reason}", file=sys.stderr)
    print(f"written to {page}")
