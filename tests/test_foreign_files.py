"""Run folders from elsewhere: no code of theirs runs, nothing is written, no number is believed."""

import ast
import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import ptv2_fast
from ptv2_fast import cli
from tests.models import one_thread  # noqa: F401
from tests.tiny_run import save_tiny_model, write_reviews

METHODS = ("p-tuning-v2", "fine-tuning", "prompt-tuning", "lora")
PACKAGE = Path(ptv2_fast.__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a run of each method."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_reviews(folder / "train.csv", 8)
    for method in METHODS:
        options = [
            "--task", "text-classification", "--train-file", data, "--validation-file", data,
            "--model", save_tiny_model(folder / "model"), "--num-virtual-tokens", "4",
            "--max-steps", "1", "--no-progress", "--method", method,
            "--output", str(folder / method),
        ]  # fmt: skip
        assert cli.main(["train", *options]) == 0
    return folder


@pytest.fixture
def copied(runs, tmp_path):
    """Copies a method's run to where it may be changed."""

    def copy(method: str) -> Path:
        return Path(shutil.copytree(runs / method, tmp_path / "run"))

    return copy


def refuse(run: Path, capsys, monkeypatch) -> str:
    """What `predict` says on stderr, in one line, while stdin agrees to everything."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    capsys.readouterr()
    assert cli.main(["predict", "--run", str(run)]) == cli.BAD_INPUT
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    return shown.err


def plant_code(folder: Path, automatic: dict, **fields) -> Path:
    """Make a folder's files ask for code that leaves a mark; returns where the mark would be."""
    mark = folder / "mark"
    (folder / "foreign.py").write_text(f"open({str(mark)!r}, 'w')\nclass Foreign: pass\n")
    for name in ("tokenizer_config.json", "config.json"):
        path = folder / name
        content = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**content, **fields, "auto_map": automatic}))
    return mark


def test_code_in_a_tokenizer_folder_does_not_run(copied, capsys, monkeypatch):
    run = copied("p-tuning-v2")
    classes = {"AutoTokenizer": ["foreign.Foreign", "foreign.Foreign"]}
    mark = plant_code(run / "tokenizer", classes, tokenizer_class="Foreign", model_type="foreign")
    refuse(run, capsys, monkeypatch)
    assert not mark.exists()


