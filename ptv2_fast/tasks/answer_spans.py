"""The best answers of a context from the start and end logits of its windows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import softmax


@dataclass(frozen=True)
class Window:
    """The part of a context that one row of a model's input holds.

    Attributes:
        logits: start and end logits of the row's tokens, the first of which means "no answer",
            [2, T].
        first: number of the first token of the context.
        starts: where each token of the context starts in its text, in characters, [C].
        ends: where it ends, [C].
    """

    logits: np.ndarray
    first: int
    starts: np.ndarray
    ends: np.ndarray


def best_spans(
    logits: np.ndarray, n_best: int, max_answer_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The spans of one window with the largest sums of a start and an end logit.

    As in the question answering example of transformers, the `n_best` best starts and ends are
    combined; a span ends where it starts or later and has at most `max_answer_length` tokens.

    Args:
        logits: of the context's tokens alone, [2, C].

    Returns:
        First tokens, last tokens and scores, at most n_best of each, best first.
    """
    starts, ends = (_largest(row, n_best) for row in logits)
    lengths = ends[None, :] - starts[:, None] + 1  # [starts, ends]
    first, last = np.nonzero((lengths >= 1) & (lengths <= max_answer_length))
    first, last = starts[first], ends[last]
    scores = logits[0, first] + logits[1, last]
    # Equal scores go by their place, so that the order never depends on the sort.
    order = np.lexsort((last, first, -scores))[:n_best]
    return first[order], last[order], scores[order]


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` largest values are, in any order."""
    if len(values) <= count:
        return np.arange(len(values))
    return np.argpartition(values, len(values) - count)[-count:]


def find_answers(
    windows: Sequence[Window], context: str, n_best: int, max_answer_length: int
) -> dict[str, Any]:
    """The best answers over all windows of a context.

    A span that several windows hold counts once, with its best score. Blanks around an answer,
    which belong to the token in some tokenizers, are left off.

    Returns:
        {"text", "score"} of the best, "" and None when there is no span at all; "null_score", the
        smallest of the windows' scores of their first token; "n_best": {"text", "score"} of the
        best ones, best first.
    """
    found: dict[tuple[int, int], float] = {}
    for window in windows:
        first = window.first
        inside = window.logits[:, first : first + len(window.starts)]
        spans = best_spans(inside, n_best, max_answer_length)
        starts, ends = window.starts[spans[0]], window.ends[spans[1]]
        for start, end, score in zip(
            starts.tolist(), ends.tolist(), spans[2].tolist(), strict=True
        ):
            # Some tokenizers make tokens of blanks, which may lose them; they are no answer.
            if context[start:end].strip():
                found[start, end] = max(score, found.get((start, end), score))
    best = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:n_best]
    answers = [{"text": context[start:end].strip(), "score": score} for (start, end), score in best]
    return {
        **(answers[0] if answers else {"text": "", "score": None}),
        "null_score": min(float(window.logits[:, 0].sum()) for window in windows),
        "n_best": answers,
    }


def allow_no_answer(found: dict[str, Any], n_best: int, threshold: float) -> dict[str, Any]:
    """Answers among which "" stands for none, with its own score.

    It is chosen when its score is more than `threshold` above the best answer's.

    Args:
        found: of `find_answers`.
    """
    null, best = found["null_score"], found["score"]
    answers = sorted(
        [*found["n_best"], {"text": "", "score": null}], key=lambda answer: -answer["score"]
    )
    chosen = found["text"] if best is not None and null - best <= threshold else ""
    return {**found, "text": chosen, "n_best": answers[:n_best]}


def with_probabilities(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers with a "probability" each: the softmax of their scores."""
    if not answers:
        return []
    shares = softmax([answer["score"] for answer in answers]).tolist()
    return [answer | {"probability": share} for answer, share in zip(answers, shares, strict=True)]
