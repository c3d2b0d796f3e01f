"""The command line, one file a command.

Only what a command needs is imported, inside it: `env` works without transformers, and help and
bad options come at once.
"""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ptv2_fast import __version__
from ptv2_fast.cli import (
    ablate,
    card,
    convert,
    environment,
    models,
    multitask,
    predict,
    report,
    score,
    search,
    serve,
    tasks,
    train,
)
from ptv2_fast.cli.completion import add_completion
from ptv2_fast.cli.parser import BAD_INPUT, INTERRUPTED, BadInput, Parser, with_dashes

__all__ = ["BAD_INPUT", "INTERRUPTED", "main"]

_COMMANDS = (
    train, multitask, score, predict, serve, ablate, search, report, convert, card, tasks, models,
    environment,
)  # fmt: skip

_LONGEST = 2000  # characters of a message: what it quotes may be a file of one line

_PROJECTS = {"sklearn": "scikit-learn"}  # that have another name than their module


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0, or after one line on stderr 2, when the input is bad, a package of others
        that the command needs is not installed or the machine cannot do it (a full disk), and 130,
        when it was interrupted.
    """
    parser = Parser(
        prog="ptv2-fast",
        description="P-Tuning v2 and its baselines on Hugging Face encoders.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ptv2-fast {__version__}")
    add_completion(parser)
    commands = parser.add_subparsers(metavar="command", required=True)
    for command in _COMMANDS:
        command.add(commands)
    given = [with_dashes(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    parsed = vars(parser.parse_args(given))
    run: Callable[..., None] = parsed.pop("command")
    prog = parsed.pop("prog")
    go_on = functools.partial(_go_on, parsed.get("output"), "resume" in parsed, prog)
    try:
        run(parsed)
        sys.stdout.flush()
    except BadInput as error:
        return _end(prog, str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package.startswith("ptv2_"):
            raise
        name = _PROJECTS.get(package, package)
        return _end(prog, f"expected the package {name}, which is not installed")
    except BrokenPipeError:  # the reader of our lines has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(f"{prog}: interrupted{go_on()}", file=sys.stderr)
        return INTERRUPTED
    except (OSError, OverflowError, RecursionError, MemoryError) as error:
        return _end(prog, f"{_words(error)}{go_on()}")
    except Exception as error:
        if _is_lack_of_memory(error):
            return _end(prog, f"not enough memory: {_words(error):.200}{go_on()}")
        if not _is_failed_write(error):
            raise
        return _end(prog, f"a file could not be written: {_words(error)}{go_on()}")
    return 0


def _end(prog: str, message: str) -> int:
    """Say what was wrong in one line; returns the exit code."""
    line = " ".join(message[:_LONGEST].split()) + (" ..." if len(message) > _LONGEST else "")
    # What a file or a name holds may be commands to the terminal.
    plain = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)
    print(f"{prog}: error: {plain}", file=sys.stderr)
    return BAD_INPUT


def _words(error: BaseException) -> str:
    if isinstance(error, OSError):
        return str(error)
    name = type(error).__name__
    return f"{name}: {error}" if str(error) else name


def _is_failed_write(error: BaseException) -> bool:
    """Whether torch or safetensors could not write: a full disk has no OSError there."""
    text = str(error)
    return (type(error).__name__ == "SafetensorError" and "IoError" in text) or (
        isinstance(error, RuntimeError)
        and any(part in text for part in ("PytorchStreamWriter", "inline_container.cc"))
    )


def _is_lack_of_memory(error: BaseException) -> bool:
    """Whether torch had no memory for a tensor, or could not even say how much it would take."""
    return isinstance(error, RuntimeError) and any(
        part in str(error)
        for part in ("out of memory", "can't allocate memory", "Storage size calculation overflow")
    )


def _go_on(output: str | None, has_resume: bool, prog: str) -> str:
    """How to go on with what was begun in the output folder; nothing where it was not."""
    from ptv2_fast.training.output import contents, read_mark

    try:
        if output is None or read_mark(Path(output)) is None or not contents(Path(output)):
            return ""
    except OSError:
        return ""
    if has_resume:
        return "; continue with --resume"
    return "; the same command continues" if prog.endswith("search") else ""
