"""The command line: ptv2-fast train | eval | predict | env.

Only what a command needs is imported, inside it: `env` works without transformers, and help and
bad options come at once.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from ptv2_fast.tasks.options import DataOptions, Options, value_type
from ptv2_fast.training import run_folder
from ptv2_fast.training.options import SECTIONS, RunConfig, read_config_file

_TRAIN_EXAMPLE = """example:
  ptv2-fast train --task token-classification --model bert-base-cased --output runs/ner \\
      --train-file train.txt --validation-file valid.txt --num-virtual-tokens 32
  ptv2-fast eval --run runs/ner --data test.txt
  ptv2-fast predict --run runs/ner --text "Angela Merkel visited Paris."
"""
_COLUMN_OPTIONS = (
    "text_column", "text_pair_column", "label_column", "words_column", "tags_column",
    "conll_word_column", "conll_tag_column", "long_input",
)  # fmt: skip
_PACKAGES = (
    "ptv2-fast", "torch", "triton", "transformers", "accelerate", "datasets", "tokenizers",
    "safetensors", "numpy",
)  # fmt: skip
BAD_INPUT = 2  # the exit code


class _Parser(argparse.ArgumentParser):
    """One line for a bad option instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0, or 2 after one line on stderr when the input is bad.
    """
    given = [_with_dashes(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    parsed = vars(_make_parser().parse_args(given))
    command: Callable[..., None] = parsed.pop("command")
    prog = parsed.pop("prog")
    try:
        command(parsed)
    except _BadInput as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    return 0


class _BadInput(Exception):
    """What the user gave cannot be used; the message says what and why."""


def _checked(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call something that raises ValueError or OSError for bad input."""
    try:
        return function(*args, **kwargs)
    except (ValueError, OSError) as error:
        raise _BadInput(error) from error


def _with_dashes(word: str) -> str:
    """--pre_seq_len=4 -> --pre-seq-len=4; values stay as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ptv2-fast",
        description="P-Tuning v2 and its baselines on Hugging Face encoders.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="command", required=True)

    train = _add_command(commands, "train", _train, "train a method on a task", _TRAIN_EXAMPLE)
    run = train.add_argument_group("run")
    run.add_argument("--output", required=True, help="folder of the run, new or empty")
    run.add_argument(
        "--config",
        help="options from a .json, .toml or .yaml file; those given here win; config.json of a "
        "run repeats it",
    )
    run.add_argument(
        "--resume", action="store_true", help="go on with the interrupted run in --output"
    )
    run.add_argument("--overwrite", action="store_true", help="delete the run in --output first")
    for title, part in SECTIONS.items():
        _add_options(train.add_argument_group(title), part)

    evaluate = _add_command(commands, "eval", _evaluate, "score a trained run on labelled data")
    _add_run_options(evaluate)
    evaluate.add_argument("--data", required=True, help="file of labelled examples")

    predict = _add_command(commands, "predict", _predict, "print predictions as JSON lines")
    _add_run_options(predict)
    source = predict.add_mutually_exclusive_group()
    source.add_argument("--data", help="file of examples, labelled or not")
    source.add_argument("--text", action="append", help="a text (a pair: two, with a tab between);"
                        " default: one a line from stdin")  # fmt: skip

    _add_command(commands, "env", _env, "print versions, devices and backends")
    return parser


def _add_command(
    commands: Any, name: str, command: Callable, help: str, epilog: str | None = None
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=command, prog=parser.prog)
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, help="folder of the run")
    parser.add_argument("--batch-size", type=int, default=32, help="default: 32")
    group = parser.add_argument_group("where the data differs from the run's training data")
    _add_options(group, DataOptions, _COLUMN_OPTIONS)


def _add_options(group: Any, part: type[Options], names: Sequence[str] | None = None) -> None:
    """One option for each field of a dataclass; options that are not given are not set."""
    import typing

    hints = typing.get_type_hints(part)
    for field in dataclasses.fields(part):  # type: ignore[arg-type]
        if names is not None and field.name not in names:
            continue
        kind, _ = value_type(hints[field.name])
        flags = [f"--{n.replace('_', '-')}" for n in (field.name, *field.metadata["aliases"])]
        help_text = field.metadata["help"]
        if names is None and field.default is not None and kind is not bool:
            help_text += f" (default: {field.default})"
        settings: dict[str, Any] = {"type": _list_of_integers if kind is tuple else kind}
        if kind is bool:
            settings = {"action": argparse.BooleanOptionalAction}
            help_text += f" (default: {'yes' if field.default else 'no'})"
        if field.metadata["choices"]:
            settings["choices"] = field.metadata["choices"]
        elif kind is not bool:
            settings["metavar"] = "TEXT" if kind is str else "N,N,..." if kind is tuple else "N"
        group.add_argument(
            *flags,
            dest=field.name,
            default=argparse.SUPPRESS,
            help=help_text.replace("%", "%%"),
            **settings,
        )


def _list_of_integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers as 6,7,8, got {text!r}") from None


def _train(options: dict[str, Any]) -> None:
    folder = Path(options.pop("output"))
    resume, overwrite = options.pop("resume"), options.pop("overwrite")
    config_file = options.pop("config")
    config = _checked(_merge, folder, config_file, options, resume)
    _checked(run_folder.check_output, folder, resume, overwrite)
    if resume:
        _checked(run_folder.check_same_run, folder, config)
    if resume and (folder / run_folder.REPORT).is_file():
        print(f"{folder} is complete: see {folder / run_folder.REPORT}", file=sys.stderr)
        return

    _quieten()
    from ptv2_fast.encoders import print_trainable_parameters
    from ptv2_fast.training.prepare import prepare
    from ptv2_fast.training.run import train

    prepared = _checked(prepare, config, folder, resume=resume, overwrite=overwrite)
    for name, features in prepared.features.items():
        cut = features.truncated
        note = f", {cut} cut to {prepared.max_length} tokens" if cut else ""
        print(f"{name}: {len(features)} examples{note}", file=sys.stderr)
    print_trainable_parameters(prepared.model)
    report = train(prepared)
    for name, scores in report["metrics"].items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in scores.items()))
    print(f"written to {folder}")


def _merge(
    folder: Path, config_file: str | None, options: dict[str, Any], resume: bool
) -> RunConfig:
    """The run's configuration: its own when it resumes, then the file's, then the options'."""
    values: dict[str, Any] = {}
    if resume and (folder / run_folder.CONFIG).is_file():
        before, _ = run_folder.read_run_config(folder)
        for table in before.to_dict().values():
            values |= table
    if config_file is not None:
        values |= read_config_file(config_file)
    return RunConfig.from_dict(values | options)


