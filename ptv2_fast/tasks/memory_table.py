"""A small table in memory, for typed texts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow


class MemoryTable:
    """What tasks read of a Dataset, over lists: to make one of those takes milliseconds, a hundred
    times what a text takes to be tokenised.

    Args:
        columns: name -> values, all as many.
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self._columns = {name: list(values) for name, values in columns.items()}
        self._length = len(next(iter(self._columns.values()), []))

    @classmethod
    def joined(cls, tables: Sequence[Any]) -> "MemoryTable":
        """The rows of tables with the same columns, one behind the other."""
        return cls(
            {
                name: [value for table in tables for value in table[name][:]]
                for name in tables[0].column_names
            }
        )

    @property
    def column_names(self) -> list[str]:
        return list(self._columns)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key: str | int) -> Any:
        """The values of a column, or a row as a dictionary."""
        if isinstance(key, str):
            return self._columns[key]
        return {name: values[key] for name, values in self._columns.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(self._length))

    def add_column(self, name: str, values: Sequence[Any]) -> "MemoryTable":
        return MemoryTable({**self._columns, name: values})

    def remove_columns(self, name: str) -> "MemoryTable":
        return self.select_columns([other for other in self._columns if other != name])

    def select_columns(self, names: Sequence[str]) -> "MemoryTable":
        return MemoryTable({name: self._columns[name] for name in names})

    def select(self, indices: Sequence[int]) -> "MemoryTable":
        return MemoryTable({n: [values[i] for i in indices] for n, values in self._columns.items()})

    def with_format(self, kind: str) -> pyarrow.Table:
        """The same as "arrow"."""
        assert kind == "arrow"
        return pyarrow.table(self._columns)

    def to_dict(self) -> dict[str, list]:
        return dict(self._columns)
