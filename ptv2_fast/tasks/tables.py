"""Reading tables from files and from the hub, with errors that name the file and the row."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pandas
from datasets import ClassLabel, Dataset
from datasets.table import InMemoryTable
from pyarrow.parquet import ParquetFile

from ptv2_fast.files import read_text
from ptv2_fast.tasks.benchmarks import Benchmark
from ptv2_fast.tasks.json_files import json_objects, json_table
from ptv2_fast.tasks.sources import Source

# Rows in one piece of a table: the text of a piece must stay below 2 GiB, and the passages of
# ReCoRD, once for each entity, are more.
_ROWS = 100_000


def read_rows(source: Source, benchmark: Benchmark, template: str) -> Dataset:
    """Read a split of a published data set and phrase its rows as its family takes them.

    Raises:
        ValueError: for a file that cannot be read, a row that lacks a field, or no rows.
    """
    rows = _phrased(source, benchmark, template)
    parts = []
    while part := list(itertools.islice(rows, _ROWS)):
        parts.append(Dataset.from_list(part))
    check_not_empty(source, len(parts))
    return datasets.concatenate_datasets(parts)


def _phrased(source: Source, benchmark: Benchmark, template: str) -> Iterator[dict[str, Any]]:
    assert benchmark.rows is not None
    table = read_table(source, benchmark.csv_options)
    names = table.column_names
    spelt = {name: _spelt_out(table, name) for name in names}
    for index, values in enumerate(zip(*spelt.values(), strict=True)):
        try:
            yield from benchmark.rows(dict(zip(names, values, strict=True)), template)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{source.name} row {source.number(index)}: expected a row of {benchmark.title}, "
                f"got columns {names} ({type(error).__name__}: {error})"
            ) from error


def read_columns(source: Source, columns: dict[str, str], optional: tuple = ()) -> Dataset:
    """Read a table and keep the named columns.

    Args:
        source: csv, tsv, json, parquet or hub.
        columns: our name -> name in the source.
        optional: those of our names that may be absent.

    Returns:
        A data set with our names as columns; class labels are spelt out.

    Raises:
        ValueError: for a file that cannot be read, a missing column, or no rows.
    """
    return keep_columns(read_table(source), source, columns, optional)


def keep_columns(
    table: Dataset, source: Source, columns: dict[str, str], optional: tuple = ()
) -> Dataset:
    """What `read_columns` does with the table of its source."""
    kept = {ours: theirs for ours, theirs in columns.items() if theirs in table.column_names}
    for ours, theirs in columns.items():
        if ours not in kept and ours not in optional:
            raise ValueError(
                f"{ours}_column: expected a column of {source.name}, got {theirs!r}; it has "
                f"{table.column_names}"
            )
    try:
        spelt = {ours: _spelt_out(table, theirs) for ours, theirs in kept.items()}
    except ValueError as error:  # of datasets, for the number of a class that is not declared
        raise ValueError(f"{source.name}: {error}") from error
    return Dataset.from_dict(spelt)


def check_not_empty(source: Source, count: int) -> None:
    """Raise a ValueError when the source has no examples."""
    if count == 0:
        raise _empty(source)


def _empty(source: Source) -> ValueError:
    return ValueError(f"{source.name}: expected examples, got an empty data set")


def read_table(source: Source, csv_options: Mapping[str, Any] | None = None) -> Dataset:
    """The whole table of a source.

    Args:
        source: csv, tsv, json, parquet, hub or a part that was read.
        csv_options: keyword arguments of pandas.read_csv; with them other suffixes are read as tsv.

    Raises:
        ValueError: for a file that cannot be read, or no rows.
    """
    if source.part is not None:
        return source.part.table
    if source.format == "other" and csv_options is None:
        raise ValueError(f"{source.name}: expected .csv, .tsv, .json, .jsonl or .parquet")
    try:
        table = _load(source, csv_options or {})
    except Exception as error:  # datasets raises its own kinds, from many libraries below it
        if "corresponds to no data" in str(error):  # a table with a header and no rows
            raise _empty(source) from error
        raise unreadable(source, error.__cause__ or error) from error
    check_not_empty(source, len(table))
    return table


def read_objects(source: Source) -> list[dict[str, Any]]:
    """The objects of a JSON file.

    Raises:
        ValueError: for a file that cannot be read.
    """
    assert source.path is not None
    try:
        return json_objects(read_text(source.path))
    except (OSError, ValueError) as error:
        raise unreadable(source, error) from error


def unreadable(source: Source, cause: BaseException) -> ValueError:
    """The error for a file of which a library says why it cannot be read."""
    reason = " ".join(str(cause).split())[:300]
    return ValueError(f"{source.name}: cannot be read as {source.format}: {reason}")


def _load(source: Source, csv_options: Mapping[str, Any]) -> Dataset:
    if source.hub is not None:
        return _load_split(*source.hub)
    assert source.path is not None
    path = source.path
    if not path.stat().st_size:
        return Dataset.from_dict({})
    if source.format in ("csv", "tsv", "other"):
        options = {**spelt_cells(source), **csv_options}
        return checked_frame(pandas.read_csv(path, **options), source)
    if source.format == "json":
        objects = json_objects(read_text(path))
        return json_table(objects, range(1, len(objects) + 1))
    # Not Dataset.from_parquet: the copy that it makes in the home folder would outlive the run.
    return Dataset(InMemoryTable(ParquetFile(path).read()))


def spelt_cells(source: Source) -> dict[str, Any]:
    """Arguments of pandas.read_csv by which cells stay as they are spelt: "NA" is a word, "01" and
    "true" are labels."""
    separator = "," if source.format == "csv" else "\t"
    return {"sep": separator, "dtype": str, "na_filter": False}


def checked_frame(frame: pandas.DataFrame, source: Source) -> Dataset:
    """The rows that pandas has read, in the order of the file.

    Raises:
        ValueError: for rows that it has cut in other places than the file does.
    """
    if not isinstance(frame.index, pandas.RangeIndex):
        # The first cells would be the names of the rows, and the others move to the left.
        raise ValueError(f"expected rows of {len(frame.columns)} cells, as the header, got more")
    if source.format != "csv" and frame.stack().str.contains("\t").any():
        # Two rows in one, or more: quotation marks that are text were taken for those of cells.
        raise ValueError("expected no tab inside a cell, got one between quotation marks")
    return Dataset.from_pandas(frame, preserve_index=False)


def _load_split(name: str, config: str | None, split: str) -> Dataset:
    """A split of a data set of the hub, or of a folder, whose tables of text are read as files."""
    if Path(name).is_dir():
        builder = datasets.load_dataset_builder(name, config)
        paths = (getattr(builder.config, "data_files", None) or {}).get(split) or []
        files = [Source(path, Path(path)) for path in paths]
        as_text = {file.format for file in files} <= {"csv", "tsv", "json"}
        if files and as_text and _has_defaults(builder.config):
            separator = {"sep": builder.config.sep} if hasattr(builder.config, "sep") else {}
            table = datasets.concatenate_datasets([_load(file, separator) for file in files])
            return _with_classes(table, builder.info.features or {})
    return datasets.load_dataset(name, config, split=split)


def _has_defaults(config: Any) -> bool:
    """Whether a card says no more of its files than where they are and what separates cells."""
    told = ("name", "version", "data_dir", "data_files", "description", "features", "sep")
    return all(
        field.name in told or getattr(config, field.name) == field.default
        for field in dataclasses.fields(config)
    )


def _with_classes(table: Dataset, features: Mapping[str, Any]) -> Dataset:
    """The table with the classes that a card declares; all else stays as it is spelt."""
    for name, feature in features.items():
        is_class = isinstance(getattr(feature, "feature", feature), ClassLabel)
        if is_class and name in table.column_names:
            table = table.cast_column(name, feature)
    return table


def _spelt_out(table: Dataset, column: str) -> list:
    """The values of a column, with class numbers replaced by class names."""
    feature, values = table.features[column], table[column][:]
    if isinstance(feature, ClassLabel):
        return [None if value is None or value < 0 else feature.int2str(value) for value in values]
    inner = getattr(feature, "feature", None)
    if isinstance(inner, ClassLabel):
        return [row and [None if n < 0 else inner.int2str(n) for n in row] for row in values]
    return values