def _evaluate(options: dict[str, Any]) -> None:
    run, batch_size = _load(options)
    from ptv2_fast.training.scoring import score_file

    scores = _checked(score_file, run, Path(options["data"]), batch_size)
    print(json.dumps(scores, indent=2))


def _predict(options: dict[str, Any]) -> None:
    run, batch_size = _load(options)
    from ptv2_fast.training.scoring import predict_file, predict_texts

    if options["data"] is not None:
        lines = _checked(predict_file, run, Path(options["data"]), batch_size)
    else:
        texts = options["text"] or [line.rstrip("\n") for line in sys.stdin if line.strip()]
        lines = _checked(predict_texts, run, texts, batch_size)
    for line in lines:
        print(json.dumps(line, ensure_ascii=False))


def _load(options: dict[str, Any]) -> tuple[Any, int]:
    """The run that the options name, and the batch size."""
    if options["batch_size"] < 1:
        raise _BadInput(f"batch_size: expected an integer >= 1, got {options['batch_size']}")
    folder = Path(options["run"])
    _checked(run_folder.read_run_config, folder)  # before the heavy imports
    _quieten()
    from ptv2_fast.training.models import load_run

    changes = {name: options[name] for name in _COLUMN_OPTIONS if name in options}
    return _checked(load_run, folder, changes), options["batch_size"]


def _quieten() -> None:
    """Leave the terminal to Trainer's progress bar and our own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _env(options: dict[str, Any]) -> None:
    import platform

    import torch

    from ptv2_fast.ops import backends

    print(f"python        {platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:<13} {version}")
    print(
        f"processor     {_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )
    print(f"cpu features  {torch.backends.cpu.get_cpu_capability()}")
    print(f"cuda          {torch.version.cuda or torch.version.hip or 'not in this torch'}")
    for device, backend in backends().items():
        print(f"backend       {device}: {backend}")


def _processor() -> str:
    import platform

    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
