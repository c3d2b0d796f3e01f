"""One label for each word of a sentence (named entities, parts of speech, chunks)."""

import dataclasses
import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from datasets import Dataset
from seqeval.metrics import accuracy_score
from sklearn.metrics import f1_score as word_f1_score
from torch import Tensor
from transformers import DataCollatorForTokenClassification, PreTrainedTokenizerBase

from ptv2_fast.tasks.alignment import IGNORED, align
from ptv2_fast.tasks.chunks import (
    Scheme,
    begun_inside,
    chunk_class_scores,
    chunk_scores,
    find_scheme,
    odd_labels,
    spans,
)
from ptv2_fast.tasks.comparison import ClassScores
from ptv2_fast.tasks.conll import holds_columns, read_conll
from ptv2_fast.tasks.decoding import (
    MOST_LABELS,
    affinities,
    count_transitions,
    decode,
    keeps_to,
    rules_of,
)
from ptv2_fast.tasks.examples import Examples
from ptv2_fast.tasks.features import Collator, Features, TaskTokenizer
from ptv2_fast.tasks.memory_table import MemoryTable
from ptv2_fast.tasks.sources import TYPED, Source
from ptv2_fast.tasks.tables import check_not_empty, keep_columns, read_table
from ptv2_fast.tasks.task import LISTED, Result, Task
from ptv2_fast.tasks.typed_words import typed_words, word_offsets
from ptv2_fast.tasks.word_tables import (
    as_lists,
    check_label_separators,
    find_sentence_column,
    group_words,
    is_one_word,
)

_BEGIN_INSIDE = "chunks that begin with I-, as in IOB1 (labels kept as they are, chunks scored)"


