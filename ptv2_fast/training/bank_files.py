"""Files of which each row is for one adapter of a bank, for several or for all."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ptv2_fast.tasks.sources import Part, Source
from ptv2_fast.tasks.table_parts import table_parts
from ptv2_fast.tasks.tables import read_table
from ptv2_fast.tasks.task import Examples, Task
from ptv2_fast.training.bank import AdapterBank
from ptv2_fast.training.bank_batches import AdapterExamples
from ptv2_fast.training.progress import reading_bar
from ptv2_fast.training.scoring import typed_batches

_COLUMN = "adapter"

Lines = list[dict[str, Any]]


def predict_rows(
    bank: AdapterBank, source: Source, batch_size: int, shown: bool | None = None
) -> Iterator[Lines]:
    """The predictions for a table, part after part, in the order of its rows.

    A row is an example of the adapter that its column `adapter` names, of those in its list, or,
    without that, of all adapters; each of these gives a line, which names it.

    Args:
        source: a file or a stream; JSON lines, .csv and .tsv are not held whole.
        shown: whether there is a bar; None = on a terminal alone.

    Raises:
        ValueError: when it comes to a row that cannot be read, or names no adapter of the bank.
    """
    for part in reading_bar(_table_parts(source), source.path, shown):
        asked = _asked(part, bank.names)
        examples = {}
        for name in bank.names:
            rows = [index for index, names in enumerate(asked) if name in names]
            if rows:
                examples[name] = _read(bank.run_of(name).task, name, part, rows)
        yield _predict(bank, asked, examples, batch_size)


def predict_typed(bank: AdapterBank, texts: Iterable[str], batch_size: int) -> Iterator[Lines]:
    """The predictions of all adapters for typed texts, part after part.

    Raises:
        ValueError: when there is none, and for one that does not fit the task of an adapter.
    """
    for batch, source in typed_batches(texts):
        examples = {name: bank.run_of(name).task.from_texts(batch, source) for name in bank.names}
        yield _predict(bank, [bank.names] * len(batch), examples, batch_size)


def _table_parts(source: Source) -> Iterator[Examples]:
    """The rows of a table; a file that cannot be read in parts is one."""
    count = 0
    for part in table_parts(source, {}, Task.part_rows, list_column=_COLUMN):
        count += 1
        yield Examples(part, read_table(part))
    if not count:
        yield Examples(source, read_table(source))


def _asked(part: Examples, known: Sequence[str]) -> list[Sequence[str]]:
    """The adapters of each row."""
    if _COLUMN not in part.table.column_names:
        return [known] * len(part)
    asked: list[Sequence[str]] = []
    for index, cell in enumerate(part.table[_COLUMN][:]):
        names = known if cell in (None, "", []) else [cell] if isinstance(cell, str) else cell
        if not isinstance(names, Sequence) or not all(name in known for name in names):
            raise ValueError(
                f"{part.where(index)}: expected some of {list(known)} in {_COLUMN}, got {cell!r}"
            )
        asked.append(list(dict.fromkeys(names)))
    return asked


def _read(task: Task, name: str, part: Examples, rows: list[int]) -> Examples:
    """Some rows of a table, as one adapter's task reads them."""
    numbers = [part.source.number(index) for index in rows]
    source = dataclasses.replace(part.source, part=Part(numbers, part.table.select(rows)))
    examples = task.read(source, labelled=False)
    if len(examples) != len(rows):
        raise ValueError(
            f"{part.source.name}: expected rows that are an example each, got {len(examples)} "
            f"examples in {len(rows)} rows for {name}; give it alone"
        )
    return examples


def _predict(
    bank: AdapterBank,
    asked: Sequence[Sequence[str]],
    examples: dict[str, Examples],
    batch_size: int,
) -> Lines:
    """A line for each row and adapter.

    Args:
        asked: the adapters of each row.
        examples: of each adapter, those of its rows in their order.
    """
    runs = {name: bank.run_of(name) for name in examples}
    parts = [
        AdapterExamples(name, runs[name], runs[name].featurize(own))
        for name, own in examples.items()
    ]
    bank.run_parts(parts, batch_size)
    lines = {part.name: part.lines() for part in parts}
    return [{_COLUMN: name, **next(lines[name])} for names in asked for name in names]
