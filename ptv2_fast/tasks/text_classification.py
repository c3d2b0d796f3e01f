"""One label for a text, or for a pair of texts."""

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ptv2_fast.tasks.sources import TYPED, Source, check_not_empty, read_columns
from ptv2_fast.tasks.task import Collator, Examples, Task, was_cut


class TextClassification(Task):
    """Columns: text, text_pair (when the options name one), label."""

    name = "text-classification"
    model_class = "AutoModelForSequenceClassification"
    peft_name = "SEQ_CLS"
    metric = "accuracy"

    def read(self, source: Source, labelled: bool = True) -> Examples:
        if source.format == "other":
            raise ValueError(
                f"{source.name}: expected .csv, .tsv, .json, .jsonl or .parquet for {self.name}"
            )
        columns = {"text": self.options.text_column, "label": self.options.label_column}
        if self.options.text_pair_column is not None:
            columns["text_pair"] = self.options.text_pair_column
        table = read_columns(source, columns, optional=() if labelled else ("label",))
        examples = Examples(source, table)
        for column in ("text", "text_pair"):
            if column in table.column_names:
                for index, text in enumerate(table[column]):
                    if not isinstance(text, str):
                        raise ValueError(
                            f"{examples.where(index)}: expected text in {column}, got {text!r}"
                        )
        return examples

    def from_texts(self, texts: Sequence[str]) -> Examples:
        examples = Examples(TYPED, Dataset.from_dict({"text": list(texts)}), unit="text")
        check_not_empty(TYPED, len(texts))
        if self.options.text_pair_column is None:
            return examples
        pairs = [text.split("\t") for text in texts]
        for index, pair in enumerate(pairs):
            if len(pair) != 2:
                raise ValueError(
                    f"{examples.where(index)}: expected two texts with a tab between, got "
                    f"{texts[index]!r}"
                )
        first, second = zip(*pairs, strict=True)
        return Examples(TYPED, Dataset.from_dict({"text": first, "text_pair": second}), "text")

    def labels_of(self, examples: Examples) -> Iterator[tuple[int, Any]]:
        return enumerate(examples.table["label"][:])

    def tokenize(
        self,
        examples: Examples,
        tokenizer: PreTrainedTokenizerBase,
        label_numbers: dict[str, int] | None,
        max_length: int,
    ) -> dict[str, list]:
        table = examples.table
        pairs = table["text_pair"][:] if "text_pair" in table.column_names else None
        encoding = tokenizer(table["text"][:], pairs, truncation=True, max_length=max_length)
        columns = dict(encoding)
        if label_numbers is None:
            columns["labels"] = [0] * len(table)
        else:
            columns["labels"] = [label_numbers[str(label)] for label in table["label"]]
        return columns | {"was_cut": was_cut(encoding, len(table))}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        return DataCollatorWithPadding(tokenizer)

    def predictions(self, logits: Tensor, labels: Tensor) -> list[int]:
        return logits.argmax(-1).tolist()

    def metrics(self, predicted: list, expected: list, labels: list[str]) -> dict[str, float]:
        macro = f1_score(
            expected, predicted, labels=range(len(labels)), average="macro", zero_division=0
        )
        return {"accuracy": float(accuracy_score(expected, predicted)), "f1": float(macro)}

    def describe(self, example: dict, prediction: int, labels: list[str]) -> dict[str, Any]:
        texts = {name: example[name] for name in ("text", "text_pair") if name in example}
        return texts | {"label": labels[prediction]}
