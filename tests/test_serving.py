"""The server: what it answers, how it batches, and that it stays up."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from ptv2_fast.serving.application import make_app
from ptv2_fast.serving.batching import Batcher, Row
from ptv2_fast.serving.errors import RequestError
from ptv2_fast.serving.folders import find_adapter
from ptv2_fast.serving.options import ServeOptions
from tests.serving_fakes import LIMIT, WordCounts, served

KEY = "a secret"


@pytest.fixture
def engine() -> WordCounts:
    return WordCounts("once", "twice")


@pytest.fixture
def root(tmp_path):
    for name in ("new", "other"):
        (tmp_path / "root" / name).mkdir(parents=True)
    (tmp_path / "root" / "new" / "good").write_text("")
    return tmp_path / "root"


@pytest.fixture(scope="module")
def limited():
    """A client of a server with small limits, for requests that leave nothing behind."""
    options = ServeOptions(max_client_batch=4, max_wait_ms=1, max_body_bytes=5000)
    with served(make_app(WordCounts("once", "twice"), options)) as client:
        yield client


@pytest.fixture
def client(engine, root):
    options = ServeOptions(max_queue=8, max_wait_ms=1, adapter_root=root)
    with served(make_app(engine, options)) as client:
        yield client


def ask(client, path="/predict", **body):
    answer = client.post(path, json=body)
    return answer.status_code, answer.json()


def shown(rows):
    return [row.adapter for row in rows]


def test_batches_take_what_fits_in_order_and_do_not_wait_for_what_is_full():
    free, begun, batches = threading.Event(), threading.Semaphore(0), []

    def run(rows):
        batches.append([row.lengths for row in rows])
        begun.release()
        assert free.wait(30)
        return [row.tokens for row in rows]

    batcher = Batcher(run, max_batch_tokens=10, max_wait=60)
    first = batcher.submit([Row("a", [11])])  # longer than a batch: alone
    assert begun.acquire(timeout=30)
    requests = [[[4], [5]], [[1], [1]], [[2, 3]], [[9]]]
    answers = [batcher.submit([Row("a", lengths) for lengths in rows]) for rows in requests]
    gone = batcher.submit([Row("a", [1])])
    gone.cancel()
    late = batcher.submit([Row("a", [1])])
    free.set()
    assert first.result(30) == [11]
    assert [answer.result(30) for answer in answers] == [[4, 5], [1, 1], [5], [9]]
    batcher.close()
    assert late.result(0) == [1]
    # What is padded counts: [5] and [1] take 10 tokens together.
    assert batches == [[[11]], [[4], [5]], [[1], [1]], [[2, 3]], [[9]], [[1]]]
    assert batcher.waiting == 0
    with pytest.raises(RequestError, match="no more requests"):
        batcher.submit([Row("a", [1])])


def test_a_lone_text_waits_for_others_no_longer_than_it_is_told():
    batcher = Batcher(lambda rows: [len(rows)] * len(rows), max_batch_tokens=100, max_wait=0.3)
    begun = time.monotonic()
    answers = [batcher.submit([Row("a", [1])]) for _ in range(3)]
    assert [answer.result(30) for answer in answers] == [[3]] * 3
    assert time.monotonic() - begun >= 0.3
    batcher.close()


def test_predict_has_teis_shape(limited):
    few = limited.post("/predict", json={"inputs": "a b", "adapter": "once"}).json()
    assert [one["label"] for one in few] == ["few", "many"]
    assert sum(one["score"] for one in few) == pytest.approx(1)
    assert ask(limited, inputs="a b", model="twice", top_k=1)[1][0]["label"] == "many"
    assert ask(limited, inputs="a b", adapter="once", raw_scores=True)[1][1]["score"] == -1
    for inputs in (["a", "a b c d"], [["a"], ["a b c d"]]):
        status, found = ask(limited, inputs=inputs, adapter="once", top_k=1)
        assert status == 200 and [one[0]["label"] for one in found] == ["few", "many"]
    # Several adapters of one text, and one for each text.
    for inputs in ("a b", ["a b", "a b"]):
        _, found = ask(limited, inputs=inputs, adapter=["once", "twice"], top_k=1)
        assert [one[0]["label"] for one in found] == ["few", "many"]


def test_the_v1_endpoints_have_vllms_shape(limited):
    status, found = ask(limited, "/v1/classify", input=["a b c d", "a"], model="once")
    assert status == 200 and found["object"] == "list" and found["model"] == "once"
    assert found["id"].startswith("classify-") and found["created"] <= time.time()
    assert [one["index"] for one in found["data"]] == [0, 1]
    assert found["data"][0]["label"] == "many" and found["data"][0]["num_classes"] == 2
    assert found["data"][0]["probs"][1] == pytest.approx(1 / (1 + 2.718281828**-1))
    assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] == 5
    status, error = ask(limited, "/v1/token_classify", input="a", model="once")
    assert status == 422 and "labels of words" in error["error"]
    listed = limited.get("/v1/models").json()
    assert [one["id"] for one in listed["data"]] == ["once", "twice"]
    assert listed["data"][0] | {"object": "model", "labels": ["few", "many"]} == listed["data"][0]


@pytest.mark.parametrize(
    ("status", "word", "body"),
    [
        (400, "JSON", b'{"inputs": '),
        (400, "JSON", b"{'inputs'}"),
        (400, "body", b"[" * 4000),
        (400, "body", b'{"inputs": "\xff"}'),
        (422, "body", b"3"),
        (422, "inputs", {"adapter": "once"}),
        (422, "inputs", {"inputs": 3, "adapter": "once"}),
        (422, "inputs", {"inputs": [], "adapter": "once"}),
        (422, "inputs", {"inputs": [[]], "adapter": "once"}),
        (422, "inputs", {"inputs": ["a", None], "adapter": "once"}),
        (422, "inputs", b'{"inputs": "\\ud800", "adapter": "once"}'),
        (422, "top_k", {"inputs": "a", "adapter": "once", "top_k": 0}),
        (422, "top_k", b'{"inputs": "a", "adapter": "once", "top_k": NaN}'),
        (422, "top_k", {"inputs": "a", "adapter": "once", "top_k": True}),
        (422, "topk", {"inputs": "a", "adapter": "once", "topk": 1}),
        (422, "unicode", b'{"inputs": "a", "\\ud800": 1}'),
        (422, "adapter", {"inputs": "a", "adapter": 3}),
        (422, "adapter", {"inputs": "a"}),
        (422, "adapter", {"inputs": "a", "adapter": "once", "model": "once"}),
        (422, "adapter", {"inputs": ["a"] * 3, "adapter": ["once"] * 2}),
        (422, "adapter", {"inputs": "a", "adapter": []}),
        (404, "'../once'", {"inputs": "a", "adapter": "../once"}),
        (404, "'nobody'", {"inputs": "a", "adapter": ["once", "nobody"]}),
        (400, "expected text", {"inputs": "", "adapter": "once"}),
        (400, "expected text", {"inputs": ["a", " \n"], "adapter": "once"}),
        (413, f"at most {LIMIT} tokens", {"inputs": "a " * 21, "adapter": "once"}),
        (413, "at most 4 texts", {"inputs": ["a"] * 5, "adapter": "once"}),
        (413, "5000 bytes", {"inputs": "a" * 10_000_000, "adapter": "once"}),
        (500, "model failed", {"inputs": "poison", "adapter": "once"}),
    ],
)  # fmt: skip
def test_bad_requests_get_errors_of_one_shape(limited, status, word, body):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    answer = limited.post("/predict", content=content, headers=headers)
    assert answer.status_code == status
    error = answer.json()
    assert set(error) == {"error", "error_type"} and word in error["error"]
    assert ask(limited, inputs="a b", adapter="once")[0] == 200


def test_other_errors_have_the_same_shape(limited):
    for answer, status in (
        (limited.get("/nowhere"), 404),
        (limited.get("/predict"), 405),
        (limited.post("/predict", content=b'{"inputs": "a"}'), 415),
    ):
        assert answer.status_code == status and set(answer.json()) == {"error", "error_type"}
    # Without a length in its head, a body is read no further than it may be long.
    pieces = (b"x" * 1000 for _ in range(50))
    headers = {"content-type": "application/json"}
    assert limited.post("/predict", content=pieces, headers=headers).status_code == 413


def test_a_text_that_fails_costs_others_nothing(client, engine):
    engine.free.clear()
    with ThreadPoolExecutor() as pool:
        pool.submit(ask, client, inputs="first", adapter="once")
        assert engine.begun.acquire(timeout=30)
        texts = ("poison", "a b", "a b c d")
        asked = [pool.submit(ask, client, inputs=text, adapter="once", top_k=1) for text in texts]
        while len(client.get("/metrics").text.split("ptv2_queue_texts 3.0")) < 2:
            time.sleep(0.01)
        engine.free.set()
        answers = [one.result() for one in asked]
    assert [status for status, _ in answers] == [500, 200, 200]
    assert len(engine.batches[1]) == 3  # together, and then each alone
    assert [found[0]["label"] for _, found in answers[1:]] == ["few", "many"]


def wait_for_queue(client, count):
    while f"ptv2_queue_texts {float(count)}" not in client.get("/metrics").text:
        time.sleep(0.01)


def test_a_full_queue_and_an_unloaded_adapter_are_told_and_others_go_on(client, engine):
    engine.free.clear()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(ask, client, inputs="a", adapter="twice")
        assert engine.begun.acquire(timeout=30)
        lost = pool.submit(ask, client, inputs=["a", "b"], adapter=["once", "twice"])
        wait_for_queue(client, 2)
        kept = pool.submit(ask, client, inputs=["a", "b", "c"], adapter="once")
        wait_for_queue(client, 5)
        status, error = ask(client, inputs=["a", "b", "c"], adapter="once")
        assert status == 429 and "6 texts of at most 8" in error["error"]
        assert ask(client, "/v1/adapters/unload", name="twice") == (200, {"unloaded": "twice"})
        status, error = lost.result(30)
        assert status == 404 and "'twice' was unloaded" in error["error"]
        wait_for_queue(client, 3)
        engine.free.set()
        assert kept.result(30)[0] == 200
        # Its own batch ran when its adapter went.
        assert running.result(30)[0] == 404
    assert ask(client, inputs="a", adapter="twice")[0] == 404


def test_adapters_come_from_under_the_root_alone(client, engine, root, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "good").write_text("")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "inside").symlink_to(root / "new")
    (root / "file-link").mkdir()
    (root / "file-link" / "good").symlink_to(tmp_path / "outside" / "good")
    outside = ("../outside", str(tmp_path / "outside"), "link", "file-link", "new/../../outside")
    for folder in (*outside, "nowhere", "new/good", "other", "a\0b", "a" * 4000):
        status, error = ask(client, "/v1/adapters/load", name="x", folder=folder)
        assert status == 422 and set(error) == {"error", "error_type"}, folder
    assert engine.names == ["once", "twice"]
    assert find_adapter(root, "inside") == find_adapter(root, str(root / "new")) == root / "new"
    assert ask(client, "/v1/adapters/load", name="x", folder="inside") == (200, {"loaded": "x"})
    assert ask(client, "/v1/adapters/load", name="x", folder="new")[0] == 409
    assert ask(client, inputs="a", adapter="x")[0] == 200
    assert ask(client, "/v1/adapters/unload", name="nobody")[0] == 404
    assert ask(client, "/v1/adapters/unload", name="x")[0] == 200
    assert 'adapter="x"' not in client.get("/metrics").text


def test_a_server_is_what_its_options_say(engine):
    """No updates without a root; with a key, nothing but the page without it."""
    with served(make_app(engine, ServeOptions(api_key=KEY))) as client:
        for path in ("/", "/health", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200
        for words in (None, KEY, "Bearer", f"Bearer {KEY}s", f"bearer {KEY}", "Bearer \xe9"):
            headers = {} if words is None else {"Authorization": words.encode("latin-1")}
            for path in ("/v1/models", "/metrics", "/predict", "/nowhere"):
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401 and answer.json()["error_type"] == "unauthorized"
        client.headers["Authorization"] = f"Bearer {KEY}"
        assert ask(client, inputs="a", adapter="once")[0] == 200
        assert ask(client, "/v1/adapters/unload", name="once")[0] == 404
        assert "load" not in str(client.get("/openapi.json").json()["paths"].keys())


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_queue", 0), ("max_wait_ms", float("nan")), ("max_batch_tokens", -1), ("api_key", " ")],
)
def test_bad_options_are_named(name, value):
    with pytest.raises(ValueError, match="PTV2_FAST_API_KEY" if name == "api_key" else name):
        ServeOptions(**{name: value})


def test_the_page_asks_this_server_alone(limited):
    answer = limited.get("/")
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    page = answer.text
    assert "://" not in page and "src=" not in page and "innerHTML" not in page
    assert page.count("<label for=") + page.count("label.htmlFor") == 3


def test_clients_that_go_leave_the_queue(client, engine):
    engine.free.clear()
    port = client.base_url.port
    body = json.dumps({"inputs": "a", "adapter": "once"}).encode()
    head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    sockets = []
    for _ in range(3):
        one = socket.create_connection(("127.0.0.1", port))
        one.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        sockets.append(one)
    half = socket.create_connection(("127.0.0.1", port))  # goes within its body
    half.sendall(f"{head}Content-Length: 100\r\n\r\n".encode() + body)
    assert engine.begun.acquire(timeout=30)
    running = len(engine.batches[0])
    wait_for_queue(client, 3 - running)
    for one in (*sockets, half):
        one.close()
    wait_for_queue(client, 0)
    engine.free.set()
    # Its place is free again.
    assert ask(client, inputs=["a"] * 4, adapter="once")[0] == 200
    assert ask(client, inputs=["a"] * 4, adapter="once")[0] == 200
    assert sum(map(len, engine.batches)) == running + 8


def test_what_was_taken_is_answered_when_the_server_ends(engine):
    engine.free.clear()
    with ThreadPoolExecutor() as pool:
        with served(make_app(engine, ServeOptions(max_wait_ms=0, max_batch_tokens=2))) as client:
            asked = [pool.submit(ask, client, inputs="a b", adapter="once") for _ in range(6)]
            while client.get("/metrics").text.count("ptv2_queue_texts 5.0") == 0:
                time.sleep(0.01)
            client.server.should_exit = True
            threading.Timer(0.2, engine.free.set).start()
            assert [one.result(30)[0] for one in asked] == [200] * 6
            with pytest.raises(httpx.ConnectError):
                while True:
                    httpx.get(client.base_url.join("/health"), trust_env=False)
