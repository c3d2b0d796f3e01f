"""One label for a text or for a pair of texts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ptv2_fast.tasks.examples import Examples
from ptv2_fast.tasks.features import Features, TaskTokenizer
from ptv2_fast.tasks.memory_table import MemoryTable
from ptv2_fast.tasks.sources import TYPED, Source
from ptv2_fast.tasks.tables import check_not_empty, read_columns, read_rows
from ptv2_fast.tasks.task import LISTED, Result, Task, confidence


class TextClassification(Task):
    """Columns: text, text_pair (of pairs), label; and what the metrics of a published set need.

    A result is {"label", "logits"}.
    """

    name = "text-classification"
    model_class = "AutoModelForSequenceClassification"
    default_metrics = ("accuracy", "f1")

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Those that are published, where they are of what is predicted: labels or numbers."""
        of_numbers = self.benchmark is not None and "regression" in self.benchmark.options
        return (
            super().metric_names if of_numbers == self.options.regression else self.default_metrics
        )

    def read(self, source: Source, labelled: bool = True) -> Examples:
        if self.benchmark is not None:
            template = str(self.options.template)
            examples = Examples(source, read_rows(source, self.benchmark, template))
            return _whole(examples) if labelled and self.benchmark.torn_rows else examples
        columns = {"text": self.options.text_column, "label": self.options.label_column}
        if self.options.text_pair_column is not None:
            columns["text_pair"] = self.options.text_pair_column
        table = read_columns(source, columns, optional=() if labelled else ("label",))
        return _check_texts(Examples(source, table))

    @property
    def _takes_pairs(self) -> bool:
        if self.benchmark is not None:
            return self.options.template in self.benchmark.pairs
        return self.options.text_pair_column is not None

    @property
    def text_names(self) -> tuple[str, ...]:
        return ("text", "second text") if self._takes_pairs else ("text",)

    def from_texts(self, texts: Sequence[str], source: Source = TYPED) -> Examples:
        """Pairs have a tab between the two texts."""
        check_not_empty(source, len(texts))
        examples = Examples(source, MemoryTable({"text": texts}), unit="text")
        if not self._takes_pairs:
            return _check_texts(examples)
        pairs = [text.split("\t") for text in texts]
        for index, pair in enumerate(pairs):
            if len(pair) != 2:
                raise examples.error(index, "two texts with a tab between", texts[index])
        first, second = zip(*pairs, strict=True)
        table = MemoryTable({"text": first, "text_pair": second})
        return _check_texts(Examples(source, table, unit="text"))

    def tokenize(self, rows: dict[str, list], tokenizer: TaskTokenizer) -> dict[str, list]:
        encoding, was_cut = self.encode(rows, tokenizer)
        labels = self.label_column(rows, tokenizer.label_numbers)
        return dict(encoding) | {"labels": labels, "was_cut": was_cut}

    def encode(self, rows: dict[str, list], tokenizer: TaskTokenizer) -> tuple[Any, list[bool]]:
        """The tokenizer's encoding of the texts, and for each whether it was cut."""
        return tokenizer(rows["text"], rows.get("text_pair"))

    def results(self, predicted: list, features: Features, labels: list[str]) -> list[Result]:
        return [
            {"label": labels[logits.index(max(logits))], "logits": logits} for logits in predicted
        ]

    def describe(self, example: dict, result: Result, labels: Sequence[str] = ()) -> Result:
        """Texts, label and its probability, `score`; of a number, `score` is the number."""
        texts = {name: example[name] for name in ("text", "text_pair") if name in example}
        if "logits" not in result:
            return texts | result
        return texts | {"label": result["label"], "score": confidence(result["logits"])}


def _whole(examples: Examples) -> Examples:
    """Without the rows that lack a label, which the remarks list; as they are when all lack one."""
    labels = examples.table["label"][:]
    torn = [index + 1 for index, label in enumerate(labels) if label == ""]
    if len(torn) in (0, len(labels)):
        return examples
    whole = examples.select([index for index, label in enumerate(labels) if label != ""])
    remark = {"torn rows left out": {"rows": len(torn), "numbers": torn[:LISTED]}}
    return dataclasses.replace(whole, remarks=whole.remarks | remark)


def _check_texts(examples: Examples) -> Examples:
    """The examples, of which every text is one and not blank."""
    return examples.check_text(*(name for name in examples.table.column_names if name != "label"))
