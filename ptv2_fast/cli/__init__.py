"""The command line, one file a command.

Only what a command needs is imported, inside it: `env` works without transformers, and help and
bad options come at once.
"""

import os
import sys
from collections.abc import Callable, Sequence

from ptv2_fast.cli import ablate, environment, multitask, report, score, search, tasks, train
from ptv2_fast.cli.parser import BAD_INPUT, BadInput, Parser, with_dashes

__all__ = ["BAD_INPUT", "main"]

_COMMANDS = (train, multitask, score, ablate, search, report, tasks, environment)

_PROJECTS = {"sklearn": "scikit-learn"}  # that have another name than their module


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0, or 2 after one line on stderr when the input is bad or a package of
        others that the command needs is not installed.
    """
    parser = Parser(
        prog="ptv2-fast",
        description="P-Tuning v2 and its baselines on Hugging Face encoders.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    for command in _COMMANDS:
        command.add(commands)
    given = [with_dashes(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    parsed = vars(parser.parse_args(given))
    run: Callable[..., None] = parsed.pop("command")
    prog = parsed.pop("prog")
    try:
        run(parsed)
        sys.stdout.flush()
    except BadInput as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package.startswith("ptv2_"):
            raise
        print(f"{prog}: error: expected the package {_PROJECTS.get(package, package)}, which is "
              "not installed", file=sys.stderr)  # fmt: skip
        return BAD_INPUT
    except BrokenPipeError:  # the reader of our lines has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
