"""Rows of JSON files as they are spelt: no text becomes a date, and errors name the row."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset
from datasets.table import InMemoryTable

from ptv2_fast.files import read_text

_SHOWN = 60  # characters of a value in a message
_DEEPEST = 30  # lists and objects in each other; Arrow's own limit is 64


def read_json_rows(path: Path) -> Dataset:
    """Read one object a line, a list of objects, or objects one behind the other; gzip or not.

    Raises:
        ValueError: naming the line or the row that is no object, is broken, is nested too deeply or
            has a value of another type than those before it.
        OSError: for a file that cannot be read.
    """
    rows: list[dict[str, Any]] = []
    for where, value in _values(read_text(path)):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, got {_shown(value)}")
        rows.append(value)
    return json_table(rows, range(1, len(rows) + 1))


def json_table(rows: Sequence[dict[str, Any]], numbers: Sequence[int]) -> Dataset:
    """Objects as a table; what one of them lacks is None.

    Args:
        numbers: of the rows, for messages.

    Raises:
        ValueError: naming the first row with a value of another type than those before it.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: _column(name, [row.get(name) for row in rows], numbers) for name in names}
    return Dataset(InMemoryTable(pyarrow.table(columns)))


def load_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: also where Python's reader would raise RecursionError.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _values(text: str) -> Iterator[tuple[str, Any]]:
    """The values on the top level, or those of the list that is alone there, with their places."""
    decoder, place, end, line = json.JSONDecoder(), 0, len(text), 1
    values: list[tuple[str, Any]] = []
    while True:
        while place < end and text[place].isspace():
            line += text[place] == "\n"
            place += 1
        if place == end:
            break
        try:
            value, after = decoder.raw_decode(text, place)
        except RecursionError:
            raise ValueError(f"line {line}: nested too deeply") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"line {line}: broken JSON: {error}") from None
        values.append((f"line {line}", value))
        line += text.count("\n", place, after)
        place = after
    if len(values) == 1 and isinstance(values[0][1], list):
        values = [(f"row {index}", value) for index, value in enumerate(values[0][1], 1)]
    yield from values


def _column(name: str, values: list, numbers: Sequence[int]) -> Any:
    """The values as an array of one type."""
    if (error := _conversion_error(values)) is None:
        return pyarrow.array(values)
    good, bad = 0, len(values)  # so many of the first values have one type, and have not
    while bad - good > 1:
        middle = (good + bad) // 2
        if _conversion_error(values[:middle]) is None:
            good = middle
        else:
            bad = middle
    raise ValueError(
        f"row {numbers[bad - 1]}: expected {name} to be of one type in all rows, got "
        f"{_shown(values[bad - 1])} ({error})"
    )


def _conversion_error(values: list) -> str | None:
    try:
        deep = _depth(pyarrow.array(values).type) > _DEEPEST
    except RecursionError:
        deep = True
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
        return str(error).partition("\n")[0][:_SHOWN]
    return "nested too deeply" if deep else None


def _depth(type: Any) -> int:
    inner = (type.field(index).type for index in range(type.num_fields))
    return 1 + max(map(_depth, inner), default=0)


def _shown(value: Any) -> str:
    """The beginning of a value as JSON."""
    try:
        text = json.dumps(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested deeply"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
