"""Labels of chunks in the schemes that are in use, and the scores of whole chunks."""

import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support

from ptv2_fast.tasks.comparison import ClassScores, by_class

# The parts of a chunk by the letters of IOB, BIOES, BMES, BILOU and BMEWO, as seqeval calls them.
_PARTS = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S", "W": "S"}
_LETTERS = "".join(_PARTS)


@dataclass(frozen=True)
class Scheme:
    """How labels are spelt.

    Attributes:
        name: B-X, B_X, X-B, X_B or B, in lower case where labels are.
        outside: the label of words in no chunk.
    """

    name: str
    pattern: re.Pattern[str]
    outside: str

    def fits(self, label: str) -> bool:
        """Whether a label is one of the scheme."""
        return label == self.outside or self.pattern.fullmatch(label) is not None

    def begins(self, label: str) -> bool:
        """Whether a chunk of several words begins with the label."""
        return self.as_seqeval(label)[0] == "B"

    def as_seqeval(self, label: str) -> str:
        """The label as seqeval spells it: O, B-X or, without types, B.

        Args:
            label: one that fits.
        """
        match = self.pattern.fullmatch(label)
        if label == self.outside or match is None:
            return "O"
        part, kind = _PARTS[match["part"].upper()], match["kind"]
        return f"{part}-{kind}" if kind else part


def _scheme(name: str) -> Scheme:
    lower = name.islower()
    letters = f"(?P<part>[{_LETTERS.lower() if lower else _LETTERS}])"
    kind = "(?P<kind>.+)" if len(name) > 1 else "(?P<kind>)"
    pattern = "".join({"b": letters, "x": kind}.get(part, part) for part in name.lower())
    pattern += kind if len(name) == 1 else ""
    return Scheme(name, re.compile(pattern), "o" if lower else "O")


IOB = _scheme("B-X")
_BARE = _scheme("B")
_SCHEMES = (IOB, _scheme("B_X"), _scheme("X-B"), _scheme("X_B"), _BARE,
            *map(_scheme, ("b-x", "b_x", "x-b", "x_b", "b")))  # fmt: skip


def find_scheme(labels: Iterable[str]) -> Scheme | None:
    """The scheme that all labels fit; None for labels of words.

    Labels that only end in a letter of a part, or are one, make chunks when one begins them.
    """
    found = set(labels)
    for scheme in _SCHEMES:
        if all(map(scheme.fits, found)) and _is_meant(scheme, found):
            return scheme
    return None


def odd_labels(labels: Iterable[str]) -> tuple[Scheme, list[str]] | None:
    """The scheme that most labels fit, and those that do not; None where there is no such thing.

    Half of the labels are enough when a chunk begins with one of them.
    """
    found = set(labels)
    scheme = max(_SCHEMES, key=lambda one: sum(map(one.fits, found)))
    fitting = {label for label in found if scheme.fits(label)}
    parts = {scheme.as_seqeval(label)[0] for label in fitting}
    most = 2 * len(fitting) >= len(found) + ("B" not in parts)
    if not most or len(fitting) == len(found) or not parts & {"B", "I"}:
        return None
    return (scheme, sorted(found - fitting)) if _is_meant(scheme, fitting) else None


def _is_meant(scheme: Scheme, labels: set[str]) -> bool:
    """Whether labels that fit are more than words that look so."""
    inside = labels - {scheme.outside}
    if scheme is IOB:
        return bool(inside) or labels == {scheme.outside}
    return any(map(scheme.begins, inside)) or (scheme is _BARE and labels == {"I", "O"})


def chunk_scores(
    scheme: Scheme, true: list[list[str]], predicted: list[list[str]]
) -> dict[str, float]:
    """Precision, recall and F1 of chunks in 0..1, as conlleval computes them (Tjong Kim Sang 2000).

    A chunk is right when its type, its first and its last word are.
    """
    both = ([[*map(scheme.as_seqeval, tags)] for tags in rows] for rows in (true, predicted))
    scores = precision_recall_fscore_support(*both, average="micro", zero_division=0)
    return {
        name: float(score)
        for name, score in zip(("precision", "recall", "f1"), scores, strict=False)
    }


def chunk_class_scores(
    scheme: Scheme, true: list[list[str]], predicted: list[list[str]]
) -> ClassScores:
    """Precision, recall, F1 and support of each type of chunk, as seqeval computes them."""
    both = [[[*map(scheme.as_seqeval, tags)] for tags in rows] for rows in (true, predicted)]
    types = sorted({name for rows in both for name, _, _ in get_entities(rows)})
    return by_class(types, precision_recall_fscore_support(*both, zero_division=0))


def spans(scheme: Scheme, sentence: dict[str, list], kind: str) -> list[dict[str, Any]]:
    """The chunks of a sentence as they are printed.

    Args:
        sentence: its `words`, their `tags`, `scores`, of which a chunk has the mean, and `offsets`.
        kind: what the type of a chunk is called.
    """
    words, scores, offsets = (sentence[name] for name in ("words", "scores", "offsets"))
    return [
        {
            kind: name,
            "text": " ".join(words[first : last + 1]),
            "first": first,
            "last": last,
            "start": offsets[first][0],
            "end": offsets[last][1],
            "score": _mean(scores[first : last + 1]),
        }
        for name, first, last in get_entities([*map(scheme.as_seqeval, sentence["tags"])])
    ]


def _mean(scores: list[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return statistics.fmean(known) if known else None


def begun_inside(scheme: Scheme, tags: list[list[str]]) -> int:
    """How many chunks begin with I-, as in IOB1."""
    rows = ([*map(scheme.as_seqeval, row)] for row in tags)
    return sum(row[first][0] == "I" for row in rows for _, first, _ in get_entities(row))
