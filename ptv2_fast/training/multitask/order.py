"""The order of multi-task training: batches of one data set or of all, sampled by temperature."""

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from ptv2_fast.training.order import Batching, BatchOrder


def batches_per_epoch(sizes: Sequence[int], total: int, temperature: float) -> list[int]:
    """How many batches of each data set an epoch has.

    In proportion to size ** (1 / temperature) by largest remainders, and at least one each.

    Args:
        sizes: examples of the data sets.
        total: batches altogether.
        temperature: > 0; 1 = in proportion to the sizes, large = equally often.
    """
    weights = [(size / max(sizes)) ** (1 / temperature) for size in sizes]
    shares = [total * weight / sum(weights) for weight in weights]
    counts = [max(1, int(share)) for share in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda i: counts[i] - shares[i])
    for number in by_remainder[: max(0, total - sum(counts))]:
        counts[number] += 1
    return counts


class MultiTaskOrder(BatchOrder):
    """A random order of batches of examples of similar length, each of one data set or of all.

    An epoch has as many examples of a data set either way, and every batch is full. A data set is
    passed through in a random order, again and again; an epoch goes on where the one before
    stopped, so that no example is left out for long. The order depends on the seed and the epoch
    alone.

    Args:
        lengths: tokens of the rows of each data set.
        batches: how many batches of each data set an epoch has.
        batching: rows in a batch.
        seed: of the order.
        is_mixed: let a batch hold examples of several data sets.
    """

    def __init__(
        self,
        lengths: list[list[int]],
        batches: list[int],
        batching: Batching,
        seed: int,
        is_mixed: bool = False,
    ) -> None:
        self.lengths, self.batches_of, self.batching, self.seed = lengths, batches, batching, seed
        self.is_mixed = is_mixed
        self.count = sum(batches)

    def __len__(self) -> int:
        pairs = zip(self.lengths, self.batches_of, strict=True)
        return sum(self.batching.examples(lengths, count) for lengths, count in pairs)

    def batches(self) -> list[list[int]]:
        """Batches of indices into the data sets one after another."""
        drawn: list[list[int]] = []
        first = 0
        for lengths, count in zip(self.lengths, self.batches_of, strict=True):
            rows = self._draw(len(lengths), self.batching.examples(lengths, count))
            drawn.append([first + row for row in rows])
            first += len(lengths)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        counts = self.batches_of
        if self.is_mixed:
            together = list(itertools.chain.from_iterable(drawn))
            shuffled = torch.randperm(len(together), generator=generator).tolist()
            drawn, counts = [[together[n] for n in shuffled]], [self.count]
        every = list(itertools.chain.from_iterable(self.lengths))
        batches: list[list[int]] = []
        for rows, count in zip(drawn, counts, strict=True):
            batches += self.batching.cut(rows, every, count)
        return [batches[n] for n in torch.randperm(len(batches), generator=generator).tolist()]

    def _draw(self, size: int, count: int) -> list[int]:
        """This epoch's part of the endless passes through a data set."""
        start = self.epoch * count
        rows: list[int] = []
        for number in range(start // size, (start + count - 1) // size + 1):
            generator = torch.Generator().manual_seed(self.seed + number)
            rows += torch.randperm(size, generator=generator).tolist()
        skipped = start % size
        return rows[skipped : skipped + count]


class CombinedRows(Dataset):
    """The rows of several tables, each with the number of its table."""

    def __init__(self, tables: Sequence[Any]) -> None:
        self.tables = tables
        self.starts = [0, *itertools.accumulate(map(len, tables))]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, dict[str, Any]]]:
        """The rows of a batch, by one look into each table: what torch's loader calls."""
        rows_of: dict[int, list[int]] = {}
        numbers = [bisect.bisect_right(self.starts, index) - 1 for index in indices]
        for number, index in zip(numbers, indices, strict=True):
            rows_of.setdefault(number, []).append(index - self.starts[number])
        found = {n: iter(self.tables[n].__getitems__(rows)) for n, rows in rows_of.items()}
        return [(number, next(found[number])) for number in numbers]
