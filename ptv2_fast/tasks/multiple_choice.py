"""Which of several texts goes with a text."""

import re
from collections.abc import Sequence
from typing import Any

import transformers
from datasets import Dataset
from transformers import (
    BatchEncoding,
    DataCollatorForMultipleChoice,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ptv2_fast.tasks.examples import Examples
from ptv2_fast.tasks.features import Collator, Features, TaskTokenizer
from ptv2_fast.tasks.memory_table import MemoryTable
from ptv2_fast.tasks.sources import TYPED, Source
from ptv2_fast.tasks.tables import check_not_empty, keep_columns, read_rows, read_table
from ptv2_fast.tasks.task import Result, Task, confidence
from ptv2_fast.tasks.word_tables import parse_list

_NUMBERED_CHOICE = re.compile(r"choice(\d+)")


class MultipleChoice(Task):
    """Columns: text, choices (a list of texts, as many in every row), label (the index of the
    right one, from 0).

    The model scores the pair (text, choice) of each choice. A result is {"label", "logits"}.
    """

    name = "multiple-choice"
    model_class = "AutoModelForMultipleChoice"
    default_metrics = ("accuracy",)

    def adapt_model(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, labels: list[str]
    ) -> None:
        if getattr(model.base_model, "pooler", True) is None:
            raise ValueError(
                "model: expected one with the pooler that the head for choices reads, got a "
                f"{type(model).__name__} without (transformers {transformers.__version__} builds "
                "it so; a newer version may not)"
            )

    def read(self, source: Source, labelled: bool = True) -> Examples:
        if self.benchmark is not None:
            table = read_rows(source, self.benchmark, str(self.options.template))
        else:
            table = self._read_own(source, labelled)
        examples = Examples(source, table)
        _check_texts(examples)
        if labelled:
            _check_indices(examples)
        return examples

    def _read_own(self, source: Source, labelled: bool) -> Dataset:
        """A user's table, with the choices in one column or in choice1, choice2, …."""
        table, choices = read_table(source), self.options.choices_column
        if choices not in table.column_names:
            table = _with_choices(table, choices)
        else:
            cells = table[choices][:]
            if all(isinstance(cell, str) for cell in cells):  # lists in the cells of a CSV file
                lists = [parse_list(cell) for cell in cells]
                if None not in lists:
                    table = table.remove_columns(choices).add_column(choices, lists)
        names = {
            "text": self.options.text_column,
            "choices": choices,
            "label": self.options.label_column,
        }
        return keep_columns(table, source, names, optional=() if labelled else ("label",))

    @property
    def text_names(self) -> tuple[str, ...]:
        return ("text", "choices")

    def from_texts(self, texts: Sequence[str], source: Source = TYPED) -> Examples:
        """A text and its choices, with tabs between."""
        check_not_empty(source, len(texts))
        parts = [text.split("\t") for text in texts]
        columns: dict[str, list] = {
            "text": [part[0] for part in parts],
            "choices": [part[1:] for part in parts],
        }
        examples = Examples(source, MemoryTable(columns), unit="text")
        _check_texts(examples)
        return examples

    def find_labels(self, examples: Examples) -> list[str]:
        """The indices of the choices, whether they all occur as labels or not."""
        return [str(index) for index in range(len(examples.table[0]["choices"]))]

    def tokenize(self, rows: dict[str, list], tokenizer: TaskTokenizer) -> dict[str, list]:
        """Each column holds a list per choice, so that batches are [B, choices, T]."""
        choices = len(rows["choices"][0])
        first = [text for text in rows["text"] for _ in range(choices)]
        second = [choice for row in rows["choices"] for choice in row]
        encoding, was_cut = tokenizer(first, second)
        flat = dict(encoding) | {"was_cut": was_cut}
        columns = {
            name: [values[index : index + choices] for index in range(0, len(first), choices)]
            for name, values in flat.items()
        }
        columns["was_cut"] = [any(cut) for cut in columns["was_cut"]]
        return columns | {"labels": self.label_column(rows, tokenizer.label_numbers)}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        collate = DataCollatorForMultipleChoice(tokenizer)
        return lambda rows: BatchEncoding(collate(rows))

    def results(self, predicted: list, features: Features, labels: list[str]) -> list[Result]:
        # Not by the labels: another file may have more choices than the training data.
        return [{"label": str(logits.index(max(logits))), "logits": logits} for logits in predicted]

    def error_texts(self, example: dict, expected: str, result: Any) -> tuple[str, str, str]:
        """The text with its choices, and of these the right one and the chosen one."""
        choices = example["choices"]
        text = " | ".join((example["text"], *choices))
        return text, choices[int(expected)], choices[int(result["label"])]

    def describe(self, example: dict, result: Result, labels: Sequence[str] = ()) -> Result:
        """Text, choices, and the chosen one with its probability, `score`."""
        label = result["label"]
        return {
            "text": example["text"],
            "choices": example["choices"],
            "label": label,
            "choice": example["choices"][int(label)],
            "score": confidence(result["logits"]),
        }


def _with_choices(table: Dataset, column: str) -> Dataset:
    """The table with the columns choice1, choice2, … in one; as it is when it has none."""
    found = [match for name in table.column_names if (match := _NUMBERED_CHOICE.fullmatch(name))]
    if not found:
        return table
    names = [match[0] for match in sorted(found, key=lambda match: int(match[1]))]
    choices = [list(row) for row in zip(*(table[name][:] for name in names), strict=True)]
    return table.add_column(column, choices)


def _check_texts(examples: Examples) -> None:
    """Check that every row has a text and at least two choices, as many as the first row."""
    expected = 0
    for index, choices in enumerate(examples.check_text("text").table["choices"][:]):
        if not isinstance(choices, list) or not all(
            isinstance(choice, str) and choice.strip() for choice in choices
        ):
            raise examples.error(index, "a list of texts in choices", choices)
        if len(choices) < 2:
            raise examples.error(index, "at least two choices", choices)
        expected = expected or len(choices)
        if len(choices) != expected:
            raise examples.error(index, f"{expected} choices, as in the first", len(choices))


def _check_indices(examples: Examples) -> None:
    """Check that every label is the index of a choice."""
    columns = (examples.table[name][:] for name in ("label", "choices"))
    for index, (label, choices) in enumerate(zip(*columns, strict=True)):
        if str(label) not in map(str, range(len(choices))):
            expected = f"the index of one of {len(choices)} choices as label, from 0"
            raise examples.error(index, expected, label)
