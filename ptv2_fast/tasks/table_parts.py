"""Tables of lines in parts, so that a file of any length is read in constant memory."""

import gzip
import io
import itertools
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import IO, Any

import datasets
import pandas

from ptv2_fast.tasks.json_files import json_table, load_json
from ptv2_fast.tasks.sources import Part, Source
from ptv2_fast.tasks.tables import checked_frame, spelt_cells, unreadable

# The parts, each with the bytes that were read until its end.
_Parts = Iterator[tuple[datasets.Dataset, int]]


def table_parts(
    source: Source, csv_options: Mapping[str, Any], rows: int, list_column: str | None = None
) -> Generator[Source, None, None]:
    """The table of a .csv, .tsv or JSON lines file or stream, so many rows at a time.

    Nothing comes of other sources, and of a JSON file that begins with something else than lines
    with an object each.

    Args:
        csv_options: keyword arguments of pandas.read_csv.
        list_column: of JSON lines, where text is read as a list of it, and none as no value.

    Raises:
        ValueError: when it comes to a row that cannot be read.
    """
    if source.format not in ("csv", "tsv", "json"):
        return
    file, opened = _open(source)
    try:
        is_json = source.format == "json"
        read = _json_parts if is_json else _csv_parts
        options = {**spelt_cells(source), **csv_options}
        if is_json:
            options = {"list_column": list_column}
        first = 1
        for table, position in read(source, file, opened, rows, options):
            numbers = range(first, first + len(table))
            first += len(table)
            yield replace(source, part=Part(numbers, table, position))
    finally:
        if source.path is not None:
            file.close()
            opened.close()


def joined(source: Source, parts: Sequence[Source]) -> Source:
    """One source with the rows of all parts of a stream."""
    tables = [part.part.table for part in parts if part.part is not None]
    table = datasets.concatenate_datasets(tables)
    return replace(source, part=Part(range(1, len(table) + 1), table, is_whole=True))


def _open(source: Source) -> tuple[IO[Any], IO[Any]]:
    """What to read from, and the file below it."""
    if source.stream is not None:
        return source.stream.file, source.stream.file
    assert source.path is not None
    opened = source.path.open("rb")
    if source.path.suffix.lower() == ".gz":
        return gzip.GzipFile(fileobj=opened), opened  # type: ignore[return-value]
    return opened, opened


def _position(opened: IO[Any], source: Source) -> int:
    """How far a file was read, in bytes; 0 of a stream."""
    return 0 if source.path is None else opened.tell()


def _csv_parts(
    source: Source, file: IO[Any], opened: IO[Any], rows: int, options: dict[str, Any]
) -> _Parts:
    try:
        with pandas.read_csv(file, chunksize=rows, **options) as frames:
            for frame in frames:
                if len(frame):
                    yield checked_frame(frame, source), _position(opened, source)
    except pandas.errors.EmptyDataError:
        return
    except (OSError, ValueError, EOFError) as error:
        raise unreadable(source, error) from error


def _json_parts(
    source: Source, file: IO[Any], opened: IO[Any], rows: int, options: dict[str, Any]
) -> _Parts:
    name = options["list_column"]
    text = file if isinstance(file, io.TextIOBase) else io.TextIOWrapper(file, "utf-8-sig")
    lines = ((number, line) for number, line in enumerate(text, 1) if line.strip())
    done = 0
    try:
        while batch := [*itertools.islice(lines, rows)]:
            try:
                objects = [_object(number, line) for number, line in batch]
            except ValueError:
                if source.path is not None and not done:
                    return  # one list, or objects over several lines
                raise
            for each in objects:
                if isinstance(each.get(name), str):
                    each[name] = [each[name]] if each[name] else None
            table = json_table(objects, range(done + 1, done + len(objects) + 1))
            yield table, _position(opened, source)
            done += len(objects)
    except (OSError, ValueError, EOFError) as error:
        raise unreadable(source, error) from error
    finally:
        if text is not file and source.path is None:
            text.detach()  # it would close a file that is not ours


def _object(number: int, line: str) -> dict[str, Any]:
    try:
        value = load_json(line.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: broken JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"line {number}: expected an object, got {line.strip()[:60]}")
    return value
