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
from ptv2_fast.tasks.task import Collator, Examples, Features, Task, was_cut

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
    default_metrics = ("f1", "precision", "recall")

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
        rows: dict[str, list],
        tokenizer: PreTrainedTokenizerBase,
        label_numbers: dict[str, int] | None,
        max_length: int,
    ) -> dict[str, list]:
        count = len(rows["words"])
        encoding = tokenizer(
            rows["words"], is_split_into_words=True, truncation=True, max_length=max_length
        )
        return dict(encoding) | {
            **align(encoding, rows.get("tags"), label_numbers, count),
            "was_cut": was_cut(encoding, count),
        }

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        return DataCollatorForTokenClassification(tokenizer, label_pad_token_id=_IGNORED)

    def predictions(self, outputs: Any, batch: dict[str, Tensor]) -> list[list[int]]:
        best = outputs.logits.argmax(-1)
        kept = batch["labels"] != _IGNORED
        return [row[first].tolist() for row, first in zip(best, kept, strict=True)]

    def results(self, predicted: list, features: Features, labels: list[str]) -> list[list[str]]:
        """One tag a word; words that were cut off, or of which the tokenizer makes nothing, are
        in no chunk."""
        outside = "O" if "O" in labels else labels[0]
        words = features.examples.table["words"]
        results = [[outside] * len(words[index]) for index in range(len(words))]
        for numbers, places, example in zip(
            predicted, features.table["word_indices"], features.table["example"], strict=True
        ):
            for word, number in zip(places, numbers, strict=True):
                results[example][word] = labels[number]
        return results

    def metrics(self, results: list, examples: Examples, labels: list[str]) -> dict[str, float]:
        """Of whole chunks by seqeval for labels B-X and I-X; macro F1 of words for others."""
        true = examples.table["tags"][:]
        scores = {"accuracy": accuracy_score(true, results)}
        if _are_chunks(labels):
            for score in (precision_score, recall_score, f1_score):
                name = score.__name__.removesuffix("_score")
                scores[name] = score(true, results, zero_division=0)
        else:
            words = (list(itertools.chain.from_iterable(rows)) for rows in (true, results))
            scores["f1"] = word_f1_score(*words, average="macro", labels=labels, zero_division=0)
        return {name: float(score) for name, score in scores.items()}

    def describe(self, example: dict, result: list[str]) -> dict[str, Any]:
        words = example["words"]
        described: dict[str, Any] = {"words": words, "tags": result}
        if _are_chunks(result):
            described["entities"] = [
                {
                    "type": kind,
                    "text": " ".join(words[first : last + 1]),
                    "first": first,
                    "last": last,
                }
                for kind, first, last in get_entities(result)
            ]
        return described


def align(
    encoding: Any, tags: list[list[str]] | None, label_numbers: dict[str, int] | None, count: int
) -> dict[str, list]:
    """Label numbers at the first sub-word of each word, and which words those are.

    Without labels a zero marks the place to read the prediction from.

    Args:
        encoding: of a fast tokenizer, of text split into words.
        tags: one list a sentence.
        count: of sentences.

    Returns:
        {"labels": numbers per token, -100 elsewhere; "word_indices": the words left in it}.
    """
    labels, word_indices = [], []
    for index in range(count):
        first_of_word = _first_sub_words(encoding.word_ids(index))
        numbers = [_IGNORED] * len(encoding.word_ids(index))
        for position, word in first_of_word:
            if label_numbers is None or tags is None:
                numbers[position] = 0
            else:
                numbers[position] = label_numbers[tags[index][word]]
        labels.append(numbers)
        word_indices.append([word for _, word in first_of_word])
    return {"labels": labels, "word_indices": word_indices}


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
