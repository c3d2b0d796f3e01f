"""The server over a bank of trained adapters: what `predict` says, under load as well."""

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from ptv2_fast import cli
from ptv2_fast.serving import server
from ptv2_fast.serving.application import make_app
from ptv2_fast.serving.engine import BankEngine
from ptv2_fast.serving.errors import RequestError
from ptv2_fast.serving.options import ServeOptions
from ptv2_fast.tasks.task import Task
from ptv2_fast.training.bank import AdapterBank
from ptv2_fast.training.models import load_run
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.pretrained import load_encoder
from ptv2_fast.training.run import train
from ptv2_fast.training.scoring import predict_texts
from tests.models import one_thread  # noqa: F401
from tests.serving_fakes import served
from tests.squad_files import question, write_squad
from tests.tiny_run import MAX_POSITIONS, save_tiny_model, write_conll, write_reviews

TEXTS = {
    "tags": ["Anna lives in Oslo.", "\U0001f600 Bob", "Berlin"],
    "film": ["the film was good", "bad", "a film and a film was it"],
    "grade": ["the film was good", "bad"],
    "answers": [["in", "Anna lives in Oslo."], ["the", "Bob works in Berlin ."]],
    "choices": [["Bob sleeps.", "bad", "The film was good."], ["a", "b", "it was good", "in"]],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a run of each task on one tiny encoder."""
    folder = tmp_path_factory.mktemp("served")
    model = save_tiny_model(folder / "model")
    rows = [{"text": "Anna loves it.", "choices": ["It was good.", "bad"], "label": n % 2}
            for n in range(4)]  # fmt: skip
    (folder / "choices.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "grade.csv").write_text("text,label\nthe film was good,1.5\nbad,-2\n")
    squad = write_squad(folder / "squad.json", [question(number) for number in range(4)])
    for name, values in {
        "tags": {"task": "token-classification", "train_file": write_conll(folder / "t.txt", 8)},
        "film": {"task": "text-classification", "train_file": write_reviews(folder / "f.csv", 8)},
        "grade": {"task": "text-classification", "train_file": str(folder / "grade.csv"),
                  "regression": True},
        "answers": {"task": "question-answering", "train_file": squad, "doc_stride": 4},
        "choices": {"task": "multiple-choice", "train_file": str(folder / "choices.jsonl")},
    }.items():  # fmt: skip
        common = {"model": model, "num_virtual_tokens": 4, "max_steps": 1, "progress": False,
                  "init": "tokens"}  # fmt: skip
        train(prepare(RunConfig.from_dict({**common, **values}), folder / name))
    return folder


@pytest.fixture(scope="module")
def expected(runs):
    """What `predict` prints for the texts of each adapter."""
    lines = {}
    for name, texts in TEXTS.items():
        typed = [text if isinstance(text, str) else "\t".join(text) for text in texts]
        run = load_run(runs / name)
        lines[name] = [line for text in typed for line in predict_texts(run, [text])]
    return lines


def engine_of(runs, *names) -> BankEngine:
    engine = BankEngine(AdapterBank(load_encoder(str(runs / "model"))), "tiny", 1000)
    for name in names:
        engine.load(name, runs / name)
    return engine


@pytest.fixture(scope="module")
def client(runs):
    options = ServeOptions(max_wait_ms=20, adapter_root=runs)
    with served(make_app(engine_of(runs, *TEXTS), options)) as client:
        yield client


def ask(client, path="/predict", **body):
    answer = client.post(path, json=body)
    return answer.status_code, answer.json()


def close(value):
    return pytest.approx(value, rel=1e-4, abs=1e-6)


def check(name, found, line):
    """Compare an answer of /predict with what `predict` prints."""
    if name == "tags":
        spans = [
            {"entity_group": one["type"], "word": one["text"], "start": one["start"],
             "end": one["end"], "score": close(one["score"])} for one in line["entities"]
        ]  # fmt: skip
        assert found == spans
    elif name == "answers":
        best = [{"answer": one["text"], "score": close(one["probability"])}
                for one in line["n_best"]]  # fmt: skip
        assert found[: len(best)] == best
    elif name == "grade":
        assert found == [{"label": "score", "score": close(line["score"])}]
    else:
        assert found[0]["label"] == line["label"] and found[0]["score"] == close(line["score"])
        assert sum(one["score"] for one in found) == pytest.approx(1)


def test_a_mixed_request_gives_what_each_adapter_predicts(client, expected):
    pairs = [(name, index) for name, texts in TEXTS.items() for index in range(len(texts))]
    random.Random(0).shuffle(pairs)
    inputs = [TEXTS[name][index] for name, index in pairs]
    status, found = ask(client, inputs=inputs, adapter=[name for name, _ in pairs])
    assert status == 200
    for (name, index), one in zip(pairs, found, strict=True):
        check(name, one, expected[name][index])
    # One text that several adapters read.
    status, found = ask(client, inputs="the film was good", adapter=["film", "grade", "tags"])
    check("film", found[0], expected["film"][0])
    check("grade", found[1], expected["grade"][0])
    words = ask(client, inputs="Anna lives in Oslo.", adapter="tags", aggregate=False)[1]
    line = expected["tags"][0]
    assert [one["entity"] for one in words] == line["tags"]
    assert [(one["start"], one["end"]) for one in words] == line["offsets"]
    choice = ask(client, inputs=[TEXTS["choices"][1]], adapter="choices", top_k=1)[1][0][0]
    assert choice["choice"] == expected["choices"][1]["choice"]


def test_the_v1_endpoints_give_the_same(client, expected):
    _, found = ask(client, "/v1/classify", model="film", input=TEXTS["film"])
    for data, line in zip(found["data"], expected["film"], strict=True):
        assert data["label"] == line["label"] and max(data["probs"]) == close(line["score"])
    assert found["usage"]["prompt_tokens"] == 6 + 3 + 9
    _, found = ask(client, "/v1/classify", model="grade", input="bad")
    assert found["data"][0] == {
        "index": 0, "label": "score", "probs": [close(expected["grade"][1]["score"])],
        "num_classes": 1,
    }  # fmt: skip
    _, found = ask(client, "/v1/token_classify", model="tags", input=TEXTS["tags"])
    for data, line in zip(found["data"], expected["tags"], strict=True):
        assert data["words"] == line["words"] and data["labels"] == line["tags"]
        assert data["scores"] == [close(score) for score in line["scores"]]
        assert len(data["entities"]) == len(line["entities"])
    for path, name in (("/v1/classify", "tags"), ("/v1/token_classify", "answers")):
        text = TEXTS[name][0]
        assert ask(client, path, model=name, input=[text])[0] == 422
    facts = {one["id"]: one for one in client.get("/v1/models").json()["data"]}
    assert facts["tags"]["labels"] == ["B-LOC", "B-PER", "O"]
    assert facts["grade"]["task"] == "text-regression" and facts["grade"]["labels"] == []
    assert facts["answers"]["inputs"] == ["question", "context"]


@pytest.mark.parametrize(
    ("status", "words", "name", "text"),
    [
        (413, f"at most {MAX_POSITIONS} tokens", "film", "film " * 30),
        (413, f"at most {MAX_POSITIONS} tokens", "tags", "Anna " * 30),
        (422, "expected text, got 2 texts", "film", ["good", "bad"]),
        (422, "question and context, got 3 texts", "answers", ["a", "b", "c"]),
        (422, "text and choices, got 2 texts", "choices", ["a", "b"]),
        (422, "no tabs", "answers", ["a\tb", "c"]),
        (422, "a question and its context", "answers", "without a context"),
        (400, "text 1: expected text, got an empty one", "answers", ["a", "  "]),
    ],
)
def test_texts_that_do_not_fit_are_refused(client, status, words, name, text):
    found, error = ask(client, inputs=[text], adapter=name)
    assert found == status and words in error["error"]
    if status == 413:
        assert ask(client, inputs=[text], adapter=name, truncate=True)[0] == 200


def test_rows_of_an_adapter_that_went_fail_and_others_run(runs, expected):
    engine = engine_of(runs, "film", "tags")
    rows = engine.prepare(["bad", "bad", "Anna lives in Oslo."], ["film", "film", "tags"], False)
    engine.unload("film")
    for _ in range(2):  # also when another one has its name
        lost, also, kept = engine.run(rows)
        assert isinstance(lost, RequestError) and "was unloaded" in lost.detail
        assert isinstance(also, RequestError) and kept.line["tags"] == expected["tags"][0]["tags"]
        if "film" not in engine.names:
            engine.load("film", runs / "grade")
    with pytest.raises(RequestError, match="expected one of those"):
        engine.prepare(["bad"], ["gone"], False)


def test_runs_are_what_is_loaded(client):
    status, error = ask(client, "/v1/adapters/load", name="new", folder="model")
    assert status == 422 and "expected a run folder" in error["error"]
    status, _ = ask(client, "/v1/adapters/load", name="new", folder="film")
    assert status == 200 and ask(client, inputs="bad", adapter="new")[0] == 200
    assert ask(client, "/v1/adapters/unload", name="new")[0] == 200


def test_the_command_serves_what_it_is_told(runs, monkeypatch, capsys, expected):
    begun = []
    monkeypatch.setattr(server, "run", lambda *given: begun.append(given))
    monkeypatch.setenv("PTV2_FAST_API_KEY", "key")
    named = ["--adapter", f"a={runs / 'film'}", "--adapter", f"b={runs / 'tags'}"]
    assert cli.main(["serve", *named, "--port", "0", "--max-batch-tokens", "64"]) == 0
    ((app, host, port),) = begun
    assert (host, port) == ("127.0.0.1", 0)
    with served(app) as client:
        assert ask(client, inputs="bad", adapter="a")[0] == 401
        client.headers["Authorization"] = "Bearer key"
        check("film", ask(client, inputs="bad", adapter="a")[1], expected["film"][1])
        assert ask(client, "/v1/adapters/unload", name="a")[0] == 404
    capsys.readouterr()
    for words, message in (
        ([], "adapter: expected at least one"),
        (["--adapter", "film"], "expected name=folder"),
        (["--adapter", f"../x={runs / 'film'}"], "expected name=folder"),
        ([*named, *named], "'a' twice"),
        (["--adapter", f"a={runs / 'model'}"], "expected a run folder"),
        ([*named, "--adapter-root", str(runs)], "--allow-adapter-updates"),
        ([*named, "--allow-adapter-updates"], "adapter_root"),
        ([*named, "--max-queue", "0"], "max_queue"),
        ([*named, "--port", "70000"], "port"),
        ([*named, "--model", str(runs / "film")], "model"),
    ):
        assert cli.main(["serve", *words]) == cli.BAD_INPUT
        line = capsys.readouterr().err.splitlines()[-1]
        assert message in line and line.startswith("ptv2-fast serve: error:")


def test_predict_serves_rows_of_several_adapters(runs, monkeypatch, capsys, expected, tmp_path):
    """In the order of the rows, each by the adapter that it names, or by all."""
    monkeypatch.setattr(Task, "part_rows", 2)
    named = ["predict"]
    for name in ("film", "grade", "tags"):
        named += ["--adapter", f"{name}={runs / name}"]
    bad, words = {"text": "bad", "tokens": None}, {"text": None, "tokens": ["Berlin"]}
    rows = [
        {**bad, "adapter": "grade"},
        {**words, "adapter": "tags"},
        {**bad, "adapter": "grade"},
        {**bad, "adapter": ["film", "film"]},
        {"text": "bad", "tokens": ["Berlin"]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert cli.main([*named, "--data", str(file)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    order = ["grade", "tags", "grade", "film", "film", "grade", "tags"]
    assert [line.pop("adapter") for line in lines] == order
    for name, line in zip(order, lines, strict=True):
        wanted = expected[name][2 if name == "tags" else 1]
        assert list(line) == list(wanted)
        assert line.get("label") == wanted.get("label") and line.get("tags") == wanted.get("tags")
        assert line.get("score") == (close(wanted["score"]) if "score" in wanted else None)
    assert cli.main([*named, "--text", "bad", "--text", "Berlin"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["adapter"] for line in lines] == ["film", "grade", "tags"] * 2
    table = tmp_path / "rows.csv"
    table.write_text("text,adapter\nbad,film\nbad,\n")
    assert cli.main(["predict", *named[1:5], "--data", str(table)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["adapter"] for line in lines] == ["film", "film", "grade"]
    file.write_text("\n".join(json.dumps({"text": "bad", "adapter": n}) for n in ("film", "gone")))
    nested = tmp_path / "nested.jsonl"
    nested.write_text(json.dumps({"text": "bad", "adapter": [["film"]]}))
    for words, message in (
        ([*named, "--data", str(file)], "rows.jsonl row 2: expected some of"),
        ([*named, "--data", str(nested)], "nested.jsonl row 1: expected some of"),
        ([*named, "--run", str(runs / "film"), "--text", "a"], "--run or --adapter"),
        (["predict", "--text", "a"], "expected --run"),
        ([*named, "--text", " "], "typed text 1: expected text"),
    ):
        assert cli.main(words) == cli.BAD_INPUT
        assert message in capsys.readouterr().err.splitlines()[-1]


class Load:
    """Clients that ask for texts, do harm or change adapters until they are told to end.

    Attributes:
        answered: how many requests got what was expected of them, by kind.
        wrong: what was not.
        seconds: of each good answer.
        texts: in good answers.
    """

    def __init__(self, address, expected):
        self.address, self.expected = address, expected
        self.ended, self.answered, self.wrong = threading.Event(), {}, []
        self.seconds, self.texts = [], 0

    def run(self, seconds, clients):
        kinds = itertools.cycle([self.good, self.good, self.good, self.bad, self.killed])
        threads = [threading.Thread(target=self._repeat, args=(next(kinds), seed))
                   for seed in range(clients - 1)]  # fmt: skip
        threads.append(threading.Thread(target=self._repeat, args=(self.change, clients)))
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        self.ended.set()
        for thread in threads:
            thread.join(60)

    def _repeat(self, act, seed):
        choose = random.Random(seed)
        with httpx.Client(base_url=self.address, timeout=60, trust_env=False) as client:
            while not self.ended.is_set():
                try:
                    act(client, choose)
                    self.answered[act.__name__] = self.answered.get(act.__name__, 0) + 1
                except Exception as error:
                    self.wrong.append(f"{act.__name__}: {error!r}")

    def good(self, client, choose):
        names = choose.choices(list(TEXTS), k=choose.randint(1, 6))
        places = [choose.randrange(len(TEXTS[name])) for name in names]
        inputs = [TEXTS[name][place] for name, place in zip(names, places, strict=True)]
        begun = time.monotonic()
        status, found = ask(client, inputs=inputs, adapter=names)
        self.seconds.append(time.monotonic() - begun)
        self.texts += len(inputs)
        assert status == 200, found
        for name, place, one in zip(names, places, found, strict=True):
            check(name, one, self.expected[name][place])

    def bad(self, client, choose):
        body, wanted = choose.choice([
            ({"inputs": "a", "adapter": "nobody"}, 404), ({"inputs": 3}, 422),
            ({"inputs": "film " * 50, "adapter": "film"}, 413),
            ({"inputs": "x" * 3_000_000, "adapter": "film"}, 413),
            ({"inputs": " ", "adapter": "film"}, 400),
        ])  # fmt: skip
        assert ask(client, **body)[0] == wanted

    def killed(self, client, choose):
        body = json.dumps({"inputs": ["a film"] * 4, "adapter": "film"}).encode()
        length = len(body) + choose.choice([0, 0, 10])
        head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address) as one:
            one.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + body)
            time.sleep(choose.choice([0, 0.01, 0.05]))

    def change(self, client, choose):
        """What asks for an adapter that comes and goes is answered, or told so."""
        status, found = ask(client, "/v1/adapters/load", name="guest", folder="film")
        assert status == 200, found
        check("film", ask(client, inputs="bad", adapter="guest")[1], self.expected["film"][1])
        answers = []
        asking = threading.Thread(target=lambda: answers.append(httpx.post(
            f"{self.address}/predict", json={"inputs": ["bad"] * 30, "adapter": "guest"},
            timeout=60, trust_env=False,
        )))  # fmt: skip
        asking.start()
        time.sleep(choose.choice([0, 0.005, 0.02]))
        status, found = ask(client, "/v1/adapters/unload", name="guest")
        assert status == 200, found
        asking.join(60)
        assert answers[0].status_code in (200, 404), answers[0].text


def check_load(load, client):
    assert load.wrong == []
    assert set(load.answered) == {"good", "bad", "killed", "change"}
    text = client.get("/metrics").text
    assert "ptv2_queue_texts 0.0" in text and 'status="500"' not in text
    assert ask(client, inputs=["bad"] * 64, adapter="film")[0] == 200


def test_mixed_load_is_answered_once_and_right(client, expected):
    load = Load(str(client.base_url), expected)
    load.run(3, 16)
    check_load(load, client)


@pytest.fixture
def command(runs):
    """The command in a process of its own, and its address."""
    words = [sys.executable, "-m", "ptv2_fast.cli", "serve", "--port", "0",
             "--allow-adapter-updates", "--adapter-root", str(runs)]  # fmt: skip
    for name in TEXTS:
        words += ["--adapter", f"{name}={runs / name}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process, next(line.split()[-1] for line in process.stderr if "serving on" in line)
        finally:
            process.kill()


@pytest.mark.slow
def test_a_minute_of_mixed_load_takes_no_more_memory(command, expected, capsys):
    """And a signal ends the server when what it took is answered."""
    process, address = command

    def resident() -> float:
        pages = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20  # MiB

    with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        # Libraries keep what they made for shapes that they have met.
        Load(address, expected).run(60, 16)
        before, load = resident(), Load(address, expected)
        load.run(60, 16)
        after, waits = resident(), sorted(load.seconds)
        check_load(load, client)
        body = {"inputs": ["a film"] * 64, "adapter": "film"}
        asked = []
        asking = threading.Thread(target=lambda: asked.append(ask(client, **body)))
        asking.start()
        time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        asking.join(60)
    assert process.wait(60) == -signal.SIGTERM and asked[0][0] == 200
    assert process.stderr.read() == ""
    p50, p99 = (waits[int(len(waits) * part)] for part in (0.5, 0.99))
    with capsys.disabled():
        print(f"\n{load.answered}, {load.texts / 60:.0f} texts/s, p50 {p50:.3f} s, p99 {p99:.3f} s")
        print(f"{before:.0f} -> {after:.0f} MiB")
    assert after <= 1.05 * before
