"""What /metrics tells Prometheus."""

import contextlib
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ptv2_fast.serving.batching import BatchStatistics

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_COUNTS = tuple(2**power for power in range(11))
_TOKENS = tuple(2**power for power in range(4, 18))


class Metrics:
    """Counters of one server.

    Args:
        waiting: how many texts are in the queue now.

    Attributes:
        paths: that are told apart; all others are "other".
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.paths: set[str] = set()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "ptv2"}
        self._answers = Counter("answers", "HTTP answers", ["path", "status"], **own)
        self._texts = Counter("texts", "texts that ran", ["adapter"], **own)
        self._tokens = Counter("tokens", "tokens that ran", **own)
        self._waited = Histogram("wait_seconds", "time in the queue", buckets=_SECONDS, **own)
        self._ran = Histogram("batch_seconds", "time of a batch", buckets=_SECONDS, **own)
        self._rows = Histogram("batch_texts", "texts of a batch", buckets=_COUNTS, **own)
        self._sizes = Histogram("batch_tokens", "tokens of a batch", buckets=_TOKENS, **own)
        Gauge("queue_texts", "texts that wait", **own).set_function(waiting)

    def count(self, path: str, status: int) -> None:
        """An answer was given."""
        self._answers.labels(path if path in self.paths else "other", str(status)).inc()

    def observe(self, batch: BatchStatistics) -> None:
        """A batch ran."""
        tokens = sum(row.tokens for row in batch.rows)
        self._tokens.inc(tokens)
        self._sizes.observe(tokens)
        self._rows.observe(len(batch.rows))
        self._ran.observe(batch.seconds)
        for row, waited in zip(batch.rows, batch.waited, strict=True):
            self._texts.labels(row.adapter).inc()
            self._waited.observe(waited)

    def forget(self, adapter: str) -> None:
        """An adapter was unloaded: names that come and go would stay for ever."""
        with contextlib.suppress(KeyError):  # where it read no text; newer versions say nothing
            self._texts.remove(adapter)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)
