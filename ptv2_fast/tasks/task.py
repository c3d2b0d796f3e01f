"""What the task families share: examples with labels in, features for a model out, scores back."""

import difflib
import functools
import itertools
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import ptv2_fast
from ptv2_fast.tasks.benchmarks import Benchmark
from ptv2_fast.tasks.columns import Columns
from ptv2_fast.tasks.comparison import Compared
from ptv2_fast.tasks.options import DataOptions
from ptv2_fast.tasks.sources import TYPED, Source
from ptv2_fast.tasks.table_parts import joined, table_parts
from ptv2_fast.tasks.tables import check_not_empty, read_table

# Makes a padded batch of rows: a BatchEncoding (transformers annotates it as a dict).
Collator = Callable[[list[dict[str, Any]]], Any]

_SHOWN = 80  # characters of a label in a message
LISTED = 20  # how many examples a remark names; it counts all
_MAP_BATCH = 1000
_ALIKE = "labels that differ in blanks, case or Unicode's form alone (taken as several)"
_INTEGER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Examples:
    """Examples of one source in the task's own columns, still as text.

    Attributes:
        unit: what messages call one of them ("row", "sentence"), counted from 1.
        remarks: what was odd in the source but accepted, for the user and the report.
        drawn_from: how many there were, when these are a part of them; None = all.
    """

    source: Source
    table: Dataset | Columns
    unit: str = "row"
    remarks: dict[str, Any] = field(default_factory=dict)
    drawn_from: int | None = None

    def __len__(self) -> int:
        return len(self.table)

    def where(self, index: int) -> str:
        """How messages call one example."""
        return f"{self.source.name} {self.unit} {self.source.number(index)}"

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


