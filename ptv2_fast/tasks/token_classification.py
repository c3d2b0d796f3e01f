"""One label for each word of a sentence (named entities, parts of speech, chunks)."""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import f1_score as word_f1_score
from torch import Tensor
from transformers import DataCollatorForTokenClassification, PreTrainedTokenizerBase

from ptv2_fast.tasks.sources import (
    TYPED,
    Source,
    check_not_empty,
    read_columns,
    read_conll,
)
from ptv2_fast.tasks.task import Collator, Examples, Task, was_cut

_IGNORED = -100  # what the loss of transformers skips
# Points, hyphens and apostrophes inside a word do not cut it.
_TYPED_WORD = re.compile(r"\w+(?:[.'-]\w+)*|[^\w\s]")
_CHUNK_LABEL = re.compile("O|[BIESLU]-.+")


class TokenClassification(Task):
    """Columns: words, tags; both are lists of text.

    The first sub-word of a word carries its label, the others and special tokens none.
    """

    name = "token-classification"
    model_class = "AutoModelForTokenClassification"
    peft_name = "TOKEN_CLS"
    metric = "f1"

    def read(self, source: Source, labelled: bool = True) -> Examples:
        if source.format == "other":
            tag_column = self.options.conll_tag_column if labelled else None
            columns = read_conll(source, self.options.conll_word_column, tag_column)
            return Examples(source, Dataset.from_dict(columns), unit="sentence")
        names = {"words": self.options.words_column, "tags": self.options.tags_column}
        table = read_columns(source, names, optional=() if labelled else ("tags",))
        # A cell of a CSV file holds the words as text with blanks between them.
        lists = {
            column: [cell.split() if isinstance(cell, str) else cell for cell in table[column]]
            for column in table.column_names
        }
        examples = Examples(source, Dataset.from_dict(lists))
        for index, row in enumerate(examples.table):
            _check_row(row, examples.where(index))
        return examples

    def from_texts(self, texts: Sequence[str]) -> Examples:
        """Words are cut at blanks and around punctuation."""
        check_not_empty(TYPED, len(texts))
        words = [_TYPED_WORD.findall(text) for text in texts]
        return Examples(TYPED, Dataset.from_dict({"words": words}), unit="text")

    def labels_of(self, examples: Examples) -> Iterator[tuple[int, Any]]:
        for index, tags in enumerate(examples.table["tags"][:]):
            for tag in tags:
                yield index, tag

    def tokenize(
        self,
        examples: Examples,
        tokenizer: PreTrainedTokenizerBase,
        label_numbers: dict[str, int] | None,
        max_length: int,
    ) -> dict[str, list]:
        table = examples.table
        encoding = tokenizer(
            table["words"][:], is_split_into_words=True, truncation=True, max_length=max_length
        )
        tags = table["tags"][:] if label_numbers is not None else [None] * len(table)
        labels, word_indices = [], []
        for index, row in enumerate(tags):
            first_of_word = _first_sub_words(encoding.word_ids(index))
            numbers = [_IGNORED] * len(encoding.word_ids(index))
            for position, word in first_of_word:
                # Without labels a zero marks the place to read the prediction from.
                numbers[position] = 0 if label_numbers is None else label_numbers[str(row[word])]
            labels.append(numbers)
            word_indices.append([word for _, word in first_of_word])
        extra = {"labels": labels, "word_indices": word_indices}
        return dict(encoding) | extra | {"was_cut": was_cut(encoding, len(table))}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        return DataCollatorForTokenClassification(tokenizer, label_pad_token_id=_IGNORED)

    def predictions(self, logits: Tensor, labels: Tensor) -> list[list[int]]:
        best = logits.argmax(-1)
        return [row[kept].tolist() for row, kept in zip(best, labels != _IGNORED, strict=True)]

    def metrics(self, predicted: list, expected: list, labels: list[str]) -> dict[str, float]:
        """Of whole chunks by seqeval for labels B-X and I-X; macro F1 of words for others."""
        guessed = [[labels[number] for number in row] for row in predicted]
        true = [[labels[n] for n in row if n != _IGNORED] for row in expected]
        scores = {"accuracy": accuracy_score(true, guessed)}
        if _are_chunks(labels):
            for score in (precision_score, recall_score, f1_score):
                name = score.__name__.removesuffix("_score")
                scores[name] = score(true, guessed, zero_division=0)
        else:
            words = (list(itertools.chain.from_iterable(rows)) for rows in (true, guessed))
            scores["f1"] = word_f1_score(*words, average="macro", labels=labels, zero_division=0)
        return {name: float(score) for name, score in scores.items()}

    def describe(self, example: dict, prediction: list[int], labels: list[str]) -> dict[str, Any]:
        words = example["words"]
        # Words that were cut off, or of which the tokenizer makes nothing, belong to no entity.
        tags = ["O" if "O" in labels else labels[0]] * len(words)
        for word, number in zip(example["word_indices"], prediction, strict=True):
            tags[word] = labels[number]
        described = {"words": words, "tags": tags}
        if _are_chunks(labels):
            described["entities"] = [
                {
                    "type": kind,
                    "text": " ".join(words[first : last + 1]),
                    "first": first,
                    "last": last,
                }
                for kind, first, last in get_entities(tags)
            ]
        return described


def _are_chunks(labels: list[str]) -> bool:
    return all(_CHUNK_LABEL.fullmatch(label) for label in labels)


def _first_sub_words(word_ids: list[int | None]) -> list[tuple[int, int]]:
    """(position, word) of the first sub-word of each word."""
    before = [None, *word_ids]
    return [
        (position, word)
        for position, word in enumerate(word_ids)
        if word is not None and word != before[position]
    ]


def _check_row(row: dict, where: str) -> None:
    words = row["words"]
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{where}: expected a list of words, got {words!r}")
    if "tags" in row and (not isinstance(row["tags"], list) or len(row["tags"]) != len(words)):
        raise ValueError(
            f"{where}: expected one label for each of {len(words)} words, got {row['tags']!r}"
        )
