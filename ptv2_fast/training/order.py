"""The order of training examples: random batches of similar length, of so many examples or tokens.

Unlike transformers' sampler of this purpose, batches are shuffled, so that lengths do not follow
each other from long to short, and the order depends on the seed and the epoch alone: a run that
resumes in a later epoch gets the order of the run that was not interrupted.
"""

import dataclasses
import itertools
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import BatchSampler, Sampler

from ptv2_fast.tasks.task import Features
from ptv2_fast.training.options import TrainingOptions

# Batches of similar length are drawn from groups of this many batches.
_GROUP = 50


@dataclasses.dataclass(frozen=True)
class Batching:
    """How many examples are in a batch; one of the two is None.

    Attributes:
        size: examples; the last batch may have fewer.
        tokens: about so many, pads not counted, in every batch; an example with more is one.
    """

    size: int | None
    tokens: int | None

    @classmethod
    def of(cls, options: TrainingOptions) -> "Batching":
        """As the options say."""
        return cls(options.batch_size, options.batch_tokens)

    def lengths_of(self, features: Features) -> list[int]:
        """The lengths of rows, for the other methods."""
        return features.lengths if self.tokens is None else features.token_counts

    def count(self, lengths: Sequence[int]) -> int:
        """Batches that examples of these lengths make."""
        if self.tokens is None:
            return math.ceil(len(lengths) / self._size)
        return min(len(lengths), math.ceil(sum(self._shares(lengths)) / self.tokens))

    def examples(self, lengths: Sequence[int], batches: int) -> int:
        """Examples in so many batches, drawn from examples of these lengths."""
        if self.tokens is None:
            return batches * self._size
        return max(batches, round(batches * len(lengths) / self.count(lengths)))

    def cut(self, order: list[int], lengths: Sequence[int], batches: int) -> list[list[int]]:
        """An order of examples in so many batches, with examples moved nearby."""
        if self.tokens is None:
            return batches_of_similar_length(order, lengths, self._size)
        shares = self._shares(lengths)
        alone = [[i] for i in order if shares[i] == self.tokens]
        others = [i for i in order if shares[i] != self.tokens]
        if len(alone) + bool(others) > batches:  # more were drawn than there are batches
            return batches_of_similar_tokens(order, shares, batches)
        batches -= len(alone)
        return alone + (batches_of_similar_tokens(others, shares, batches) if others else [])

    def first(self, order: list[int], lengths: Sequence[int]) -> list[int]:
        """The first examples of an order, as many as are in a batch."""
        if self.tokens is None:
            return order[: self._size]
        totals = itertools.accumulate(lengths[i] for i in order)
        return order[: 1 + sum(total < self.tokens for total in totals)]

    def _shares(self, lengths: Sequence[int]) -> list[int]:
        """What the examples take of a batch's tokens: a longer one takes them all, and no more, or
        the others would be spread over more batches than they fill."""
        assert self.tokens is not None
        return [min(length, self.tokens) for length in lengths]

    @property
    def _size(self) -> int:
        assert self.size is not None
        return self.size


class BatchOrder(Sampler):
    """A random order of batches, which may have unequal numbers of examples.

    Attributes:
        count: batches in every epoch.
        seed: of the order.
    """

    count: int
    seed: int
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader."""
        self.epoch = epoch

    @abstractmethod
    def __len__(self) -> int:
        """Examples in every epoch."""

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(self.batches())

    @abstractmethod
    def batches(self) -> list[list[int]]:
        """The batches of the epoch."""


class LengthGroupedOrder(BatchOrder):
    """Batches of examples of similar lengths; every epoch has all examples once.

    Args:
        lengths: tokens of the examples.
        batching: examples or tokens in a batch.
        seed: of the order.
    """

    def __init__(self, lengths: list[int], batching: Batching, seed: int) -> None:
        self.lengths, self.batching, self.seed = lengths, batching, seed
        self.count = batching.count(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def batches(self) -> list[list[int]]:
        """See `BatchOrder`."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        batches = self.batching.cut(order, self.lengths, self.count)
        # A short batch stays last, or the loader would cut all batches after it elsewhere.
        size = self.batching.size
        whole = self.count if size is None else len(order) // size
        shuffled = torch.randperm(whole, generator=generator).tolist()
        return [batches[n] for n in shuffled] + batches[whole:]


class OrderedBatches(BatchSampler):
    """The batches of an order, for a data loader."""

    def __init__(self, order: BatchOrder) -> None:
        super().__init__(order, 1, False)
        self.order = order

    def __len__(self) -> int:
        return self.order.count

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.order.batches())


def batches_of_similar_length(
    order: list[int], lengths: Sequence[int], batch_size: int
) -> list[list[int]]:
    """The order in batches, of which the last may be short, with rows moved nearby."""
    width = batch_size * _GROUP
    groups = [order[i : i + width] for i in range(0, len(order), width)]
    order = [i for group in groups for i in sorted(group, key=lengths.__getitem__)]
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def batches_of_similar_tokens(
    order: list[int], lengths: Sequence[int], count: int
) -> list[list[int]]:
    """The order in `count` batches with about as many tokens each, with rows moved nearby.

    Args:
        order: at least `count` examples.
        lengths: tokens of each example.
        count: batches; none is empty.
    """
    width = _GROUP * math.ceil(len(order) / count)
    groups = [order[i : i + width] for i in range(0, len(order), width)]
    # Up and down in turn, so that a batch across two groups is of similar lengths, too.
    order = [
        i
        for number, group in enumerate(groups)
        for i in sorted(group, key=lengths.__getitem__, reverse=number % 2 == 1)
    ]
    batches: list[list[int]] = []
    start, tokens_left = 0, sum(lengths[i] for i in order)
    for batches_left in range(count, 0, -1):
        # Each of the batches left has an example at least, and an equal part of the tokens.
        end, tokens = start + 1, lengths[order[start]]
        while len(order) - end >= batches_left:
            following = lengths[order[end]]
            if batches_left > 1 and tokens + following / 2 > tokens_left / batches_left:
                break
            tokens += following
            end += 1
        batches.append(order[start:end])
        start, tokens_left = end, tokens_left - tokens
    return batches
