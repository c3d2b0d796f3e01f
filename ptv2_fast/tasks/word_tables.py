"""Cells of tables that hold words: lists written as text, and tables of one word a row."""

import ast
import json
import re
from collections.abc import Callable
from typing import Any

from ptv2_fast.tasks.conll import at_blanks

# A list as JSON, Python or numpy write it: the last without commas, with types around elements.
_OPENING = re.compile(r"\s*(?:(?:np\.|numpy\.)?array\(\s*)?[\[(]\s*")
_VALUE = r"('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|-?\d+|None)"
_ELEMENT = re.compile(
    rf"(?:np\.\w+\(\s*{_VALUE}\s*\)|{_VALUE})(?:[\s,]+|(?=[\])]))",
    re.DOTALL,
)
_CLOSING = re.compile(r"[\])]\s*(?:,\s*dtype=[^()]+)?\)?\s*")
_LISTED = re.compile(r"\s*(?:\[|\(\s*['\"]|(?:np\.|numpy\.)?array\().*[\])]\s*", re.DOTALL)
_SENTENCE = re.compile(r"sent(ence)?[ _.-]?(#|idx?|index|no|num|number|nr)?", re.IGNORECASE)


def parse_list(cell: str) -> list | None:
    """The list that a cell holds as text, written by JSON, Python or numpy; None if it is none."""
    try:
        values = json.loads(cell)
    except (ValueError, RecursionError):
        values = _scan(cell)
    return values if isinstance(values, list) else None


def _scan(cell: str) -> list | None:
    opening = _OPENING.match(cell)
    if opening is None:
        return None
    values, place = [], opening.end()
    while element := _ELEMENT.match(cell, place):
        values.append(ast.literal_eval(element[1] or element[2]))
        place = element.end()
    return values if _CLOSING.fullmatch(cell, place) else None


def as_lists(cells: list, where: Callable[[int], str]) -> list:
    """Cells of text as lists of words: cut at blanks, or read where all hold lists as text.

    Args:
        where: names a row in a message.

    Raises:
        ValueError: for a cell that looks like a list and cannot be read, or is one among texts.
    """
    texts = [cell for cell in cells if isinstance(cell, str) and cell.strip()]
    listed = bool(texts) and all(map(_LISTED.fullmatch, texts))
    found = []
    for index, cell in enumerate(cells):
        if not isinstance(cell, str):
            found.append(cell)
            continue
        values = parse_list(cell) if _LISTED.fullmatch(cell) else None
        if listed and cell.strip() and values is None:
            raise ValueError(
                f'{where(index)}: expected a list of texts as ["a", "b"], got {cell[:80]!r}'
            )
        if not listed and values and all(isinstance(value, str) for value in values):
            raise ValueError(
                f"{where(index)}: expected words with blanks between, as in other rows, got the "
                f"list {cell[:80]!r}"
            )
        found.append(values if listed and cell.strip() else at_blanks(cell))
    return found


def check_label_separators(cells: list, where: Callable[[int], str]) -> None:
    """Check that labels in cells of text have blanks between them, and nothing else.

    Raises:
        ValueError: for the first cell such as "B-PER, O".
    """
    for index, cell in enumerate(cells):
        parts = at_blanks(cell) if isinstance(cell, str) and not _LISTED.fullmatch(cell) else []
        ends = {part[-1] for part in parts[:-1]}
        if len(ends) == 1 and ends <= set(",;|"):
            raise ValueError(
                f"{where(index)}: expected labels with blanks between, got {cell[:80]!r}"
            )


def find_sentence_column(names: list[str]) -> str | None:
    """The column that numbers the sentences of a table with one word a row, by its name."""
    found = [name for name in names if _SENTENCE.fullmatch(name.strip())]
    return found[0] if len(found) == 1 else None


def is_one_word(cell: Any) -> bool:
    """Whether a cell is text without blanks inside, and no list."""
    return isinstance(cell, str) and len(at_blanks(cell)) == 1 and not _LISTED.fullmatch(cell)


def group_words(
    columns: dict[str, list], sentences: list, where: Callable[[int], str]
) -> dict[str, list[list]]:
    """Gather one word a row into sentences.

    Args:
        columns: a cell for each word.
        sentences: what tells the sentences apart: equal values one behind the other, or a value at
            the first word of each.
        where: names a row in a message.

    Raises:
        ValueError: for the first row without a sentence, a sentence that goes on after another one,
            or an empty cell.
    """
    grouped: dict[str, list[list]] = {name: [] for name in columns}
    current, seen = None, set()
    for index, sentence in enumerate(sentences):
        if not (_is_missing(sentence) or sentence == current):
            if sentence in seen:
                raise ValueError(
                    f"{where(index)}: expected the words of a sentence one behind the other, got "
                    f"sentence {sentence!r} again after another one"
                )
            seen.add(sentence)
            current = sentence
            for rows in grouped.values():
                rows.append([])
        for name, cells in columns.items():
            if current is None:
                raise ValueError(f"{where(index)}: expected a sentence's number, got {sentence!r}")
            cell = cells[index]
            if _is_missing(cell) or isinstance(cell, list | dict):
                raise ValueError(f"{where(index)}: expected one of {name}, got {cell!r}")
            grouped[name][-1].append(str(cell).strip())
    return grouped


def _is_missing(cell: Any) -> bool:
    blank = isinstance(cell, str) and not cell.strip()
    return cell is None or blank or (isinstance(cell, float) and cell != cell)
