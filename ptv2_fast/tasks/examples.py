"""Examples of a task as they are read, still as text."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset

from ptv2_fast.tasks.memory_table import MemoryTable
from ptv2_fast.tasks.sources import Source


@dataclass(frozen=True)
class Examples:
    """Examples of one source in the task's own columns, still as text.

    Attributes:
        unit: what messages call one of them ("row", "sentence"), counted from 1.
        remarks: what was odd in the source but accepted, for the user and the report.
        drawn_from: how many there were, when these are a part of them; None = all.
    """

    source: Source
    table: Dataset | MemoryTable
    unit: str = "row"
    remarks: dict[str, Any] = field(default_factory=dict)
    drawn_from: int | None = None

    def __len__(self) -> int:
        return len(self.table)

    def where(self, index: int) -> str:
        """How messages call one example."""
        return f"{self.source.name} {self.unit} {self.source.number(index)}"

    def error(self, index: int, expected: str, actual: Any) -> ValueError:
        """To be raised for an example that is something else than is expected."""
        return ValueError(f"{self.where(index)}: expected {expected}, got {actual!r}")

    def check_text(self, *columns: str) -> "Examples":
        """The same examples.

        Raises:
            ValueError: naming the first that has no text, or a blank one, in one of the columns.
        """
        for column in columns:
            for index, text in enumerate(self.table[column][:]):
                if not isinstance(text, str) or not text.strip():
                    raise self.error(index, f"text in {column}", text)
        return self

    def select(self, indices: list[int]) -> "Examples":
        """Some of the examples, in the given order."""
        unit = f"selected {self.unit}"
        return Examples(self.source, self.table.select(indices), unit, self.remarks)

    def draw(self, count: int, seed: int) -> list[int]:
        """The indices of `count` examples, drawn by the seed.

        Examples of one `group`, such as the answers to a question, are scored together and come
        together: then whole groups are drawn until there are at least `count` examples.
        """
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator).tolist()
        if "group" not in self.table.column_names:
            return order[:count]
        groups = self.table["group"][:]
        members: dict[str, list[int]] = defaultdict(list)
        for index, group in enumerate(groups):
            members[group].append(index)
        drawn: list[int] = []
        for group in dict.fromkeys(groups[index] for index in order):
            if len(drawn) < count:
                drawn += members[group]
        return drawn
