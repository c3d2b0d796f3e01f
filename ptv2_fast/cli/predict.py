"""ptv2-fast predict."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ptv2_fast.cli.parser import add_command, checked
from ptv2_fast.cli.score import add_scoring_options, as_json, check_batch_size, check_new, load
from ptv2_fast.tasks.sources import Source, Stream, file_source
from ptv2_fast.training import output

_FORMATS = {"jsonl": "json", "csv": "csv", "tsv": "tsv"}


def add(commands: Any) -> None:
    """Add the command."""
    predict = add_command(commands, "predict", _predict, "print predictions as JSON lines")
    predict.add_argument("--run", required=True, help="folder of the run")
    add_scoring_options(predict)
    source = predict.add_mutually_exclusive_group()
    source.add_argument(
        "--data", help="file of examples, labelled or not; - = stdin; JSON lines and tables of "
        "text may be of any length"
    )  # fmt: skip
    source.add_argument("--text", action="append", help="a text (a pair: two, with a tab between);"
                        " default: one a line from stdin")  # fmt: skip
    predict.add_argument(
        "--data-format", choices=_FORMATS, default="jsonl", help="of --data - (default: jsonl)"
    )
    predict.add_argument(
        "--output", help="new file for the predictions; default: print them as they are made"
    )


def _predict(options: dict[str, Any]) -> None:
    file = None if options["output"] is None else Path(options["output"])
    if file is not None:
        checked(check_new, file)
    check_batch_size(options)
    source = _source(options)
    run = load(Path(options["run"]), options)
    from ptv2_fast.training.progress import reading_bar
    from ptv2_fast.training.scoring import predict_parts, typed_parts

    if source is None:
        parts = typed_parts(run.task, options["text"] or _lines_of_stdin())
    else:
        parts = run.task.read_parts(source)
    # Lines that are printed on the same terminal show how far it is.
    shown = False if file is None and sys.stdout.isatty() else None
    path = None if source is None else source.path
    with _writing(file) as lines:
        found = predict_parts(run, reading_bar(parts, path, shown), options["batch_size"])
        _write(found, lines)


def _source(options: dict[str, Any]) -> Source | None:
    """What --data names; None = typed texts."""
    if options["data"] is None:
        return None
    if options["data"] != "-":
        return checked(file_source, options["data"])
    stream = getattr(sys.stdin, "buffer", sys.stdin)
    return Source("stdin", stream=Stream(stream, _FORMATS[options["data_format"]]))


def _lines_of_stdin() -> Iterator[str]:
    """A text a line, without the mark of UTF-8 files that the first may begin with.

    Raises:
        ValueError: for bytes that are no text.
    """
    for number, line in enumerate(sys.stdin):
        text = line.rstrip("\r\n")
        yield text if number else text.removeprefix("\ufeff")


@contextlib.contextmanager
def _writing(file: Path | None) -> Iterator[IO[str]]:
    if file is None:
        yield sys.stdout
        return
    with output.new_text(file) as lines:
        yield lines


def _write(found: Iterator[list[dict[str, Any]]], lines: IO[str]) -> None:
    """Write predictions as they come.

    Raises:
        BadInput: when what they are of cannot be read.
    """
    while (part := checked(next, found, None)) is not None:
        lines.writelines(f"{as_json(line)}\n" for line in part)
        lines.flush()
