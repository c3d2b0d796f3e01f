"""ptv2-fast predict."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ptv2_fast.cli.parser import BadInput, add_command, checked, quieten
from ptv2_fast.cli.score import (
    add_scoring_options,
    as_json,
    column_changes,
    load,
    new_file,
)
from ptv2_fast.tasks.sources import Source, Stream, file_source
from ptv2_fast.training import output
from ptv2_fast.training.adapter_lists import find_encoder, read_adapters

_FORMATS = {"jsonl": "json", "csv": "csv", "tsv": "tsv"}


def add(commands: Any) -> None:
    """Add the command."""
    predict = add_command(
        commands, "predict", _predict, "print predictions as JSON lines",
        epilog="Of several adapters, a row names in its field `adapter` the one, or the list of "
        "those,\nthat it is for; others are for all.",
    )  # fmt: skip
    predict.add_argument("--run", help="folder of the run")
    predict.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=FOLDER",
        help="a run of p-tuning-v2 and its name, instead of --run; may be repeated",
    )  # fmt: skip
    predict.add_argument("--model", help="encoder of the adapters; default: that the runs name")
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
    file = new_file(options)
    source = _source(options)
    # Lines that are printed on the same terminal show how far it is.
    shown = False if file is None and sys.stdout.isatty() else None
    if options["adapter"]:
        if options["run"] is not None:
            raise BadInput("run: expected --run or --adapter, got both")
        predictions = _of_adapters(options, source, shown)
    elif options["run"] is None:
        raise BadInput("run: expected --run, or --adapter name=folder")
    else:
        predictions = _of_run(options, source, shown)
    place: contextlib.AbstractContextManager[IO[str]] = contextlib.nullcontext(sys.stdout)
    with place if file is None else output.new_text(file) as lines:
        while (part := checked(next, predictions, None)) is not None:
            lines.writelines(f"{as_json(line)}\n" for line in part)
            lines.flush()


def _of_run(
    options: dict[str, Any], source: Source | None, shown: bool | None
) -> Iterator[list[dict[str, Any]]]:
    """The predictions of one run."""
    run = load(Path(options["run"]), options)
    from ptv2_fast.training.progress import reading_bar
    from ptv2_fast.training.scoring import predict_parts, typed_parts

    if source is None:
        parts = typed_parts(run.task, options["text"] or _lines_of_stdin())
    else:
        parts = run.task.read_parts(source)
    path = None if source is None else source.path
    return predict_parts(run, reading_bar(parts, path, shown), options["batch_size"])


def _of_adapters(
    options: dict[str, Any], source: Source | None, shown: bool | None
) -> Iterator[list[dict[str, Any]]]:
    """The predictions of several adapters."""
    adapters = checked(read_adapters, options["adapter"])
    model = checked(find_encoder, adapters, options["model"])
    quieten()
    from ptv2_fast.training.bank import AdapterBank
    from ptv2_fast.training.bank_files import predict_rows, predict_typed
    from ptv2_fast.training.pretrained import load_encoder

    bank = checked(AdapterBank, checked(load_encoder, model))
    changes = column_changes(options)
    for name, folder in adapters.items():
        checked(bank.load, name, folder, changes=changes)
    if source is None:
        return predict_typed(bank, options["text"] or _lines_of_stdin(), options["batch_size"])
    return predict_rows(bank, source, options["batch_size"], shown)


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
