"""What the task families share: examples with labels in, features for a model out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptv2_fast.tasks.options import DataOptions
from ptv2_fast.tasks.sources import Source

# Makes a padded batch of rows: a BatchEncoding (transformers annotates it as a dict).
Collator = Callable[[list[dict[str, Any]]], Any]


@dataclass(frozen=True)
class Examples:
    """Examples of one source in the task's own columns, still as text.

    `unit` is what messages call one of them ("row", "sentence"), counted from 1.
    """

    source: Source
    table: Dataset
    unit: str = "row"

    def where(self, index: int) -> str:
        """How messages call one example."""
        return f"{self.source.name} {self.unit} {index + 1}"

    def select(self, indices: list[int]) -> "Examples":
        """Some of the examples, in the given order."""
        return Examples(self.source, self.table.select(indices), f"selected {self.unit}")


@dataclass(frozen=True)
class Features:
    """Token ids and label numbers of examples, and how many examples were cut to fit."""

    table: Dataset
    truncated: int

    def __len__(self) -> int:
        return len(self.table)

    def model_inputs(self, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """The columns that the collator takes."""
        wanted = (*tokenizer.model_input_names, "labels")
        return self.table.select_columns([n for n in wanted if n in self.table.column_names])


class Task(ABC):
    """One task family, bound to the columns that the options name."""

    name: ClassVar[str]
    model_class: ClassVar[str]  # the auto class of transformers that has its head
    peft_name: ClassVar[str]  # what PEFT calls the task
    metric: str  # the figure that selects the best checkpoint, larger is better

    def __init__(self, options: DataOptions) -> None:
        self.options = options

    @abstractmethod
    def read(self, source: Source, labelled: bool = True) -> Examples:
        """Read a source.

        Raises:
            ValueError: for what is missing or malformed there, or when it is empty.
        """

    @abstractmethod
    def from_texts(self, texts: Sequence[str]) -> Examples:
        """Examples without labels from typed texts.

        Raises:
            ValueError: when there is none, or one does not fit the task.
        """

    @abstractmethod
    def labels_of(self, examples: Examples) -> Iterator[tuple[int, Any]]:
        """Every label as (index of its example, label)."""

    @abstractmethod
    def tokenize(
        self,
        examples: Examples,
        tokenizer: PreTrainedTokenizerBase,
        label_numbers: dict[str, int] | None,
        max_length: int,
    ) -> dict[str, list]:
        """The columns a model takes; without `label_numbers`, placeholders where labels go."""

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """Makes a batch of tensors, padded to the longest example in it."""

    @abstractmethod
    def predictions(self, logits: Tensor, labels: Tensor) -> list[Any]:
        """The predicted label numbers of a batch: per example an integer or a list of them."""

    @abstractmethod
    def metrics(self, predicted: list, expected: list, labels: list[str]) -> dict[str, float]:
        """Scores of predicted against expected label numbers, each in 0..1."""

    @abstractmethod
    def describe(self, example: dict, prediction: Any, labels: list[str]) -> dict[str, Any]:
        """One prediction as it is printed, JSON-ready."""

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
        numeric = all(label.lstrip("-").isdigit() for label in found)
        return sorted(found, key=int) if numeric else sorted(found)

    def check_labels(self, examples: Examples, labels: list[str]) -> None:
        """Check that every label is known.

        Raises:
            ValueError: naming the label, the file and the row.
        """
        known = set(labels)
        for index, label in self.labels_of(examples):
            if _as_text(label, examples, index) not in known:
                raise ValueError(
                    f"{examples.where(index)}: unknown label {str(label)!r}; known are {labels}"
                )

    def featurize(
        self,
        examples: Examples,
        tokenizer: PreTrainedTokenizerBase,
        labels: list[str] | None,
        max_length: int,
    ) -> Features:
        """Token ids, and label numbers when `labels` are given (they are checked).

        Raises:
            ValueError: for an unknown label, or, with long_input="error", an example that is
                longer than `max_length` tokens.
        """
        numbers = None
        if labels is not None:
            self.check_labels(examples, labels)
            numbers = {label: number for number, label in enumerate(labels)}
        columns = self.tokenize(examples, tokenizer, numbers, max_length)
        cut = columns.pop("was_cut")
        if any(cut) and self.options.long_input == "error":
            raise ValueError(
                f"{examples.where(cut.index(True))}: expected at most {max_length} tokens, got "
                "more (long_input='truncate' would cut it)"
            )
        return Features(Dataset.from_dict(columns), sum(cut))


def was_cut(encoding: Any, count: int) -> list[bool]:
    """For each of `count` inputs of a fast tokenizer's batch whether truncation cut it."""
    return [bool(encoding.encodings[index].overflowing) for index in range(count)]


def _as_text(label: Any, examples: Examples, index: int) -> str:
    """A label of a data set as the text that names it."""
    if isinstance(label, bool) or (isinstance(label, int | str) and label != ""):
        return str(label)
    raise ValueError(
        f"{examples.where(index)}: expected a label (text or an integer), got {label!r}"
    )
