"""Questions with their contexts and answers: SQuAD's own JSON, and rows in the form of the hub."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from datasets import Dataset, Sequence, Value
from datasets import Features as Schema

from ptv2_fast.tasks.examples import Examples
from ptv2_fast.tasks.sources import Source
from ptv2_fast.tasks.tables import check_not_empty, read_columns, read_objects
from ptv2_fast.tasks.task import LISTED

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
    moved, absent, contradictory = [], [], []
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
        pairs = [*zip(answers, given, strict=True)]
        places = [_place(answer, start, context) for answer, start in pairs]
        if NOT_IN_CONTEXT in places:
            absent.append(name)
        if any(new not in (old, NOT_IN_CONTEXT) for new, old in zip(places, given, strict=True)):
            moved.append(name)
        values = (name, _text(row, "question", where), context, answers, places)
        questions.append(dict(zip(_SCHEMA, values, strict=True)))
    ((identity, count),) = Counter(question["id"] for question in questions).most_common(1)
    if count > 1:
        raise ValueError(f"{source.name}: expected unique ids, got {identity!r} twice")
    remarks = {
        "answer_start moved to where the answer stands": moved,
        "answers that do not occur in their context": absent,
        "is_impossible that contradicts the answers (which count)": contradictory,
    }
    table = Dataset.from_list(questions, features=_SCHEMA)
    return Examples(source, table, "question", _remarks(remarks))


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


def _rows(source: Source) -> Iterable[dict[str, Any]]:
    """Rows with the columns id, question, context, answers and perhaps answer_start."""
    if source.path is not None and source.format == "json":
        objects = read_objects(source)
        if len(objects) == 1 and "data" in objects[0]:
            return _official_rows(source, objects[0])
    optional = ("id", "answers", "answer_start", "is_impossible")
    names = {name: name for name in (*optional, "question", "context")}
    return read_columns(source, names, optional).to_list()


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
