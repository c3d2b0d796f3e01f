"""What the commands share: options made from their tables, and errors of one line."""

import argparse
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ptv2_fast.recipes import options_beside
from ptv2_fast.tasks.hints import close_to
from ptv2_fast.tasks.option_table import OptionTable
from ptv2_fast.tasks.options import DataOptions
from ptv2_fast.tasks.sources import find_sources
from ptv2_fast.training.option_files import read_config_file
from ptv2_fast.training.options import TABLES, ModelOptions, RunConfig, with_changes
from ptv2_fast.training.unread_options import options_without_effect

# Exit codes.
BAD_INPUT = 2
INTERRUPTED = 130

NONE = "none"  # as the value of an option: the option is not set


class Parser(argparse.ArgumentParser):
    """One line for a bad option instead of the whole usage, with what may have been meant."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """As argparse's, but an unknown option of a command is the first thing that is said."""
        if self._subparsers is None:
            known = self._option_string_actions
            unknown = [name for name in _option_names(args) if name not in known]
            if unknown:
                self.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(unknown, known)}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            meant = _meant([str(value)], action.choices or ())
            raise argparse.ArgumentError(action, error.message + meant) from None


def _option_names(words: Sequence[str]) -> list[str]:
    """The words that argparse takes for options, without their values."""
    before = words[: words.index("--")] if "--" in words else words
    return [word.partition("=")[0] for word in before if word[:2] == "--" and " " not in word]


def _meant(names: Sequence[str], known: Iterable[str]) -> str:
    close = {name: close_to(name, known) for name in names}
    hints = [f"for {name}, did you mean {' or '.join(c)}?" for name, c in close.items() if c]
    return "".join(f"; {line}" for line in hints)


class BadInput(Exception):
    """What the user gave cannot be used; the message says what and why."""


def checked(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call something that raises ValueError or OSError for bad input.

    Raises:
        BadInput: instead of those.
    """
    try:
        return function(*args, **kwargs)
    except (ValueError, OSError) as error:
        raise BadInput(error) from error


def with_dashes(word: str) -> str:
    """--pre_seq_len=4 -> --pre-seq-len=4; values stay as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def add_command(
    commands: Any, name: str, run: Callable, help: str, epilog: str | None = None
) -> argparse.ArgumentParser:
    """A command that calls `run` with its options as a dictionary."""
    parser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=run, prog=parser.prog)
    return parser


def add_run_settings(parser: argparse.ArgumentParser) -> None:
    """--recipe, --config and every option of a run."""
    parser.add_argument(
        "--recipe",
        help="start from a recipe (`ptv2-fast tasks` lists them; none: from none)",
    )
    parser.add_argument(
        "--config",
        help="options from a .json, .toml or .yaml file; those given here win; config.json of a "
        "run repeats it",
    )
    for title, table in TABLES.items():
        add_options(parser.add_argument_group(title), table)


def run_config(options: dict[str, Any], base: dict[str, Any] | None = None) -> RunConfig:
    """The run's configuration: `base`, then the recipe's, the file's, and the options.

    Args:
        options: parsed ones, of `add_run_settings` alone.

    Raises:
        ValueError: for an unknown recipe, a bad file, an unknown option or a bad value.
    """
    values = dict(base or {})
    recipe, config_file = options.pop("recipe"), options.pop("config")
    from_file = {} if config_file is None else read_config_file(config_file)
    if recipe not in (None, NONE):
        values = with_changes(values, options_beside(recipe, from_file | options))
    values = with_changes(values, from_file)
    return RunConfig.from_dict(with_changes(values, options))


def note_unread(config: RunConfig, options: Iterable[str], varied: Iterable[str] = ()) -> None:
    """Say on stderr which options of the command line have no effect on a run, nor on others that
    differ from it in some; a recipe or a file may hold options of other methods."""
    for name, what in options_without_effect(config, options, varied).items():
        print(f"note: {with_dashes(f'--{name}')} has no effect on {what}", file=sys.stderr)


def check_places(model: ModelOptions, *data: DataOptions) -> None:
    """Look for the files and folders that a run names, before the heavy imports.

    Raises:
        BadInput: naming what is not there; a model that may be one of the hub is not looked for.
    """
    for part in data:
        checked(find_sources, part)
    name = str(model.model)
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise BadInput(f"model: expected an existing folder, got {name!r}")


def add_options(group: Any, table: type[OptionTable], names: Sequence[str] | None = None) -> None:
    """One option for each of a table, or for those named; what is not given is not set."""
    for name in names or table.model_fields:
        field, kind = table.model_fields[name], table.kind(name)
        help_text, choices = str(field.description), kind.choices
        settings: dict[str, Any] = {"type": kind.type}
        if kind.type is bool:
            settings = {"action": argparse.BooleanOptionalAction}
            help_text += f" (default: {'yes' if field.default else 'no'})"
        elif names is None and field.default is not None:
            help_text += f" (default: {field.default})"
        if kind.is_optional and (choices or kind.type is not str):
            # A recipe or a file may have set it.
            settings = {"type": _or_none(kind.type), "action": _StoreOrNone}
            choices = choices and (*choices, NONE)
        if choices:
            settings["choices"] = choices
        elif kind.type is not bool:
            settings["metavar"] = "TEXT" if kind.type is str else "N"
        group.add_argument(
            *(with_dashes(f"--{word}") for word in (name, *table.aliases(name))),
            dest=name,
            default=argparse.SUPPRESS,
            help=help_text.replace("%", "%%"),
            **settings,
        )


def _or_none(kind: type) -> Callable[[str], Any]:
    """The type of an option that "none" takes back."""

    def read(text: str) -> Any:
        return text if text == NONE else kind(text)

    read.__name__ = kind.__name__  # in argparse's message
    return read


class _StoreOrNone(argparse.Action):
    """Stores None for "none"."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        setattr(namespace, self.dest, None if values == NONE else values)


def quieten(progress: bool = False) -> None:
    """Load what is heavy, and leave the terminal to our own lines.

    Args:
        progress: and to the bars of long work.
    """
    if "transformers" not in sys.modules and multiprocessing.parent_process() is None:
        print("loading torch and transformers ...", file=sys.stderr, flush=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    warnings.formatwarning = lambda message, *unused: f"note: {message}\n"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not progress:
        datasets.disable_progress_bars()
