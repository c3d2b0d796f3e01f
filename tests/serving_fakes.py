"""An engine without a model, and a server of an application on loopback."""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

import httpx
import uvicorn

from ptv2_fast.serving.batching import Row
from ptv2_fast.serving.errors import RequestError, unknown_adapter, unloaded
from ptv2_fast.serving.shapes import Prediction

LIMIT = 20  # words of a text


class WordCounts:
    """Says how many words a text has, and twice that by the adapter "twice".

    Attributes:
        free: while it is not set, a batch does not end.
        batches: the rows of each that ran.
    """

    model_name = "no model"

    def __init__(self, *names: str) -> None:
        self.loaded = {name: object() for name in names}
        self.free, self.batches = threading.Event(), []
        self.begun = threading.Semaphore(0)
        self.free.set()

    @property
    def names(self) -> list[str]:
        return list(self.loaded)

    def facts(self, name: str) -> dict:
        return {"task": "text-classification", "labels": ["few", "many"], "inputs": ["text"]}

    def prepare(self, texts: Sequence, adapters: Sequence[str], truncate: bool) -> list[Row]:
        rows = []
        for text, name in zip(texts, adapters, strict=True):
            if name not in self.loaded:
                raise unknown_adapter(name, self.names)
            if isinstance(text, list) or not text.strip():
                raise RequestError(400, "empty", "inputs: expected text")
            words = text.split()
            if len(words) > LIMIT and not truncate:
                raise RequestError(413, "validation", f"inputs: expected at most {LIMIT} tokens")
            rows.append(Row(name, [len(words[:LIMIT])], (text, self.loaded[name])))
        return rows

    def run(self, rows: Sequence[Row]) -> list:
        self.batches.append(list(rows))
        self.begun.release()
        assert self.free.wait(30)
        return [self._result(row) for row in rows]

    def _result(self, row: Row) -> Prediction | Exception:
        text, member = row.content
        if "poison" in text:
            raise RuntimeError("a batch with poison in it")
        if self.loaded.get(row.adapter) is not member:
            return unloaded(row.adapter)
        count = row.tokens * (2 if row.adapter == "twice" else 1)
        label = "many" if count > 3 else "few"
        line = {"text": text, "label": label, "score": 0.5}
        return Prediction(line, ["few", "many"], [0.0, float(count - 3)], row.tokens)

    def load(self, name: str, folder) -> None:
        if not (folder / "good").exists():
            raise ValueError(f"{folder.name}: expected an adapter")
        self.loaded[name] = object()

    def unload(self, name: str) -> None:
        del self.loaded[name]


@contextlib.contextmanager
def served(app) -> Iterator[httpx.Client]:
    """A client of the application, which runs on loopback, in a thread; ended as by a signal."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False
        ) as client:
            client.server = server
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