class TokenClassification(Task):
    """Columns: words, tags; both are lists of text.

    The first sub-word of a word carries its label, the others and special tokens none. Labels are
    taken as they are: a chunk that begins with I- is a remark, not an error, and counts as
    conlleval counts it.
    """

    name = "token-classification"
    columns: ClassVar[dict[str, str]] = {"words": "tokens", "tags": "ner_tags"}  # in tables
    model_class = "AutoModelForTokenClassification"
    default_metrics: ClassVar[tuple[str, ...]] = ("f1", "precision", "recall")
    affinity: Tensor | None = None  # of labels, as `affinities` gives it

    def read(self, source: Source, labelled: bool = True) -> Examples:
        if source.format == "other" or self._holds_columns(source):
            columns, remarks = self.read_lines(source, labelled)
            unit = "sentence"
        else:
            columns, remarks = self._read_table(source, labelled)
            unit = "sentence" if remarks else "row"
        examples = Examples(source, Dataset.from_dict(columns), unit)
        self.check(columns, examples)
        tags = columns.get("tags", [])
        scheme = self.scheme({tag for row in tags for tag in row})
        count = begun_inside(scheme, tags) if scheme else 0
        remarks |= {_BEGIN_INSIDE: count} if count else {}
        return dataclasses.replace(examples, remarks=remarks)

    def has_example_rows(self, part: Source) -> bool:
        """Not those of a table with one word in each."""
        table, words = read_table(part), self._column_name("words")
        if self.options.sentence_column or words not in table.column_names:
            return False
        return not all(map(is_one_word, table[words][:])) and super().has_example_rows(part)

    def _holds_columns(self, source: Source) -> bool:
        """Whether a .tsv file is one of CoNLL columns."""
        if source.format != "tsv" or "predicate" in self.columns:
            return False
        given = (self.options.conll_word_column, self.options.conll_tag_column)
        return given != (None, None) or holds_columns(source, self._column_name("words"))

    def _column_name(self, column: str) -> str:
        return getattr(self.options, f"{column}_column") or self.columns[column]

    def read_lines(self, source: Source, labelled: bool) -> tuple[dict[str, list], dict[str, Any]]:
        """The columns of a text file that is no table, and remarks on it.

        Raises:
            ValueError: naming the line that cannot be read.
        """
        word_column, tag_column = self.options.conll_word_column, self.options.conll_tag_column
        tag_column = -1 if tag_column is None else tag_column
        return read_conll(
            source, word_column or 0, tag_column if labelled else None,
            self.options.conll_comments, tuple(map(self._column_name, self.columns)),
        )  # fmt: skip

    def _read_table(self, source: Source, labelled: bool) -> tuple[dict[str, list], dict[str, Any]]:
        """The columns of a table, and remarks on it.

        Raises:
            ValueError: for a missing column, or cells that are neither lists nor text of words.
        """
        names = {
            column: self._column_name(column)
            for column in self.columns
            if labelled or column != "tags"
        }
        table = read_table(source)
        kept = keep_columns(table, source, names)
        columns = {column: kept[column][:] for column in kept.column_names}
        where = Examples(source, kept).where
        sentence = self.options.sentence_column or find_sentence_column(table.column_names)
        words = {column: columns[column] for column in ("words", "tags") if column in columns}
        # One label a row is enough: a word may have blanks.
        one_word = len(kept) > 1 and all(map(is_one_word, columns.get("tags", columns["words"])))
        # The rows of a part are sentences, as `has_example_rows` found of the first.
        one_word = one_word and (source.part is None or source.part.is_whole)
        if self.options.sentence_column or one_word:
            if sentence is None or "predicate" in columns:
                raise ValueError(
                    f"{source.name}: expected lists or words with blanks between, got one in each "
                    f"of {len(kept)} rows; name the column that tells the sentences apart "
                    f"(sentence_column; there are {table.column_names}), or write lists"
                )
            numbers = keep_columns(table, source, {"sentence": sentence})["sentence"][:]
            remark = {f"one word a row, gathered by the column {sentence!r}": len(kept)}
            return group_words(words, numbers, where), remark
        check_label_separators(columns.get("tags", []), where)
        for column, cells in words.items():
            columns[column] = as_lists(cells, where)
        if "tags" in columns:
            columns["tags"] = [_as_text(cell) for cell in columns["tags"]]
        return columns, {}

    def check(self, columns: dict[str, list], examples: Examples) -> None:
        """Check the columns that `read` made.

        Raises:
            ValueError: naming the example that is malformed.
        """
        for index, words in enumerate(columns["words"]):
            tags = columns["tags"][index] if "tags" in columns else words
            if not words or not _is_list_of_text(words):
                raise examples.error(index, "a list of words", words)
            if not _is_list_of_text(tags) or len(tags) != len(words):
                raise examples.error(index, f"one label for each of {len(words)} words", tags)

    def from_texts(self, texts: Sequence[str], source: Source = TYPED) -> Examples:
        """Words are cut at blanks and around punctuation."""
        check_not_empty(source, len(texts))
        words, offsets = typed_words(texts, source.number)
        table = MemoryTable({"words": words, "offsets": offsets})
        return Examples(source, table, unit="text")

    def labels_of(self, examples: Examples) -> Iterator[tuple[int, Any]]:
        for index, tags in enumerate(examples.table["tags"][:]):
            for tag in dict.fromkeys(tags):
                yield index, tag

    def find_labels(self, examples: Examples) -> list[str]:
        """Also those of the published data set, which training examples may lack.

        Raises:
            ValueError: as for other tasks, and for odd labels among those of chunks.
        """
        published = self.benchmark.labels if self.benchmark else ()
        found = super().find_labels(examples)
        if self.options.tag_scheme == "auto" and (odd := odd_labels(found)):
            self._refuse(*odd, examples)
        return sorted({*found, *published}) if published else found

    def count_labels(self, examples: Examples) -> Counter[str]:
        """How many words have each label."""
        return Counter(tag for row in examples.table["tags"][:] for tag in row)

    def _refuse(self, scheme: Scheme, odd: list[str], examples: Examples) -> None:
        """Raise a ValueError that names labels which do not fit the scheme of the others."""
        counts = self.count_labels(examples)
        first = next(index for index, tag in self.labels_of(examples) if str(tag) in odd)
        named = ", ".join(f"{label!r} ({counts[label]} words)" for label in odd[:LISTED])
        raise ValueError(
            f"{examples.where(first)}: expected labels {scheme.name} and {scheme.outside}, as most "
            f"are ({_few(counts, odd)}), got {named}; correct them, or score words with "
            "tag_scheme='words'"
        )

    def scheme(self, labels: Iterable[str]) -> Scheme | None:
        """How labels of chunks are spelt; None where words are scored."""
        return find_scheme(labels) if self.options.tag_scheme == "auto" else None

    def tokenize(self, rows: dict[str, list], tokenizer: TaskTokenizer) -> dict[str, list]:
        encoding, was_cut = tokenizer(rows["words"], is_split_into_words=True)
        aligned = align(encoding, rows.get("tags"), tokenizer.label_numbers, len(was_cut))
        return dict(encoding) | aligned | {"was_cut": was_cut}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        return DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)

    def learn(self, train: Examples, labels: list[str]) -> None:
        """How often labels follow each other, where they are decoded as sequences."""
        scheme, decoding = self.scheme(labels), self.options.decoding
        if scheme is None and decoding == "viterbi":
            warnings.warn(f"decoding: no effect, labels of words have no order: {labels[:LISTED]}",
                          stacklevel=2)  # fmt: skip
        if scheme is None or decoding == "argmax":
            return
        tags = train.table["tags"][:]
        is_worth_it = len(labels) <= MOST_LABELS and keeps_to(scheme, labels, tags)
        if decoding == "viterbi" or is_worth_it:
            self.remember({"labels": labels, "transitions": count_transitions(tags)})

    def remember(self, found: dict[str, Any]) -> None:
        if "transitions" in found:
            self.affinity = affinities(found["labels"], found["transitions"])
            self.learnt = {"transitions": found["transitions"]}

    def predictions(
        self, outputs: Any, batch: dict[str, Tensor], labels: Sequence[str]
    ) -> list[list[tuple[int, float]]]:
        """The numbers of the words' labels, and their probabilities.

        Without the option decoding they are sequences where there is something to remember: runs
        of earlier versions took each word's best.
        """
        kept = batch["labels"] != IGNORED
        words, lengths = outputs.logits[kept].float().cpu(), kept.sum(1).cpu()  # [N, L], [B]
        chosen = self.options.decoding or ("argmax" if self.affinity is None else "viterbi")
        scheme = self.scheme(labels) if chosen == "viterbi" else None
        if scheme is None:
            best = words.argmax(-1)
        else:
            best = decode(words, lengths, rules_of(scheme, tuple(labels)), self.affinity)
        own = words.softmax(-1).gather(1, best[:, None])[:, 0]
        pairs = iter(zip(best.tolist(), own.tolist(), strict=True))
        return [[*itertools.islice(pairs, length)] for length in lengths.tolist()]

    def results(self, predicted: list, features: Features, labels: list[str]) -> list[Result]:
        """A tag and its probability for each word; words that were cut off, or of which the
        tokenizer makes nothing, are in no chunk and have None."""
        scheme = self.scheme(labels)
        outside = "O" if scheme is None else scheme.outside
        outside = outside if outside in labels else labels[0]
        results: list[dict[str, Any]] = [
            {"tags": [outside] * len(words), "scores": [None] * len(words)}
            for words in features.examples.table["words"][:]
        ]
        rows = (predicted, features.table["word_indices"][:], features.table["example"][:])
        for pairs, places, example in zip(*rows, strict=True):
            for word, (number, score) in zip(places, pairs, strict=True):
                results[example]["tags"][word] = labels[number]
                results[example]["scores"][word] = score
        return results

    def metrics(self, results: list, examples: Examples, labels: list[str]) -> dict[str, float]:
        """Of whole chunks by seqeval where all labels are of chunks; else macro F1 of words."""
        true, given = self.expected(examples), [result["tags"] for result in results]
        scores = {"accuracy": accuracy_score(true, given)}
        scheme = self.scheme(labels)
        if scheme is not None:
            return scores | chunk_scores(scheme, true, given)
        words = (list(itertools.chain.from_iterable(rows)) for rows in (true, given))
        f1 = word_f1_score(*words, average="macro", zero_division=0)
        return {name: float(score) for name, score in (scores | {"f1": f1}).items()}

    def expected(self, examples: Examples) -> list[list[str]]:
        return examples.table["tags"][:]

    def answers(self, results: list) -> list[str]:
        return [tag for result in results for tag in result["tags"]]

    def constant_results(self, examples: Examples, labels: list[str]) -> dict[str, list[Any]]:
        """The most frequent label of words alone: of a chunk's no chunk can be made."""
        ((answer, _),) = self.count_labels(examples).most_common(1)
        lengths = map(len, examples.table["words"][:])
        return {answer: [{"tags": [answer] * length} for length in lengths]}

    def classes(self, results: list, examples: Examples, labels: list[str]) -> ClassScores:
        """Of types of chunks, or of labels of words."""
        scheme = self.scheme(labels)
        if scheme is not None:
            given = [result["tags"] for result in results]
            return chunk_class_scores(scheme, self.expected(examples), given)
        return super().classes(results, examples, labels)

    def label_pairs(self, results: list, examples: Examples) -> tuple[list[str], list[str]]:
        """Of the words."""
        return [*itertools.chain.from_iterable(self.expected(examples))], self.answers(results)

    def error_sizes(self, results: list, examples: Examples) -> list[float]:
        """How many words have another label."""
        pairs = zip(self.expected(examples), results, strict=True)
        return [float(sum(map(str.__ne__, true, result["tags"]))) for true, result in pairs]

    def error_texts(self, example: dict, expected: list[str], result: Any) -> tuple[str, str, str]:
        """The sentence, and the labels of the words that have another one."""
        words = list(zip(example["words"], expected, result["tags"], strict=True))
        right = ", ".join(f"{word} {true}" for word, true, given in words if true != given)
        said = ", ".join(f"{word} {given}" for word, true, given in words if true != given)
        return " ".join(example["words"]), right, said

    def titles(self, labels: list[str]) -> dict[str, str]:
        scheme = self.scheme(labels)
        if scheme is None:
            return {"f1": "macro F1 of single words, the mean over labels that occur"}
        how = f"of whole chunks (labels {scheme.name}), micro-averaged, as seqeval and conlleval"
        return {name: f"{name} {how}" for name in ("f1", "precision", "recall")}

    def describe(self, example: dict, result: Result, labels: Sequence[str] = ()) -> Result:
        """Words with their tags, probabilities and places, and the chunks that they make.

        Places are characters in the typed text; of a file that holds words, in these with a blank
        between each two. The score of a chunk is the mean of those of its words.
        """
        offsets = example.get("offsets") or word_offsets(example["words"])
        described = {"words": example["words"], **result, "offsets": offsets}
        scheme = self.scheme(labels or result["tags"])
        if scheme is not None:
            described["entities"] = spans(scheme, described, "type")
        return described


def _is_list_of_text(cell: Any) -> bool:
    return isinstance(cell, list) and {str}.issuperset(map(type, cell))


def _as_text(tags: Any) -> Any:
    """Labels that are numbers as text."""
    if not isinstance(tags, list):
        return tags
    return [str(tag) if isinstance(tag, int) else tag for tag in tags]


def _few(counts: Counter, odd: list[str]) -> str:
    """Some of the labels that are not odd, the frequent ones first."""
    fitting = [label for label, _ in counts.most_common() if label not in odd]
    return ", ".join(fitting[:4]) + (", …" if len(fitting) > 4 else "")
