"""ptv2-fast eval."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ptv2_fast.cli.parser import BadInput, add_command, add_options, checked, quieten
from ptv2_fast.tasks.options import DataOptions
from ptv2_fast.training import output, run_folder
from ptv2_fast.training.run_lookup import find_run

_COLUMN_OPTIONS = (
    "text_column", "text_pair_column", "choices_column", "label_column", "words_column",
    "tags_column", "sentence_column", "tag_scheme", "decoding", "predicate_column",
    "conll_word_column", "conll_tag_column", "conll_comments", "long_input", "doc_stride",
    "max_answer_length", "n_best", "unanswerable", "null_score_threshold",
)  # fmt: skip


def add(commands: Any) -> None:
    """Add the command."""
    evaluate = add_command(commands, "eval", _evaluate, "score a trained run on labelled data")
    evaluate.add_argument("--run", required=True, help="folder of the run")
    add_scoring_options(evaluate)
    evaluate.add_argument("--data", required=True, help="file of labelled examples")
    evaluate.add_argument(
        "--output", help="new file for the predictions, as JSON lines with what is right"
    )


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    """--batch-size, and where the data differ from what a run was trained on."""
    parser.add_argument("--batch-size", type=int, default=32, help="default: 32")
    group = parser.add_argument_group("where the data differs from the run's training data")
    add_options(group, DataOptions, _COLUMN_OPTIONS)


def _evaluate(options: dict[str, Any]) -> None:
    file = new_file(options)
    run = load(Path(options["run"]), options)
    batch_size = options["batch_size"]
    from ptv2_fast.training.scoring import evaluate_file

    scores, lines = checked(evaluate_file, run, Path(options["data"]), batch_size)
    if file is not None:
        run_folder.write_text(file, "".join(f"{as_json(line)}\n" for line in lines))
    for name, title in run.task.titles(run.labels).items():
        print(f"{name}: {title}", file=sys.stderr)
    if "note" in scores:
        print(f"note: {scores['note']}", file=sys.stderr)
    print(json.dumps(scores, indent=2, ensure_ascii=False))


def new_file(options: dict[str, Any]) -> Path | None:
    """What --output names.

    Raises:
        BadInput: for what is there already or cannot be written, and for a bad --batch-size.
    """
    if options["batch_size"] < 1:
        raise BadInput(f"batch_size: expected an integer >= 1, got {options['batch_size']}")
    if options["output"] is None:
        return None
    file = Path(options["output"])
    checked(output.check_place, file.absolute().parent)
    if file.exists() or not file.absolute().parent.is_dir():
        raise BadInput(f"output: expected a new file in a folder, got {str(file)!r}")
    return file


def as_json(line: dict[str, Any]) -> str:
    """A prediction as it is printed."""
    return json.dumps(line, ensure_ascii=False)


def load(folder: Path, options: dict[str, Any]) -> Any:
    """The run in a folder, with the columns that the options name."""
    checked(_check_run, folder)  # before the heavy imports
    quieten()
    from ptv2_fast.training.models import load_run

    return checked(load_run, folder, column_changes(options))


def column_changes(options: dict[str, Any]) -> dict[str, Any]:
    """The options by which data differ from what a run was trained on."""
    return {name: options[name] for name in _COLUMN_OPTIONS if name in options}


def _check_run(folder: Path) -> None:
    """Raise a ValueError unless the folder is of a run whose options can be read."""
    run, _ = find_run(folder)
    run_folder.read_run_config(run)
