"""One thread that runs what many requests ask for together: batches by tokens and waiting time."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from ptv2_fast.serving.errors import RequestError, unloaded


@dataclass(frozen=True, eq=False)
class Row:
    """One text for one adapter.

    Attributes:
        lengths: tokens of what the encoder reads for it: one, or its windows or choices.
        content: what the model takes, known to who makes and runs rows.
    """

    adapter: str
    lengths: Sequence[int]
    content: Any = None

    @property
    def tokens(self) -> int:
        """Of all that the encoder reads for it."""
        return sum(self.lengths)


@dataclass(eq=False)
class _Request:
    """The rows of a request, and what became of them."""

    rows: Sequence[Row]
    arrived: float  # seconds, of time.monotonic
    answer: Future = field(default_factory=Future)
    results: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchStatistics:
    """What a batch was, for the metrics.

    Attributes:
        waited: seconds that each row was in the queue.
        seconds: that the batch ran.
    """

    rows: Sequence[Row]
    waited: Sequence[float]
    seconds: float


class Batcher:
    """Gathers the rows of requests into batches and answers each request when its rows are done.

    A batch begins when the queue holds `max_batch_tokens`, or its first row has waited for
    `max_wait` seconds, which it has when the batch before took longer. Rows keep their order.

    Args:
        run: gives a result for each row, an exception for one that cannot be served; called by one
            thread. When it raises for several rows, each is run once more alone.
        max_batch_tokens: of the rows of a batch, padding included; a longer row runs alone.
        max_wait: seconds.
        observe: is told of each batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Row]], Sequence[Any]],
        max_batch_tokens: int,
        max_wait: float,
        observe: Callable[[BatchStatistics], None] = lambda statistics: None,
    ) -> None:
        self._run, self._observe = run, observe
        self.max_batch_tokens, self.max_wait = max_batch_tokens, max_wait
        self._queue: deque[tuple[_Request, int]] = deque()  # with the number of the row
        self._tokens = 0  # in the queue
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return len(self._queue)

    @property
    def is_alive(self) -> bool:
        """Whether requests are served."""
        return self._thread.is_alive() and not self._is_closing

    def submit(self, rows: Sequence[Row]) -> Future:
        """Put the rows of a request into the queue.

        Returns:
            The list of their results. Cancelled, it takes the rows that still wait out of the
            queue.

        Raises:
            RequestError: 503 while closing.
        """
        request = _Request(rows, time.monotonic())
        with self._changed:
            if not self.is_alive:
                raise RequestError(503, "unavailable", "the server takes no more requests")
            self._queue.extend((request, number) for number in range(len(rows)))
            self._tokens += sum(row.tokens for row in rows)
            self._changed.notify()
        request.answer.add_done_callback(lambda answer: self._forget(request))
        return request.answer

    def drop(self, adapter: str) -> None:
        """Answer the requests that wait for an adapter with an error; others go on."""
        with self._changed:
            waiting = dict.fromkeys(request for request, _ in self._queue)
        for request in waiting:
            if any(row.adapter == adapter for row in request.rows):
                self._fail(request, unloaded(adapter))

    def close(self) -> None:
        """Take no more requests, and return when those that were taken are answered."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _forget(self, request: _Request) -> None:
        """Take the rows of a request that is answered, or cancelled, out of the queue."""
        with self._changed:
            kept = [entry for entry in self._queue if entry[0] is not request]
            if len(kept) < len(self._queue):
                self._queue = deque(kept)
                self._tokens = sum(request.rows[number].tokens for request, number in kept)

    def _work(self) -> None:
        while batch := self._next_batch():
            rows = [request.rows[number] for request, number in batch]
            begun = time.monotonic()
            results = self._results(rows)
            seconds = time.monotonic() - begun
            self._observe(BatchStatistics(rows, [begun - r.arrived for r, _ in batch], seconds))
            for (request, number), result in zip(batch, results, strict=True):
                self._finish(request, number, result)

    def _next_batch(self) -> list[tuple[_Request, int]]:
        """The rows to run next, when it is time; nothing at the end."""
        with self._changed:
            while True:
                if not self._queue:
                    if self._is_closing:
                        return []
                    self._changed.wait()
                    continue
                left = self._queue[0][0].arrived + self.max_wait - time.monotonic()
                if self._is_closing or self._tokens >= self.max_batch_tokens or left <= 0:
                    return self._take()
                self._changed.wait(left)

    def _take(self) -> list[tuple[_Request, int]]:
        """The first rows of the queue, as many as fit into a batch and one at least."""
        batch: list[tuple[_Request, int]] = []
        count = longest = 0
        while self._queue:
            request, number = self._queue[0]
            row = request.rows[number]
            count, longest = count + len(row.lengths), max(longest, *row.lengths)
            if batch and count * longest > self.max_batch_tokens:
                break
            self._tokens -= row.tokens
            batch.append(self._queue.popleft())
        return batch

    def _results(self, rows: Sequence[Row]) -> Sequence[Any]:
        try:
            return self._run(rows)
        except Exception as error:
            if len(rows) == 1:
                return [error]
            return [self._results([row])[0] for row in rows]

    def _finish(self, request: _Request, number: int, result: Any) -> None:
        if isinstance(result, Exception):
            self._fail(request, result)
            return
        request.results[number] = result
        if len(request.results) == len(request.rows):
            results = [request.results[number] for number in range(len(request.rows))]
            with contextlib.suppress(InvalidStateError):  # of a client that has gone
                request.answer.set_result(results)

    def _fail(self, request: _Request, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):  # also when another row has failed before
            request.answer.set_exception(error)