def test_code_in_the_folder_of_the_pretrained_model_does_not_run(copied, capsys, monkeypatch):
    run = copied("p-tuning-v2")
    edit(run / "config.json", lambda c: c["model"].update(model=str(run / "base")))
    shutil.copytree(run.parent.joinpath("run", "tokenizer"), run / "base")
    classes = {"AutoConfig": "foreign.Foreign", "AutoModel": "foreign.Foreign"}
    mark = plant_code(run / "base", classes, model_type="foreign")
    refuse(run, capsys, monkeypatch)
    assert not mark.exists()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def change_tensors(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


LAYER = "encoder.layer.1.output.dense.weight"
DAMAGE = {
    "weights cut": lambda base: cut(base / "model.safetensors"),
    "weights gone": lambda base: change_tensors(
        base / "model.safetensors", lambda tensors: tensors.pop(LAYER)
    ),
    "weights NaN": lambda base: change_tensors(
        base / "model.safetensors", lambda tensors: tensors[LAYER].view(-1)[3].fill_(math.nan)
    ),
    "a size that is text": lambda base: edit(
        base / "config.json", lambda c: c.update(hidden_size="x")
    ),
    "a size of 2^40": lambda base: edit(
        base / "config.json", lambda c: c.update(vocab_size=2**40)
    ),
    "a list for a model": lambda base: (base / "config.json").write_text("[1]"),
}  # fmt: skip
TOKENIZER_DAMAGE = {
    "tokenizer cut": lambda folder: cut(folder / "tokenizer.json"),
    "an added token of text": lambda folder: edit(
        folder / "tokenizer.json", lambda c: c["added_tokens"][0].update(special="yes")
    ),
    "a special token that is a number": lambda folder: edit(
        folder / "tokenizer_config.json", lambda c: c.update(sep_token=7)
    ),
    "names of inputs": lambda folder: edit(
        folder / "tokenizer_config.json", lambda c: c.update(model_input_names=["%s", "input_ids"])
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_pretrained_model_is_named_in_one_line(damage, runs, copied, capsys, monkeypatch):
    run = copied("p-tuning-v2")
    shutil.copytree(runs / "model", run / "base")
    edit(run / "config.json", lambda c: c["model"].update(model=str(run / "base")))
    DAMAGE[damage](run / "base")
    message = refuse(run, capsys, monkeypatch)
    assert str(run / "base") in message and len(message) < 600


@pytest.mark.parametrize("damage", TOKENIZER_DAMAGE)
def test_a_damaged_tokenizer_is_named_in_one_line(damage, copied, capsys, monkeypatch):
    run = copied("p-tuning-v2")
    TOKENIZER_DAMAGE[damage](run / "tokenizer")
    message = refuse(run, capsys, monkeypatch)
    assert str(run / "tokenizer") in message and len(message) < 600


def test_a_kernel_of_the_hub_is_no_attention(runs, copied, capsys, monkeypatch):
    run = copied("p-tuning-v2")
    shutil.copytree(runs / "model", run / "base")
    edit(run / "config.json", lambda c: c["model"].update(model=str(run / "base")))
    for name in ("attn_implementation", "_attn_implementation"):
        edit(run / "base" / "config.json", lambda c, n=name: c.update({n: "someone/attention"}))
        # Some versions of transformers heed one of the two names only.
        if AutoConfig.from_pretrained(run / "base")._attn_implementation == "someone/attention":
            assert "without foreign code" in refuse(run, capsys, monkeypatch)


def test_a_pickle_in_the_place_of_a_model_is_not_opened(copied, capsys, monkeypatch):
    run = copied("fine-tuning")
    torch.save(load_file(run / "model" / "model.safetensors"), run / "model" / "pytorch_model.bin")
    (run / "model" / "model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", lambda *args, **unused: pytest.fail(f"opened {args}"))
    assert "model.safetensors" in refuse(run, capsys, monkeypatch)


def test_a_missing_tokenizer_folder_is_not_looked_for_on_the_hub(copied, capsys, monkeypatch):
    run = copied("p-tuning-v2")
    shutil.rmtree(run / "tokenizer")
    monkeypatch.chdir(run.parent)
    assert "tokenizer: expected a folder" in refuse(Path("run"), capsys, monkeypatch)


def test_every_loader_refuses_foreign_code_and_pickles():
    """As written in the sources, so that a new call is found as well."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
                assert not names & {"pickle", "joblib", "dill", "cloudpickle", "marshal"}, where
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            called = ast.unparse(node.func)
            if node.func.attr == "from_pretrained" and called != "nn.Embedding.from_pretrained":
                assert given.get("trust_remote_code") == "False", where
            if called == "torch.load":
                assert given.get("weights_only") == "True", where


def test_predicting_writes_nothing_where_a_run_says(copied, tmp_path):
    run = copied("p-tuning-v2")
    edit(run / "config.json", lambda c: c["data"].update(feature_cache=str(tmp_path / "cache")))
    edit(run / "config.json", lambda c: c["data"].update(preprocessing_num_workers=3))
    before = sorted(run.rglob("*"))
    assert cli.main(["predict", "--run", str(run), "--text", "good"]) == 0
    assert not (tmp_path / "cache").exists() and sorted(run.rglob("*")) == before


WEIGHTS = {
    "p-tuning-v2": "adapter/ptv2_adapter.safetensors",
    "fine-tuning": "model/model.safetensors",
    "prompt-tuning": "trained.safetensors",
    "lora": "trained.safetensors",
}


@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_are_not_finite_predict_nothing(method, copied, capsys, monkeypatch):
    run = copied(method)
    change_weights(run / WEIGHTS[method], lambda t: t.fill_(math.nan))
    message = refuse(run, capsys, monkeypatch)
    assert "finite" in message and "classifier.bias" in message


@pytest.mark.parametrize("method", ["p-tuning-v2", "prompt-tuning", "lora"])
def test_another_dtype_is_not_cast(method, copied, capsys, monkeypatch):
    run = copied(method)
    change_weights(run / WEIGHTS[method], lambda t: t.to(torch.float64))
    assert "classifier.bias of dtype torch.float32" in refuse(run, capsys, monkeypatch)


def test_a_model_without_its_head_is_not_given_a_random_one(copied, capsys, monkeypatch):
    run = copied("fine-tuning")
    change_weights(run / WEIGHTS["fine-tuning"], lambda t: None)
    assert "missing ['classifier.bias']" in refuse(run, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("method", "name"), [("prompt-tuning", "num_virtual_tokens"), ("lora", "lora_rank")]
)
def test_sizes_in_a_config_are_not_believed(method, name, copied, capsys, monkeypatch):
    run = copied(method)
    edit(run / "config.json", lambda c: c["model"].update({name: 10**12}))
    assert f"{name} 1000000000000, got [" in refuse(run, capsys, monkeypatch)


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_weights(path: Path, change) -> None:
    """Change the head's bias; None drops it."""
    tensors = load_file(path)
    bias = change(tensors.pop("classifier.bias"))
    rest = {} if bias is None else {"classifier.bias": bias}
    save_file({**tensors, **rest}, path, {"format": "pt"})
