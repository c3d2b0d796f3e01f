"""What the task families share: examples with labels in, features for a model out, scores back."""

import difflib
import itertools
import math
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from ptv2_fast.tasks import text_metrics
from ptv2_fast.tasks.benchmarks import Benchmark
from ptv2_fast.tasks.comparison import ClassScores, class_scores
from ptv2_fast.tasks.examples import Examples
from ptv2_fast.tasks.features import Collator, Features, TaskTokenizer, tokenize_examples
from ptv2_fast.tasks.options import DataOptions
from ptv2_fast.tasks.sources import TYPED, Source
from ptv2_fast.tasks.table_parts import joined, table_parts
from ptv2_fast.tasks.tables import check_not_empty, read_table

# Of an example in the terms of its task; also as it is printed, JSON-ready.
Result = dict[str, Any]

LISTED = 20  # how many examples a remark names; it counts all
_SHOWN = 80  # characters of a label in a message
_ALIKE = "labels that differ in blanks, case or Unicode's form alone (taken as several)"
_INTEGER = re.compile(r"-?\d+")


class Task(ABC):
    """One task family, bound to the columns that the options name.

    What is not abstract is as of a family whose examples have one label each, `label`, and whose
    results are {"label", "logits"}.

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
    has_classes: ClassVar[bool] = True  # labels of which each has scores of its own
    part_rows: ClassVar[int] = 1000  # of a table that is read in parts

    def __init__(self, options: DataOptions) -> None:
        self.options = options
        self.learnt: dict[str, Any] = {}

    @property
    def benchmark(self) -> Benchmark | None:
        """The published data set, None for a user's own."""
        return self.options.benchmark

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics that are asked for."""
        return self.benchmark.metrics if self.benchmark else self.default_metrics

    @property
    def metric(self) -> str:
        """The one that selects the best checkpoint, larger is better."""
        return self.metric_names[0]

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
        csv_options = self.benchmark.csv_options if self.benchmark else {}
        parts = table_parts(source, csv_options, self.part_rows)
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

    def labels_of(self, examples: Examples) -> Iterator[tuple[int, Any]]:
        """Every label as (index of its example, label)."""
        return enumerate(examples.table["label"][:])

    @abstractmethod
    def tokenize(self, rows: dict[str, list], tokenizer: TaskTokenizer) -> dict[str, list]:
        """The columns a model takes; without numbers of labels, placeholders where they go.

        Args:
            rows: columns of some examples.

        Returns:
            The columns, `was_cut` (bool), and, when an example has several rows, `example`: the
            index of its example in `rows`.
        """

    def label_column(
        self, rows: dict[str, list], label_numbers: dict[str, int] | None
    ) -> list[int] | list[float]:
        """The labels of examples as a model takes them; without numbers, placeholders."""
        if label_numbers is None:
            return [0] * len(rows["text"])
        return [label_numbers[str(label)] for label in rows["label"]]

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """Makes a batch of tensors, padded to the longest example in it."""
        return DataCollatorWithPadding(tokenizer)

    def predictions(
        self, outputs: Any, batch: dict[str, Tensor], labels: Sequence[str]
    ) -> list[Any]:
        """What is kept of the model's outputs on a batch, one per row; here the logits."""
        return outputs.logits.float().tolist()

    @abstractmethod
    def results(self, predicted: list, features: Features, labels: list[str]) -> list[Result]:
        """The predictions in the task's own terms, one per example, from those of the rows."""

    def metrics(self, results: list, examples: Examples, labels: list[str]) -> dict[str, float]:
        """Scores of results against the examples' labels; F1 and the like in 0..1."""
        names, data_set = self.metric_names, self.options.task
        return text_metrics.scores(names, data_set, results, examples.table, labels)

    def titles(self, labels: list[str]) -> dict[str, str]:
        """What the names of the task's metrics mean, for labels of a run."""
        return text_metrics.titles(self.metric_names, self.options.task)

    def expected(self, examples: Examples) -> list[Any]:
        """What is right for each example, in the form in which results are printed."""
        return [str(label) for label in examples.table["label"][:]]

    def answers(self, results: list) -> list[str]:
        """The labels that results give, one behind the other."""
        return [result["label"] for result in results]

    def constant_results(self, examples: Examples, labels: list[str]) -> dict[str, list[Any]]:
        """By answer, the results that always give it, for the most frequent two."""
        return {
            answer: [{"label": answer, "logits": [float(label == answer) for label in labels]}]
            * len(examples)
            for answer, _ in self.count_labels(examples).most_common(2)
        }

    def label_pairs(self, results: list, examples: Examples) -> tuple[list[str], list[str]]:
        """The right labels and those that are given, one behind the other."""
        return self.expected(examples), self.answers(results)

    def classes(self, results: list, examples: Examples, labels: list[str]) -> ClassScores:
        """Precision, recall, F1 and support (how often it is right) of each class, if any."""
        if not self.has_classes:
            return {}
        return class_scores(*self.label_pairs(results, examples), labels)

    def error_sizes(self, results: list, examples: Examples) -> list[float]:
        """How wrong each result is: 0 = right; here by how sure of the wrong label it is."""
        right = map(str.__eq__, self.expected(examples), self.answers(results))
        return [
            0.0 if is_right else confidence(result["logits"])
            for is_right, result in zip(right, results, strict=True)
        ]

    def error_texts(self, example: dict, expected: Any, result: Result) -> tuple[str, str, str]:
        """An example for a reader: its text, what is right, what the result says."""
        texts = (example.get(name) for name in ("text", "text_pair"))
        return " | ".join(text for text in texts if text), expected, result["label"]

    @abstractmethod
    def describe(self, example: dict, result: Result, labels: Sequence[str] = ()) -> Result:
        """One result as it is printed.

        Args:
            example: the columns of its example.
            labels: those of the run.
        """

    def adapt_model(  # noqa: B027 - most have nothing to do
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
        found = {text for _, text in self._label_texts(examples)}
        if len(found) < 2:
            raise ValueError(
                f"{examples.source.name}: expected at least two labels, got {sorted(found)}"
            )
        numeric = all(_INTEGER.fullmatch(label) for label in found)
        return sorted(sorted(found), key=int if numeric else None)  # "1" and "01" are two labels

    def count_labels(self, examples: Examples) -> Counter[str]:
        """How often each label occurs."""
        return Counter(str(label) for _, label in self.labels_of(examples))

    def learn(self, train: Examples, labels: list[str]) -> None:  # noqa: B027 - as above
        """Set `learnt` by the training labels."""

    def remember(self, found: dict[str, Any]) -> None:  # noqa: B027 - as above
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
        for index, text in self._label_texts(examples):
            if text not in known:
                raise ValueError(
                    f"{examples.where(index)}: unknown label {_short(text)}; known are "
                    f"{_some(text, labels)}"
                )

    def _label_texts(self, examples: Examples) -> Iterator[tuple[int, str]]:
        """Every label as (index of its example, the text that names it)."""
        for index, label in self.labels_of(examples):
            if not isinstance(label, int | str) or label == "":
                raise examples.error(index, "a label (text or an integer)", label)
            yield index, str(label)

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
        settings = TaskTokenizer(tokenizer, max_length, numbers)
        table = tokenize_examples(self, examples, settings)
        pairs = zip(table["example"][:], table["was_cut"][:], strict=True)
        cut = {index for index, flag in pairs if flag}
        if cut and self.options.long_input == "error":
            raise ValueError(
                f"{examples.where(min(cut))}: expected at most {max_length} tokens, got "
                "more (long_input='truncate' would cut it)"
            )
        return Features(table.remove_columns("was_cut"), examples, len(cut))


def confidence(logits: Sequence[float]) -> float:
    """The probability of the largest logit."""
    best = max(logits)
    return 1 / math.fsum(math.exp(logit - best) for logit in logits)


def label_remarks(labels: Iterable[str]) -> dict[str, Any]:
    """Labels that differ in blanks, in case or in how Unicode writes them alone: perhaps one."""
    alike: dict[str, set[str]] = defaultdict(set)
    for label in labels:
        alike["".join(unicodedata.normalize("NFKC", label).casefold().split())].add(label)
    found = [sorted(group) for group in alike.values() if len(group) > 1]
    return {_ALIKE: sorted(found)[:LISTED]} if found else {}


def _short(label: str) -> str:
    text = repr(label)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _some(label: str, labels: list[str]) -> str:
    """Up to five known labels, those that look like the unknown one first."""
    alike = difflib.get_close_matches(label[:_SHOWN], labels, n=5)
    few = [*alike, *(other for other in labels if other not in alike)][:5]
    rest = len(labels) - len(few)
    return ", ".join(map(_short, few)) + (f" and {rest} others" if rest else "")
