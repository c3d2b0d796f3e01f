"""The best sequence of labels that a scheme of chunks allows (Viterbi 1967)."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ptv2_fast.tasks.chunks import Scheme

# Not minus infinity: where no sequence is allowed, the one that breaks the fewest rules is left.
_FORBIDDEN = -1e4


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


def viterbi(scores: Tensor, lengths: Tensor, rules: Rules) -> Tensor:
    """The labels of each sentence with the largest sum of scores that the rules allow.

    Args:
        scores: log-probabilities, [B, W, L].
        lengths: words of each sentence, at least one, int [B].

    Returns:
        Numbers of labels, [B, W]; behind a sentence its last one.
    """
    first, between, last = (_FORBIDDEN * ~rule for rule in rules)
    stay = torch.arange(scores.shape[2]).expand(len(scores), -1)
    total, origins = scores[:, 0] + first, []  # [B, L]
    for word in range(1, scores.shape[1]):
        best, origin = (total[:, :, None] + between).max(1)
        inside = (word < lengths)[:, None]
        total = torch.where(inside, best + scores[:, word], total)
        origins.append(torch.where(inside, origin, stay))
    path = [(total + last).argmax(1)]
    for origin in reversed(origins):
        path.append(origin.gather(1, path[-1][:, None])[:, 0])
    return torch.stack(path[::-1], 1)


def decode(logits: Tensor, lengths: Tensor, rules: Rules) -> Tensor:
    """The most probable labels of each sentence that the rules allow.

    Args:
        logits: of all words, one sentence behind the other, [N, L].
        lengths: words of each sentence, int [B].

    Returns:
        Numbers of labels, int [N].
    """
    best = logits.argmax(-1)
    # Where each word's best label is allowed, so is their sequence, and none is better.
    odd = broken(best, lengths, rules).nonzero()[:, 0]
    if len(odd) == 0:
        return best
    words, found = (part.split(lengths.tolist()) for part in (logits.float(), best))
    scores = pad_sequence([words[row] for row in odd], batch_first=True).log_softmax(-1)
    for row, path in zip(odd.tolist(), viterbi(scores, lengths[odd], rules), strict=True):
        found[row].copy_(path[: len(found[row])])
    return best
