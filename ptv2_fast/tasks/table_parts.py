"""Tables of lines in parts, so that a file of any length is read in constant memory."""

import contextlib
import gzip
import io
import itertools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import IO, Any

import datasets
import pandas
from datasets import Dataset

from ptv2_fast.tasks.json_files import json_lines, json_table
from ptv2_fast.tasks.sources import Part, Source
from ptv2_fast.tasks.tables import checked_frame, spelt_cells, unreadable


def table_parts(
    source: Source, csv_options: Mapping[str, Any], rows: int, list_column: str = ""
) -> Generator[Source, None, None]:
    """The table of a .csv, .tsv or JSON lines file or stream, so many rows at a time.

    Nothing comes of other sources, and of a JSON file that begins with something else than lines
    with an object each.

    Args:
        csv_options: keyword arguments of pandas.read_csv.
        rows: of a part; of JSON lines, empty ones count.
        list_column: of JSON lines, where text is read as a list of it, and none as no value.

    Raises:
        ValueError: when it comes to a row that cannot be read.
    """
    if source.format not in ("csv", "tsv", "json"):
        return
    with contextlib.ExitStack() as files:
        if source.stream is not None:
            file = opened = source.stream.file
        else:
            assert source.path is not None
            file = opened = files.enter_context(source.path.open("rb"))
            if source.path.suffix.lower() == ".gz":
                file = files.enter_context(gzip.GzipFile(fileobj=opened))  # type: ignore[arg-type]
        if source.format == "json":
            tables = _json_tables(source, file, rows, list_column)
        else:
            tables = _csv_tables(source, file, rows, csv_options)
        first = 1
        files.enter_context(contextlib.closing(tables))  # before the file that it reads
        try:
            for table in tables:
                numbers = range(first, first + len(table))
                first += len(table)
                position = 0 if source.path is None else opened.tell()
                yield replace(source, part=Part(numbers, table, position))
        except pandas.errors.EmptyDataError:
            return
        except (OSError, ValueError, EOFError) as error:
            raise unreadable(source, error) from error


def joined(source: Source, parts: Sequence[Source]) -> Source:
    """One source with the rows of all parts of a stream."""
    tables = [part.part.table for part in parts if part.part is not None]
    table = datasets.concatenate_datasets(tables)
    return replace(source, part=Part(range(1, len(table) + 1), table, is_whole=True))


def _csv_tables(
    source: Source, file: IO[Any], rows: int, options: Mapping[str, Any]
) -> Generator[Dataset, None, None]:
    with pandas.read_csv(file, chunksize=rows, **{**spelt_cells(source), **options}) as frames:
        yield from (checked_frame(frame, source) for frame in frames if len(frame))


def _json_tables(
    source: Source, file: IO[Any], rows: int, list_column: str
) -> Generator[Dataset, None, None]:
    text = file if isinstance(file, io.TextIOBase) else io.TextIOWrapper(file, "utf-8-sig")
    line, done = 1, 0
    try:
        while batch := [*itertools.islice(text, rows)]:
            try:
                objects = json_lines("".join(batch), line)
            except ValueError:
                if source.path is not None and not done:
                    return  # one list, or objects over several lines
                raise
            for each in objects if list_column else ():
                if isinstance(each.get(list_column), str):
                    each[list_column] = [each[list_column]] if each[list_column] else None
            if objects:
                yield json_table(objects, range(done + 1, done + len(objects) + 1))
            line, done = line + len(batch), done + len(objects)
    finally:
        if text is not file:
            text.detach()  # it would close a file that is not ours
