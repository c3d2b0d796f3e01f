"""Rows of JSON files as they are spelt: no text becomes a date, and errors name the row."""

import bisect
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow
from datasets import Dataset
from datasets.table import InMemoryTable

_SHOWN = 60  # characters of a value in a message
_DEEPEST = 30  # lists and objects in each other; Arrow's own limit is 64


def json_objects(text: str) -> list[dict[str, Any]]:
    """The objects of a JSON text: one a line, one behind the other, or in one list.

    Raises:
        ValueError: naming the line or the row that is no object, is broken or nested too deeply.
    """
    values = [*_values(text, 1)]
    if len(values) == 1 and isinstance(values[0][1], list):
        return [_object(f"row {row}", value) for row, value in enumerate(values[0][1], 1)]
    return [_object(f"line {line}", value) for line, value in values]


def json_lines(text: str, first: int) -> list[dict[str, Any]]:
    """The objects of lines with one each, and of empty lines.

    Args:
        first: the number of the first line, for messages.

    Raises:
        ValueError: naming the line with anything else.
    """
    values = [*_values(text, first)]
    for line, value in values:
        _object(f"line {line}", value)
    lines = [line for line, content in enumerate(text.split("\n"), first) if content.strip()]
    begun = [line for line, _ in values]
    if lines != begun:
        wrong = min({*lines} ^ {*begun}, default=first)
        raise ValueError(f"line {wrong}: expected an object in each line")
    return [value for _, value in values]


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


def _values(text: str, line: int) -> Iterator[tuple[int, Any]]:
    """The values on the top level, each with the number of the line that it begins in."""
    decoder, place, end = json.JSONDecoder(), 0, len(text)
    while True:
        while place < end and (text[place].isspace() or text[place] == "\ufeff"):
            line += text[place] == "\n"
            place += 1
        if place == end:
            return
        try:
            value, after = decoder.raw_decode(text, place)
        except RecursionError:
            raise ValueError(f"line {line}: nested too deeply") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"line {line}: broken JSON: {error}") from None
        yield line, value
        line += text.count("\n", place, after)
        place = after


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {_shown(value)}")
    return value


def _column(name: str, values: list, numbers: Sequence[int]) -> Any:
    """The values as an array of one type."""
    if (error := _conversion_error(values)) is None:
        return pyarrow.array(values)
    # The first values, as far as they have one type.
    counts = range(1, len(values))
    good = bisect.bisect_left(counts, True, key=lambda n: _conversion_error(values[:n]) is not None)
    raise ValueError(
        f"row {numbers[good]}: expected {name} to be of one type in all rows, got "
        f"{_shown(values[good])} ({error})"
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
