"""What a model takes of examples, and making it with the tokenizer of a task."""

import functools
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

import ptv2_fast
from ptv2_fast.tasks.examples import Examples
from ptv2_fast.tasks.memory_table import MemoryTable

if TYPE_CHECKING:
    from ptv2_fast.tasks.task import Task

# Makes a padded batch of rows: a BatchEncoding (transformers annotates it as a dict).
Collator = Callable[[list[dict[str, Any]]], Any]

_MAP_BATCH = 1000


@dataclass(frozen=True)
class Features:
    """What a model takes, in one or more rows an example.

    Attributes:
        table: model inputs, labels, and the column `example`: the index of the row's example.
        examples: which they were made from.
        truncated: how many examples were cut to fit.
    """

    table: Dataset | MemoryTable
    examples: Examples
    truncated: int

    def __len__(self) -> int:
        return len(self.table)

    @property
    def input_lengths(self) -> list[list[int]]:
        """Tokens of each input of each row: one, or as many as there are choices."""
        return [
            [*map(len, ids)] if ids and isinstance(ids[0], list) else [len(ids)]
            for ids in self.table["input_ids"][:]
        ]

    @property
    def lengths(self) -> list[int]:
        """Tokens of the longest input of each row."""
        return [*map(max, self.input_lengths)]

    @property
    def token_counts(self) -> list[int]:
        """Tokens of each row, of all its choices together where it holds several."""
        return [*map(sum, self.input_lengths)]

    def model_inputs(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> Any:
        """The columns that the collator takes; `labels` are the task's label columns."""
        wanted = (*tokenizer.model_input_names, *labels)
        return self.table.select_columns([n for n in wanted if n in self.table.column_names])

    def take(self, indices: list[int]) -> "Features":
        """The features of some of the examples, in the given order."""
        rows_of: dict[int, list[int]] = defaultdict(list)
        for row, index in enumerate(self.table["example"][:]):
            rows_of[index].append(row)
        table = self.table.select([row for index in indices for row in rows_of[index]])
        places = [place for place, index in enumerate(indices) for _ in rows_of[index]]
        table = table.remove_columns("example").add_column("example", places)
        return Features(table, self.examples.select(indices), self.truncated)


@dataclass(frozen=True)
class TaskTokenizer:
    """A fast tokenizer, and what of its encodings a task keeps.

    Attributes:
        max_length: tokens of the longest input.
        label_numbers: of the labels by their names; None = inputs without labels.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    label_numbers: dict[str, int] | None = None

    def __call__(
        self, texts: list, pairs: list | None = None, **options: Any
    ) -> tuple[Any, list[bool]]:
        """The encoding of texts or pairs of texts, and for each whether truncation cut it."""
        options = {"truncation": True, "max_length": self.max_length, **options}
        encoding: Any = self.tokenizer(texts, pairs, **options)
        cut = [bool(encoding.encodings[index].overflowing) for index in range(len(texts))]
        return encoding, cut

    def cut(self, texts: list[str], longest: int, kept: int) -> list[str]:
        """The texts, cut to `kept` tokens where they have more than `longest`."""
        encoding = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        return [
            text if len(offsets) <= longest else text[: offsets[kept - 1][1]]
            for text, offsets in zip(texts, encoding["offset_mapping"], strict=True)
        ]


def tokenize_examples(
    task: "Task", examples: Examples, tokenizer: TaskTokenizer
) -> Dataset | MemoryTable:
    """The columns of `task.tokenize`, with `example`: the index of each row's example.

    With the option feature_cache they are kept in that folder, under a name made from the examples,
    the tokenizer and the options.
    """
    tokenize = functools.partial(_tokenize_batch, task, tokenizer)
    table: Any = examples.table
    if isinstance(table, MemoryTable):
        return MemoryTable(tokenize(table.to_dict(), [*range(len(table))]))
    workers = min(task.options.preprocessing_num_workers, len(table))
    return table.map(
        tokenize,
        with_indices=True,
        batched=True,
        batch_size=_MAP_BATCH,
        remove_columns=table.column_names,
        num_proc=workers if workers > 1 else None,  # 1 would start a process of its own
        cache_file_name=_cache_file(task, table, tokenizer),
        new_fingerprint="0",  # of no use to us, and slow to compute from the tokenizer
        desc=f"tokenizing {examples.source.name}",
    )


def _tokenize_batch(
    task: "Task", tokenizer: TaskTokenizer, rows: dict[str, list], indices: list[int]
) -> dict[str, list]:
    columns = task.tokenize(dict(rows), tokenizer)
    local = columns.pop("example", range(len(indices)))
    return {**columns, "example": [indices[index] for index in local]}


def _cache_file(task: "Task", table: Dataset, tokenizer: TaskTokenizer) -> str | None:
    if task.options.feature_cache is None:
        return None
    folder = Path(task.options.feature_cache)
    folder.mkdir(parents=True, exist_ok=True)
    # What a fast tokenizer does, without the truncation and padding that its last call set.
    rules = json.loads(tokenizer.tokenizer.backend_tokenizer.to_str())
    rules = {name: part for name, part in rules.items() if name not in ("truncation", "padding")}
    what = (
        ptv2_fast.__version__, datasets.__version__, type(task).__name__,
        task.options.model_dump(), rules,
        (tokenizer.label_numbers, tokenizer.max_length), table[:],
    )  # fmt: skip
    return str(folder / f"{Hasher.hash(what)}.arrow")
