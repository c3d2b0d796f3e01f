"""The best sequence of labels that a scheme of chunks allows (Viterbi 1967).

A sequence scores the log-probabilities of its labels and, where training labels were counted, for
each two neighbours WEIGHT * log(p(second | first) / p(second)).
"""

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ptv2_fast.tasks.chunks import Scheme

# Of 0, 0.25, 0.35, 0.5 and 0.75 the one that scored best, or within half a point of it, for
# P-Tuning v2 and fine-tuning on CoNLL-2004 and P-Tuning v2 on CoNLL-2003 and names on Twitter.
WEIGHT = 0.35

# A word takes their square of time: of 512 half a millisecond on a core.
MOST_LABELS = 512

# Not minus infinity: where no sequence is allowed, the one that breaks the fewest rules is left.
_FORBIDDEN = -1e4

# How often each label follows each, by the first; pairs that do not occur are left out.
Transitions = dict[str, dict[str, int]]


class Rules(NamedTuple):
    """Where labels may stand in a sentence.

    Attributes:
        first: which may begin one, bool [L].
        between: whether the second may follow the first, bool [L, L].
        last: which may end one, bool [L].
    """

    first: Tensor
    between: Tensor
    last: Tensor


@functools.lru_cache(maxsize=32)
def rules_of(scheme: Scheme, labels: tuple[str, ...]) -> Rules:
    """The rules of labels that fit a scheme: what is inside a chunk has its type.

    A type whose chunks no label begins may begin inside, as in IO; one whose chunks no label ends
    may end anywhere, as in IOB.
    """
    tags = [scheme.as_seqeval(label) for label in labels]
    parts, kinds = np.array([tag[0] for tag in tags]), np.array([tag[2:] for tag in tags])
    is_open, is_inside = np.isin(parts, ("B", "I")), np.isin(parts, ("I", "E"))
    must_go_on = is_open & np.isin(kinds, kinds[parts == "E"])
    needs_begin = is_inside & np.isin(kinds, kinds[parts == "B"])
    goes_on = is_open[:, None] & is_inside & (kinds[:, None] == kinds)
    between = goes_on | ~(must_go_on[:, None] | needs_begin)
    return Rules(*map(torch.from_numpy, (~needs_begin, between, ~must_go_on)))


def broken(numbers: Tensor, lengths: Tensor, rules: Rules) -> Tensor:
    """How often sentences break the rules.

    Args:
        numbers: of the labels of all words, one sentence behind the other, int [N].
        lengths: words of each sentence, int [B].

    Returns:
        Counts, int [B].
    """
    sentence = torch.arange(len(lengths)).repeat_interleave(lengths)
    ends = sentence.diff(append=torch.tensor([-1])) != 0  # [N]
    begins = ends.roll(1)
    wrong = (begins & ~rules.first[numbers]).int() + (ends & ~rules.last[numbers]).int()
    wrong[1:] += (~begins[1:] & ~rules.between[numbers[:-1], numbers[1:]]).int()
    return torch.zeros(len(lengths), dtype=torch.int).index_add_(0, sentence, wrong)


def keeps_to(scheme: Scheme, labels: Sequence[str], tags: Sequence[Sequence[str]]) -> bool:
    """Whether sentences break the rules less often than they begin a chunk as the scheme says.

    A few odd labels do not matter; those of IOB1 break the rules nearly always.

    Args:
        labels: all that occur.
        tags: of each sentence, which has words.
    """
    known = {label: number for number, label in enumerate(labels)}
    numbers = torch.tensor([known[tag] for tag in itertools.chain.from_iterable(tags)])
    lengths = torch.tensor([*map(len, tags)])
    begins = torch.tensor([scheme.as_seqeval(label)[0] in "BS" for label in labels])
    wrong = broken(numbers, lengths, rules_of(scheme, tuple(labels))).sum()
    return bool(wrong < begins[numbers].sum())


def count_transitions(tags: Sequence[Sequence[str]]) -> Transitions:
    """How often each label follows each in the sentences."""
    counts: Transitions = {}
    pairs = Counter(itertools.chain.from_iterable(map(itertools.pairwise, tags)))
    for (label, after), count in sorted(pairs.items()):
        counts.setdefault(label, {})[after] = count
    return counts


def affinities(labels: Sequence[str], transitions: Transitions) -> Tensor:
    """log(p(second | first) / p(second)) of each two labels, [L, L].

    As if each label had been followed once more by all, as often as they occur: so a label that
    never occurs has no preference.

    Raises:
        ValueError: for what is no table of counts, or names other labels.
    """
    counts = torch.zeros(len(labels), len(labels), dtype=torch.float64)
    known = {label: number for number, label in enumerate(labels)}
    try:
        for label, row in transitions.items():
            for after, count in row.items():
                counts[known[label], known[after]] = count
    except (AttributeError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"transitions: expected counts of labels that follow labels, got {transitions!r:.100}"
        ) from error
    if not (counts.isfinite() & (counts >= 0)).all():
        raise ValueError(f"transitions: expected counts >= 0, got {transitions!r:.100}")
    share = (counts.sum(0) / counts.sum().clamp(min=1)).clamp(min=1e-12)  # of what follows
    return ((counts / share + 1) / (counts.sum(1, keepdim=True) + 1)).log().float()


def viterbi(
    scores: Tensor, lengths: Tensor, rules: Rules, affinity: Tensor | None = None
) -> Tensor:
    """The labels of each sentence with the largest sum of scores that the rules allow.

    Args:
        scores: log-probabilities, [B, W, L].
        lengths: words of each sentence, at least one, int [B].
        affinity: what each two neighbours add, [L, L].

    Returns:
        Numbers of labels, [B, W]; behind a sentence its last one.
    """
    first, between, last = (_FORBIDDEN * ~rule for rule in rules)
    if affinity is not None:
        between = between + affinity
    into = between.T.contiguous()  # [second, first]
    stay = torch.arange(scores.shape[2]).expand(len(scores), -1)
    total, origins = scores[:, 0] + first, []  # [B, L]
    for word in range(1, scores.shape[1]):
        best, origin = (total[:, None, :] + into).max(2)
        inside = (word < lengths)[:, None]
        total = torch.where(inside, best + scores[:, word], total)
        origins.append(torch.where(inside, origin, stay))
    path = [(total + last).argmax(1)]
    for origin in reversed(origins):
        path.append(origin.gather(1, path[-1][:, None])[:, 0])
    return torch.stack(path[::-1], 1)


def decode(logits: Tensor, lengths: Tensor, rules: Rules, affinity: Tensor | None = None) -> Tensor:
    """The labels of each sentence with the best score that the rules allow.

    Args:
        logits: of all words, one sentence behind the other, [N, L].
        lengths: words of each sentence, int [B].
        affinity: what `affinities` gives; None = probabilities and rules alone.

    Returns:
        Numbers of labels, int [N].
    """
    best = logits.argmax(-1)
    if affinity is None:
        # Where each word's best label is allowed, so is their sequence, and none is better.
        rows = broken(best, lengths, rules).nonzero()[:, 0]
    else:
        rows, affinity = lengths.nonzero()[:, 0], WEIGHT * affinity
    if len(rows) == 0:
        return best
    words, found = (part.split(lengths.tolist()) for part in (logits.float(), best))
    scores = pad_sequence([words[row] for row in rows], batch_first=True).log_softmax(-1)
    paths = viterbi(scores, lengths[rows], rules, affinity)
    for row, path in zip(rows.tolist(), paths, strict=True):
        found[row].copy_(path[: len(found[row])])
    return best