@dataclass(frozen=True)
class Features:
    """What a model takes, in one or more rows an example.

    Attributes:
        table: model inputs, labels, and the column `example`: the index of the row's example.
        examples: which they were made from.
        truncated: how many examples were cut to fit.
    """

    table: Dataset | Columns
    examples: Examples
    truncated: int

    def __len__(self) -> int:
        return len(self.table)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row; of its longest choice where a row holds several."""
        return [
            max(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids)
            for ids in self.table["input_ids"][:]
        ]

    @property
    def token_counts(self) -> list[int]:
        """Tokens of each row, of all its choices together where it holds several."""
        return [
            sum(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids)
            for ids in self.table["input_ids"][:]
        ]

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


class Task(Compared, ABC):
    """One task family, bound to the columns that the options name.

    Args:
        options: with the defaults of the published data set, if the task names one.

    Attributes:
        learnt: what predictions take from the training labels, JSON-ready.
    """

    name: ClassVar[str]
    model_class: ClassVar[str]  # the auto class of transformers that has its head
    label_columns: ClassVar[tuple[str, ...]] = ("labels",)  # of the features
    default_metrics: ClassVar[tuple[str, ...]]
    head_is_new: ClassVar[bool] = True  # no pretrained model has one
    part_rows: ClassVar[int] = 1000  # of a table that is read in parts

    def __init__(self, options: DataOptions) -> None:
        self.options = options
        self.learnt: dict[str, Any] = {}

    @property
    def benchmark(self) -> Benchmark | None:
        """The published data set, None for a user's own."""
        return self.options.benchmark

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of the figures that are asked for."""
        return self.benchmark.metrics if self.benchmark else self.default_metrics

    @property
    def metric(self) -> str:
        """The figure that selects the best checkpoint, larger is better."""
        return self.figures[0]

    @abstractmethod
    def read(self, source: Source, labelled: bool = True) -> Examples:
        """Read a source.

        Raises:
            ValueError: for what is missing or malformed there, or when it is empty.
        """

    def read_parts(self, source: Source) -> Iterator[Examples]:
        """What `read` gives without labels, a part after the other: of a long table of which each
        row is an example, `part_rows` at a time are held; anything else comes whole.

        Raises:
            ValueError: as `read`, when it comes to what is wrong.
        """
        parts = table_parts(source, self.benchmark.table if self.benchmark else {}, self.part_rows)
        try:
            begun = [*itertools.islice(parts, 2)]
        except ValueError:  # a file of columns rather than a table, perhaps
            if source.path is None:
                raise
            begun = []
        if source.path is not None and len(begun) < 2:
            yield self.read(source, labelled=False)
            return
        check_not_empty(source, len(begun))
        if self.has_example_rows(begun[0]):
            for part in itertools.chain(begun, parts):
                yield self.read(part, labelled=False)
        elif source.path is not None:
            parts.close()
            yield self.read(source, labelled=False)
        else:
            yield self.read(joined(source, [*begun, *parts]), labelled=False)

    def has_example_rows(self, part: Source) -> bool:
        """Whether the rows of a table can be read apart, by its first part."""
        return len(self.read(part, labelled=False)) == len(read_table(part))

    @property
    def text_names(self) -> tuple[str, ...]:
        """What the texts are that a typed text has, with tabs between; the last may be several."""
        return ("text",)

    def trainable(self, examples: Examples) -> Examples:
        """The labelled examples that training can use; remarks say which are left out."""
        return examples

    @abstractmethod
    def from_texts(self, texts: Sequence[str], source: Source = TYPED) -> Examples:
        """Examples without labels from typed texts.

        Args:
            source: numbers the texts, where they are a part of more.

        Raises:
            ValueError: when there is none, or one does not fit the task.
        """

    @abstractmethod
    def labels_of(self, examples: Examples) -> Iterator[tuple[int, Any]]:
        """Every label as (index of its example, label)."""

    @abstractmethod
    def tokenize(
        self,
        rows: dict[str, list],
        tokenizer: PreTrainedTokenizerBase,
        label_numbers: dict[str, int] | None,
        max_length: int,
    ) -> dict[str, list]:
        """The columns a model takes; without `label_numbers`, placeholders where labels go.

        Args:
            rows: columns of some examples.

        Returns:
            The columns, `was_cut` (bool), and, when an example has several rows, `example`: the
            index of its example in `rows`.
        """

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """Makes a batch of tensors, padded to the longest example in it."""

    @abstractmethod
    def predictions(
        self, outputs: Any, batch: dict[str, Tensor], labels: Sequence[str]
    ) -> list[Any]:
        """What is kept of the model's outputs on a batch, one per row."""

    @abstractmethod
    def results(self, predicted: list, features: Features, labels: list[str]) -> list[Any]:
        """The predictions in the task's own terms, one per example, from those of the rows."""

    def certainty(self, outputs: Any, batch: dict[str, Tensor], predicted: list[Any]) -> list[Any]:
        """How sure the model is of its predictions on a batch, one per row; None where its results
        say that."""
        return [None] * len(predicted)

    def scores(self, certain: list, features: Features) -> list[Any]:
        """The same, one per example in the terms of the task, from those of the rows."""
        return [None] * len(features.examples)

    @abstractmethod
    def metrics(self, results: list, examples: Examples, labels: list[str]) -> dict[str, float]:
        """Scores of results against the examples' labels; F1 and the like in 0..1."""

    @abstractmethod
    def titles(self, labels: list[str]) -> dict[str, str]:
        """What the names of the task's figures mean, for labels of a run."""

    @abstractmethod
    def describe(
        self, example: dict, result: Any, labels: Sequence[str] = (), scores: Any = None
    ) -> dict[str, Any]:
        """One result as it is printed, JSON-ready.

        Args:
            example: the columns of its example.
            labels: those of the run.
            scores: its part of what the method of this name gives.
        """

    def adapt_model(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, labels: list[str]
    ) -> None:
        """Fit a newly loaded model to the task, in place, before a method prepares it.

        Raises:
            ValueError: when the model, the tokenizer or the labels cannot serve the task.
        """

    def find_labels(self, examples: Examples) -> list[str]:
        """The labels that occur, sorted: by value when all are integers, else as text.

        Raises:
            ValueError: for a label that is missing, and when there are fewer than two.
        """
        found: set[str] = set()
        for index, label in self.labels_of(examples):
            found.add(_as_text(label, examples, index))
        if len(found) < 2:
            raise ValueError(
                f"{examples.source.name}: expected at least two labels, got {sorted(found)}"
            )
        numeric = all(_INTEGER.fullmatch(label) for label in found)
        return sorted(sorted(found), key=int if numeric else None)  # "1" and "01" are two labels

    def count_labels(self, examples: Examples) -> Counter[str]:
        """How often each label occurs."""
        return Counter(str(label) for _, label in self.labels_of(examples))

    def learn(self, train: Examples, labels: list[str]) -> None:
        """Set `learnt` by the training labels."""

    def remember(self, found: dict[str, Any]) -> None:
        """Set `learnt` by what a run found at its start.

        Raises:
            ValueError: for what `learn` never gives.
        """

    def check_labels(self, examples: Examples, labels: list[str]) -> None:
        """Check that every label is known.

        Raises:
            ValueError: naming the label, the file and the row.
        """
        known = set(labels)
        for index, label in self.labels_of(examples):
            if _as_text(label, examples, index) not in known:
                raise ValueError(
                    f"{examples.where(index)}: unknown label {_short(label)}; known are "
                    f"{_some(str(label), labels)}"
                )

    def featurize(
        self,
        examples: Examples,
        tokenizer: PreTrainedTokenizerBase,
        labels: list[str] | None,
        max_length: int,
    ) -> Features:
        """Token ids, and label numbers when `labels` are given (they are checked).

        With the option feature_cache the result is kept in that folder, under a name made from the
        examples, the tokenizer and the options.

        Raises:
            ValueError: for an unknown label, or, with long_input="error", an example that is
                longer than `max_length` tokens.
        """
        numbers = None
        if labels is not None:
            self.check_labels(examples, labels)
            numbers = {label: number for number, label in enumerate(labels)}
        settings = (numbers, max_length)
        if isinstance(examples.table, Columns):
            rows = examples.table.to_dict()
            table: Any = Columns(
                _tokenize_batch(self, tokenizer, *settings, rows, [*range(len(examples))])
            )
        else:
            table = self._tokenize_dataset(examples, tokenizer, settings)
        cut = {
            index
            for index, flag in zip(table["example"][:], table["was_cut"][:], strict=True)
            if flag
        }
        if cut and self.options.long_input == "error":
            raise ValueError(
                f"{examples.where(min(cut))}: expected at most {max_length} tokens, got "
                "more (long_input='truncate' would cut it)"
            )
        return Features(table.remove_columns("was_cut"), examples, len(cut))

    def _tokenize_dataset(
        self, examples: Examples, tokenizer: PreTrainedTokenizerBase, settings: tuple
    ) -> Dataset:
        table: Any = examples.table
        workers = min(self.options.preprocessing_num_workers, len(examples))
        return table.map(
            functools.partial(_tokenize_batch, self, tokenizer, *settings),
            with_indices=True,
            batched=True,
            batch_size=_MAP_BATCH,
            remove_columns=table.column_names,
            num_proc=workers if workers > 1 else None,  # 1 would start a process of its own
            cache_file_name=self._cache_file(examples, tokenizer, settings),
            new_fingerprint="0",  # of no use to us, and slow to compute from the tokenizer
            desc=f"tokenizing {examples.source.name}",
        )

    def _cache_file(
        self, examples: Examples, tokenizer: PreTrainedTokenizerBase, settings: tuple
    ) -> str | None:
        if self.options.feature_cache is None:
            return None
        folder = Path(self.options.feature_cache)
        folder.mkdir(parents=True, exist_ok=True)
        contents = {name: examples.table[name][:] for name in examples.table.column_names}
        what = (
            ptv2_fast.__version__, datasets.__version__, type(self).__name__,
            self.options.model_dump(), _description(tokenizer), settings, contents,
        )  # fmt: skip
        return str(folder / f"{Hasher.hash(what)}.arrow")


