"""The part of a context that answers a question about it (SQuAD 1.1 and 2.0)."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptv2_fast.tasks.answer_metrics import exact_match, normalize_answer, token_f1
from ptv2_fast.tasks.answer_spans import (
    Window,
    allow_no_answer,
    find_answers,
    with_probabilities,
)
from ptv2_fast.tasks.examples import Examples
from ptv2_fast.tasks.features import Features, TaskTokenizer
from ptv2_fast.tasks.memory_table import MemoryTable
from ptv2_fast.tasks.question_files import read_questions, trainable
from ptv2_fast.tasks.sources import TYPED, Source
from ptv2_fast.tasks.tables import check_not_empty, read_table
from ptv2_fast.tasks.task import Result, Task

_LABELS = ["start", "end"]  # the two columns of the head
_NONE = "no answer"
_NO_ANSWER = 0  # the first token, [CLS] or <s>
_PRINTED = 5  # of the n best answers


class QuestionAnswering(Task):
    """Columns: id, question, context, answers, answer_starts.

    A context that is too long for one row is cut into windows that overlap by doc_stride tokens. A
    row whose window does not hold the whole answer points to the first token.

    A result is {"id", "text", "score", "null_score", "n_best"}; text is "" for no answer.
    """

    name = "question-answering"
    model_class = "AutoModelForQuestionAnswering"
    label_columns = ("start_positions", "end_positions")
    default_metrics = ("f1", "em")
    has_classes = False

    def read(self, source: Source, labelled: bool = True) -> Examples:
        return read_questions(source, labelled, self.options.unanswerable)

    def trainable(self, examples: Examples) -> Examples:
        return trainable(examples)

    def has_example_rows(self, part: Source) -> bool:
        """Not those of the official files, which are one object."""
        return "question" in read_table(part).column_names and super().has_example_rows(part)

    @property
    def text_names(self) -> tuple[str, ...]:
        return ("question", "context")

    def from_texts(self, texts: Sequence[str], source: Source = TYPED) -> Examples:
        """Each text is a question and its context with a tab between."""
        check_not_empty(source, len(texts))
        numbers = [str(source.number(index)) for index in range(len(texts))]
        questions, contexts = zip(*(text.partition("\t")[::2] for text in texts), strict=True)
        table = MemoryTable({"id": numbers, "question": questions, "context": contexts})
        examples = Examples(source, table, unit="text")
        for index, pair in enumerate(zip(questions, contexts, strict=True)):
            if not all(map(str.strip, pair)):
                expected = "a question and its context with a tab between"
                raise examples.error(index, expected, texts[index])
        return examples

    def labels_of(self, examples: Examples) -> Iterator[tuple[int, Any]]:
        return iter(())

    def count_labels(self, examples: Examples) -> Counter[str]:
        """How many questions have an answer, and none."""
        return Counter("answer" if row else _NONE for row in examples.table["answers"][:])

    def find_labels(self, examples: Examples) -> list[str]:
        return list(_LABELS)

    def tokenize(self, rows: dict[str, list], tokenizer: TaskTokenizer) -> dict[str, list]:
        """Several rows an example; beside them, where each row's context tokens are in the text."""
        questions, was_cut = self._questions(rows["question"], tokenizer)
        encoding, _ = tokenizer(
            questions,
            rows["context"],
            truncation="only_second",
            stride=self.options.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        columns = dict(encoding)
        offsets = columns.pop("offset_mapping")
        examples = columns["example"] = columns.pop("overflow_to_sample_mapping")
        columns["was_cut"] = [was_cut[example] for example in examples]
        names = ("first_context_token", "character_starts", "character_ends", *self.label_columns)
        columns |= {name: [] for name in names}
        for row, example in enumerate(examples):
            first, starts, ends = _context_tokens(encoding.sequence_ids(row), offsets[row])
            start = end = _NO_ANSWER
            answer = None if tokenizer.label_numbers is None else _target(rows, example)
            if answer is not None:
                start, end = (first + token for token in _tokens_of(answer, starts, ends, -first))
            for name, value in zip(names, (first, starts, ends, start, end), strict=True):
                columns[name].append(value)
        return columns

    def _questions(
        self, questions: list[str], tokenizer: TaskTokenizer
    ) -> tuple[list[str], list[bool]]:
        """The questions without blanks in front, cut where no room for a window would remain.

        A window needs room for the doc_stride tokens of the one before and half as many new ones.
        """
        _check_tokenizer(tokenizer.tokenizer)
        stride, max_length = self.options.doc_stride, tokenizer.max_length
        special = tokenizer.tokenizer.num_special_tokens_to_add(pair=True)
        longest = max_length - special - stride - (stride + 1) // 2
        if longest < 1:
            raise ValueError(
                f"doc_stride: expected at most {(max_length - special - 1) * 2 // 3} with inputs "
                f"of {max_length} tokens, got {stride}"
            )
        stripped = [question.lstrip() for question in questions]
        cut = tokenizer.cut(stripped, longest, longest)
        return cut, [*map(str.__ne__, cut, stripped)]

    def predictions(
        self, outputs: Any, batch: dict[str, Tensor], labels: Sequence[str]
    ) -> list[np.ndarray]:
        """Start and end logits of each row's tokens without padding, [2, T] each."""
        logits = (outputs.start_logits, outputs.end_logits)
        both = np.stack([part.float().cpu().numpy() for part in logits], axis=1)  # [B, 2, T]
        lengths = batch["attention_mask"].sum(1).tolist()
        return [row[:, :length].copy() for row, length in zip(both, lengths, strict=True)]

    def results(self, predicted: list, features: Features, labels: list[str]) -> list[Result]:
        options, examples = self.options, features.examples.table
        windows: list[list[Window]] = [[] for _ in range(len(examples))]
        for example, window in zip(features.table["example"], _windows(predicted, features),
                                   strict=True):  # fmt: skip
            windows[example].append(window)
        results = []
        for row, own in zip(examples.select_columns(["id", "context"]), windows, strict=True):
            found = find_answers(own, row["context"], options.n_best, options.max_answer_length)
            if options.unanswerable:
                found = allow_no_answer(found, options.n_best, options.null_score_threshold)
            found["n_best"] = with_probabilities(found["n_best"])
            results.append({"id": row["id"], **found})
        return results

    def metrics(self, results: list, examples: Examples, labels: list[str]) -> dict[str, float]:
        """Exact match and word F1 of SQuAD's script; where questions may have no answer, also of
        those with and of those without one, as far as there are any."""
        published = self.expected(examples)
        pairs = zip(results, published, strict=True)
        matches = np.array([self._matches(result, answers) for result, answers in pairs])  # [N, 2]
        f1, em = matches.mean(0).tolist()
        scores = {"f1": f1, "em": em}
        has_answer = np.array([*map(bool, published)])
        if self.options.unanswerable and has_answer.any():
            f1, em = matches[has_answer].mean(0).tolist()
            scores |= {"has_answer_f1": f1, "has_answer_em": em}
        if self.options.unanswerable and not has_answer.all():
            scores["no_answer_accuracy"] = float(matches[~has_answer, 1].mean())
        return scores

    def _matches(self, result: dict[str, Any], answers: Sequence[str]) -> tuple[float, float]:
        """Word F1 and exact match of a result."""
        accepted = list(answers)
        if self.options.unanswerable:  # the script of SQuAD 2.0
            accepted = [answer for answer in answers if normalize_answer(answer)] or [""]
        return token_f1(result["text"], accepted), exact_match(result["text"], accepted)

    def expected(self, examples: Examples) -> list[list[str]]:
        return examples.table["answers"][:]

    def answers(self, results: list) -> list[str]:
        return [result["text"] or _NONE for result in results]

    def constant_results(self, examples: Examples, labels: list[str]) -> dict[str, list[Any]]:
        """No answer, where questions may have none."""
        return {_NONE: [{"text": ""}] * len(examples)} if self.options.unanswerable else {}

    def error_sizes(self, results: list, examples: Examples) -> list[float]:
        """Where the answer does not match exactly, by the words it shares with the right ones."""
        pairs = zip(results, self.expected(examples), strict=True)
        matches = (self._matches(result, answers) for result, answers in pairs)
        return [0.0 if exact else 2.0 - f1 for f1, exact in matches]

    def error_texts(self, example: dict, expected: list[str], result: Any) -> tuple[str, str, str]:
        answers = " / ".join(dict.fromkeys(expected)) or _NONE
        return example["question"], answers, result["text"] or _NONE

    def titles(self, labels: list[str]) -> dict[str, str]:
        script = "2.0" if self.options.unanswerable else "1.1"
        return {
            "f1": f"F1 of the words of answers as in SQuAD {script}, the mean over questions",
            "em": "the part of the questions whose answer is right, after normalisation",
        }

    def describe(self, example: dict, result: Result, labels: Sequence[str] = ()) -> Result:
        """The answer; `score` is the sum of the logits of its start and end, `null_score` that of
        no answer. `probability` in n_best compares the n best."""
        return {
            "id": result["id"],
            "question": example["question"],
            "answer": result["text"],
            "score": result["score"],
            "null_score": result["null_score"],
            "n_best": result["n_best"][:_PRINTED],
        }


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check what the windows rely on: a first token that can mean no answer, padding behind."""
    ids = tokenizer("", "")["input_ids"]
    if tokenizer.cls_token_id is None or ids[0] != tokenizer.cls_token_id:
        raise ValueError("model: expected a tokenizer that puts a [CLS] token in front")
    if tokenizer.padding_side != "right":
        raise ValueError(
            f"model: expected a tokenizer that pads on the right, got {tokenizer.padding_side!r}"
        )


def _context_tokens(
    sequence_ids: list[int | None], offsets: list[tuple[int, int]]
) -> tuple[int, list[int], list[int]]:
    """First token of the second text, and where its tokens start and end in it, in characters."""
    if 1 not in sequence_ids:
        return 0, [], []
    first = sequence_ids.index(1)
    inside = offsets[first : first + sequence_ids.count(1)]
    starts, ends = zip(*inside, strict=True)
    return first, list(starts), list(ends)


def _target(rows: dict[str, list], example: int) -> tuple[int, int] | None:
    """Characters of the first answer that occurs in the context, without blanks around it."""
    for text, start in zip(rows["answers"][example], rows["answer_starts"][example], strict=True):
        if start >= 0:
            begin = start + len(text) - len(text.lstrip())
            return begin, begin + len(text.strip())
    return None


def _tokens_of(
    answer: tuple[int, int], starts: list[int], ends: list[int], absent: int
) -> tuple[int, int]:
    """First and last token of the window that hold the answer; `absent` twice when it does not."""
    if not starts or starts[0] > answer[0] or ends[-1] < answer[1]:
        return absent, absent
    # One character may be several tokens: the first of those that start together, the last of
    # those that end together.
    first = np.searchsorted(starts, answer[0], "right") - 1
    last = np.searchsorted(ends, answer[1], "left")
    return (
        int(np.searchsorted(starts, starts[first], "left")),
        int(np.searchsorted(ends, ends[last], "right")) - 1,
    )


def _windows(predicted: list[np.ndarray], features: Features) -> Iterator[Window]:
    # Straight from Arrow's memory: lists of Python integers would take most of the time.
    table = features.table.with_format("arrow")[:]
    columns = [table[name].combine_chunks() for name in ("character_starts", "character_ends")]
    starts, ends = (column.flatten().to_numpy() for column in columns)
    counts = columns[0].value_lengths().to_numpy()
    stops = itertools.accumulate(counts.tolist())
    for logits, first, count, stop in zip(
        predicted, table["first_context_token"].to_pylist(), counts, stops, strict=True
    ):
        inside = slice(stop - count, stop)
        yield Window(logits, first, starts[inside], ends[inside])
