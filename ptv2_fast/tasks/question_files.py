"""Questions with their contexts and answers: SQuAD's own JSON, and rows in the form of the hub."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Sequence, Value
from datasets import Features as Schema

from ptv2_fast.files import read_text
from ptv2_fast.tasks.json_files import load_json
from ptv2_fast.tasks.sources import Source
from ptv2_fast.tasks.tables import check_not_empty, read_columns
from ptv2_fast.tasks.task import LISTED, Examples

NOT_IN_CONTEXT = -1
_IMPOSSIBLE = {"true": True, "1": True, "false": False, "0": False}
_SCHEMA = Schema(
    {
        "id": Value("string"),
        "question": Value("string"),
        "context": Value("string"),
        "answers": Sequence(Value("string")),
        "answer_starts": Sequence(Value("int64")),
    }
)


def read_questions(source: Source, labelled: bool, unanswerable: bool) -> Examples:
    """Read a source into the columns id, question, context, answers and answer_starts.

    A start that does not fit its answer is moved to the nearest place where the answer stands, or
    is NOT_IN_CONTEXT when there is none; the remarks list both kinds.

    Args:
        labelled: whether answers are read.
        unanswerable: whether a question may have none.

    Raises:
        ValueError: naming the file and the question, for what is missing or malformed.
    """
    rows = list(_rows(source))
    check_not_empty(source, len(rows))
    questions: list[dict[str, Any]] = []
    moved: list[str] = []
    absent: list[str] = []
    contradictory: list[str] = []
    for index, row in enumerate(rows):
        identity = row.get("id")
        name = str(source.number(index) if identity is None else identity)
        where = f"{source.name} question {name!r}"
        context = _text(row, "context", where)
        answers, given = _answers(row, where) if labelled else ([], [])
        if labelled and not answers and not unanswerable:
            raise ValueError(f"{where}: expected an answer, got none (unanswerable=False)")
        flag = _IMPOSSIBLE.get(str(row.get("is_impossible")).strip().lower())
        if labelled and flag is not None and flag == bool(answers):
            contradictory.append(name)
        places = [
            _place(answer, start, context) for answer, start in zip(answers, given, strict=True)
        ]
        if NOT_IN_CONTEXT in places:
            absent.append(name)
        if any(new not in (old, NOT_IN_CONTEXT) for new, old in zip(places, given, strict=True)):
            moved.append(name)
        questions.append(
            {
                "id": name,
                "question": _text(row, "question", where),
                "context": context,
                "answers": answers,
                "answer_starts": places,
            }
        )
    remarks = _remarks(
        {
            "answer_start moved to where the answer stands": moved,
            "answers that do not occur in their context": absent,
            "is_impossible that contradicts the answers (which count)": contradictory,
        }
    )
    _check_ids([question["id"] for question in questions], source)
    return Examples(source, question_table(questions), "question", remarks)


def question_table(questions: list[dict[str, Any]]) -> Dataset:
    """A table of questions; those without the columns of answers have none."""
    full = [{"answers": [], "answer_starts": [], **question} for question in questions]
    return Dataset.from_list(full, features=_SCHEMA)


def trainable(examples: Examples) -> Examples:
    """Without the questions of which no answer occurs in the context; the remarks list them.

    Raises:
        ValueError: when none is left.
    """
    table = examples.table
    starts = table["answer_starts"][:]
    kept = [i for i, places in enumerate(starts) if not places or max(places) >= 0]
    if len(kept) == len(table):
        return examples
    if not kept:
        raise ValueError(f"{examples.source.name}: expected answers that occur in their contexts")
    left_out = sorted(set(range(len(table))) - set(kept))
    ids = table.select(left_out)["id"][:]
    remarks = examples.remarks | _remarks({"left out of training": ids})
    return Examples(examples.source, table.select(kept), "selected question", remarks)


def _remarks(found: dict[str, list[str]]) -> dict[str, Any]:
    """The number of questions of each kind, and the first of their ids."""
    return {
        kind: {"questions": len(ids), "ids": ids[:LISTED]} for kind, ids in found.items() if ids
    }


def _rows(source: Source) -> Iterator[dict[str, Any]]:
    """Rows with the columns id, question, context, answers and perhaps answer_start."""
    content = None
    if source.path is not None and source.path.name.lower().endswith((".json", ".json.gz")):
        content = _json(source.path)
    if isinstance(content, dict) and "data" in content:
        yield from _official_rows(source, content)
    elif isinstance(content, list):
        for index, row in enumerate(content):
            if not isinstance(row, dict):
                raise ValueError(
                    f"{source.name} row {source.number(index)}: expected an object, got {row!r}"
                )
            yield row
    elif source.format == "other":
        raise ValueError(
            f"{source.name}: expected .json, .json.gz, .jsonl or .parquet for question-answering"
        )
    else:
        names = ("id", "question", "context", "answers", "answer_start", "is_impossible")
        optional = ("id", "answers", "answer_start", "is_impossible")
        table = read_columns(source, {name: name for name in names}, optional=optional)
        yield from _table_rows(table)


def _table_rows(table: Dataset) -> Iterator[dict[str, Any]]:
    names = table.column_names
    for values in zip(*(table[name][:] for name in names), strict=True):
        yield dict(zip(names, values, strict=True))


def _json(path: Path) -> Any:
    """The content of a JSON file; None when it is empty or holds one object a line."""
    try:
        text = read_text(path)
        return load_json(text) if text.strip() else None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and path.suffix.lower() != ".gz":
            return None
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error


def _official_rows(source: Source, content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for row in paragraph["qas"]:
                    yield {**row, "context": paragraph["context"]}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{source.name}: expected data, paragraphs, context and qas as in SQuAD's files "
            f"({type(error).__name__}: {error})"
        ) from error


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: expected text in {name}, got {value!r}")
    return value


def _answers(row: dict[str, Any], where: str) -> tuple[list[str], list[int]]:
    """Texts and starts from any of the three forms that are in use."""
    given = row.get("answers")
    texts, starts = given, row.get("answer_start")
    if isinstance(given, dict):  # the hub's
        texts, starts = given.get("text"), given.get("answer_start")
    elif isinstance(given, list) and all(isinstance(answer, dict) for answer in given):  # official
        texts = [answer.get("text") for answer in given]
        starts = [answer.get("answer_start") for answer in given]
    if (
        not isinstance(texts, list)
        or not isinstance(starts, list)
        or len(texts) != len(starts)
        or not all(isinstance(text, str) and text.strip() for text in texts)
        or not all(type(start) is int for start in starts)
    ):
        raise ValueError(
            f"{where}: expected answers with a text and an answer_start each (none where there is "
            f"no answer), got {given!r}"
        )
    return texts, starts


def _place(answer: str, start: int, context: str) -> int:
    """The start if the answer stands there, else the nearest one, else NOT_IN_CONTEXT."""
    if start >= 0 and context.startswith(answer, start):
        return start
    places = [match.start() for match in re.finditer(f"(?={re.escape(answer)})", context)]
    return min(places, key=lambda place: abs(place - start), default=NOT_IN_CONTEXT)


def _check_ids(ids: list[str], source: Source) -> None:
    seen: set[str] = set()
    for identity in ids:
        if identity in seen:
            raise ValueError(f"{source.name}: expected unique ids, got {identity!r} twice")
        seen.add(identity)