def _description(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a fast tokenizer does, without the truncation and padding that its last call set."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: part for name, part in whole.items() if name not in ("truncation", "padding")}


def _tokenize_batch(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    label_numbers: dict[str, int] | None,
    max_length: int,
    rows: dict[str, list],
    indices: list[int],
) -> dict[str, list]:
    columns = task.tokenize(dict(rows), tokenizer, label_numbers, max_length)
    local = columns.pop("example", range(len(indices)))
    return {**columns, "example": [indices[index] for index in local]}


def was_cut(encoding: Any, count: int) -> list[bool]:
    """For each of `count` inputs of a fast tokenizer's batch whether truncation cut it."""
    return [bool(encoding.encodings[index].overflowing) for index in range(count)]


def label_remarks(labels: Iterable[str]) -> dict[str, Any]:
    """Labels that differ in blanks, in case or in how Unicode writes them alone: perhaps one."""
    alike: dict[str, set[str]] = defaultdict(set)
    for label in labels:
        alike["".join(unicodedata.normalize("NFKC", label).casefold().split())].add(label)
    found = [sorted(group) for group in alike.values() if len(group) > 1]
    return {_ALIKE: sorted(found)[:LISTED]} if found else {}


def _short(label: Any) -> str:
    text = repr(str(label))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _some(label: str, labels: list[str]) -> str:
    """Up to five known labels, those that look like the unknown one first."""
    alike = difflib.get_close_matches(label[:_SHOWN], labels, n=5)
    few = [*alike, *(other for other in labels if other not in alike)][:5]
    rest = len(labels) - len(few)
    return ", ".join(map(_short, few)) + (f" and {rest} others" if rest else "")


def _as_text(label: Any, examples: Examples, index: int) -> str:
    """A label of a data set as the text that names it."""
    if isinstance(label, bool) or (isinstance(label, int | str) and label != ""):
        return str(label)
    raise ValueError(
        f"{examples.where(index)}: expected a label (text or an integer), got {label!r}"
    )
