"""--print-completion: a script by which a shell completes commands, options and their values."""

import argparse
from collections.abc import Iterator

from ptv2_fast.recipes import recipes
from ptv2_fast.tasks.benchmarks import BENCHMARKS
from ptv2_fast.tasks.options import FAMILIES

_SHELLS = ("bash", "zsh", "tcsh")
_PATHS = {
    "adapter_root", "config", "data", "data_dir", "feature_cache", "model", "output", "run", "runs",
    "source", "space", "start_from", "target", "test_file", "train_file", "validation_file",
}  # fmt: skip


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Add the option."""
    parser.add_argument(
        "--print-completion", action=_PrintCompletion, choices=_SHELLS, metavar="SHELL",
        default=argparse.SUPPRESS,
        help="print a script that completes commands and options in bash, zsh or tcsh, as in\n"
        'eval "$(ptv2-fast --print-completion bash)"',
    )  # fmt: skip


class _PrintCompletion(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        try:
            import shtab
        except ModuleNotFoundError:
            parser.error(f"{option_string} needs shtab: pip install 'ptv2-fast[completion]'")
        values_of = {
            "task": (*FAMILIES, *BENCHMARKS), "recipe": ("none", *recipes()),
            "name": (*BENCHMARKS, *recipes()),
        }  # fmt: skip
        for action in _arguments(parser):
            if action.dest in values_of and action.choices is None:
                action.choices = values_of[action.dest]
            elif action.dest in _PATHS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell=values))
        parser.exit()


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Those of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _arguments(command)
