"""ptv2-fast models."""

from typing import Any

from ptv2_fast.cli.parser import add_command

_NOTE = """columns:
  layers           frozen: blocks that compute no gradient of a weight; hook: transformers' own
  heads            the classes that the installed transformers has, on an encoder alone
  position_offset  the values that a prefix may have
  attention        causal: as a classifier or tagger, without generation and caches
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "models", _models, "list the encoders that are served", _NOTE)
    parser.add_argument(
        "--markdown", action="store_true", help="as a Markdown table, equal families in one row"
    )


def _models(options: dict[str, Any]) -> None:
    from ptv2_fast.encoders.family_table import as_markdown, as_text, family_rows

    print((as_markdown if options["markdown"] else as_text)(family_rows()))
