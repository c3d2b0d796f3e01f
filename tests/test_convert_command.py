"""`ptv2-fast convert` and `ptv2-fast card`, and the upload of a run."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForTokenClassification

import ptv2_fast
from ptv2_fast import cli
from ptv2_fast.adapters import import_adapter
from ptv2_fast.adapters.convert import HEADS
from ptv2_fast.cli.convert import _HEADS
from ptv2_fast.training import card
from tests.command_line import fails_with_one_line
from tests.models import one_thread  # noqa: F401
from tests.tiny_run import save_tiny_model, write_reviews


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a model, an adapter of PEFT for it and a run on it."""
    folder = tmp_path_factory.mktemp("made")
    data, model = write_reviews(folder / "train.csv", 8), save_tiny_model(folder / "model")
    plain = AutoModelForTokenClassification.from_pretrained(model, num_labels=3)
    config = peft.PrefixTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=4)
    peft.get_peft_model(plain, config).save_pretrained(folder / "peft")
    words = [
        "--task", "text-classification", "--train-file", data, "--validation-file", data,
        "--model", model, "--method", "p-tuning-v2", "--num-virtual-tokens", "4",
        "--prefix-projection", "--max-steps", "1",
        "--seed", "7", "--position-offset", "prefix", "--init", "normal", "--no-progress",
        "--output", str(folder / "run"),
    ]  # fmt: skip
    assert cli.main(["train", *words]) == 0
    return folder


def convert(*words) -> None:
    assert cli.main(["convert", *map(str, words)]) == 0


def test_a_folder_of_peft_comes_in_and_goes_out(made, tmp_path):
    convert(made / "peft", tmp_path / "ours", "--labels", "O,PER,LOC")
    loaded = ptv2_fast.load(tmp_path / "ours")
    assert loaded.labels == ["O", "PER", "LOC"]
    plain = AutoModelForTokenClassification.from_pretrained(made / "model", num_labels=3)
    words = loaded.tokenizer("anna lives in oslo", return_tensors="pt")
    expected = import_adapter(plain, made / "peft")(**words).logits
    assert torch.equal(loaded.model(**words).logits, expected)
    convert(tmp_path / "ours", tmp_path / "back", "--to", "peft")
    before, after = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (made / "peft", tmp_path / "back")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_run_is_folded_and_goes_out_to_peft(made, tmp_path):
    convert(made / "run", tmp_path / "folded", "--fold")
    description = json.loads((tmp_path / "folded" / "ptv2_config.json").read_text())
    assert description["prefix_config"]["prefix_projection"] is False
    convert(made / "run", tmp_path / "peft", "--to", "peft")
    table = load_file(tmp_path / "peft" / "adapter_model.safetensors")["prompt_embeddings"]
    folded = load_file(tmp_path / "folded" / "ptv2_adapter.safetensors")
    assert torch.equal(table, folded["prefix_encoder.embedding.weight"])


def test_what_a_state_dict_does_not_say_is_asked_for(made, tmp_path, capsys):
    base = load_file(made / "model" / "model.safetensors")
    shapes = {
        "prefix_encoder.embedding.weight": (4, 16),
        "prefix_encoder.trans.0.weight": (8, 16),
        "prefix_encoder.trans.0.bias": (8,),
        "prefix_encoder.trans.2.weight": (64, 8),
        "prefix_encoder.trans.2.bias": (64,),
        "classifier.weight": (2, 16),
        "classifier.bias": (2,),
    }
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    source, target = tmp_path / "trained.safetensors", tmp_path / "ours"
    save_file(tensors, source)
    words = ["convert", str(source), str(target)]
    assert "give it as --model" in fails_with_one_line(words, capsys)
    words += ["--model", str(made / "model")]
    assert "give it as --head" in fails_with_one_line(words, capsys)
    words += ["--head", "sequence"]
    for labels in ("a", "a,a", "a,"):
        message = fails_with_one_line([*words, "--labels", labels], capsys)
        assert "labels: expected 2 different names" in message
    poor = tmp_path / "poor"
    shutil.copytree(made / "model", poor)
    rest = {name: tensor for name, tensor in base.items() if "pooler" not in name}
    save_file(rest, poor / "model.safetensors", {"format": "pt"})
    message = fails_with_one_line([*words, "--model", str(poor)], capsys)
    assert "missing ['bert.pooler.dense.bias'" in message and not target.exists()
    convert(*words[1:], "--fold")
    loaded = ptv2_fast.load(target)
    assert (
        loaded.labels == ["LABEL_0", "LABEL_1"] and loaded.model.prefix_encoder.projection is None
    )
    capsys.readouterr()
    assert "a new or empty folder" in fails_with_one_line(words, capsys)


def test_sources_that_are_none_are_told_apart(made, tmp_path, capsys):
    shutil.copytree(made / "peft", made / "nothing said")
    (made / "nothing said" / "adapter_config.json").unlink()
    (tmp_path / "file").write_text("")
    words = ["convert", str(made / "peft"), str(tmp_path / "file")]
    assert "target: expected a folder, got the file" in fails_with_one_line(words, capsys)
    target = str(tmp_path / "out")
    for source, options, message in (
        (made / "nowhere", [], "no such file or folder"),
        (made / "peft", ["--to", "peft"], "an adapter of ptv2-fast or a run"),
        (made / "run", [], "expected --to or --fold"),
        (made / "model", ["--model", "m"], "expected one tensor prefix_encoder.embedding.weight"),
        (made / "nothing said", [], "PEFT and of the package adapters have an adapter_config.json"),
    ):
        assert message in fails_with_one_line(["convert", str(source), target, *options], capsys)
    assert not (tmp_path / "out").exists()


def test_the_command_knows_the_heads():
    assert tuple(HEADS) == _HEADS
    for ending in HEADS.values():
        assert hasattr(transformers, f"AutoModel{ending.removeprefix('Model')}")


def test_a_card_says_what_the_run_found(made, tmp_path):
    run = shutil.copytree(made / "run", tmp_path / "run")
    assert cli.main(["card", "--run", str(run)]) == 0
    report = json.loads((run / "report.json").read_text())
    written = huggingface_hub.ModelCard.load(run / "README.md")
    found = written.data
    assert found.pipeline_tag == "text-classification" and found.library_name == "ptv2-fast"
    assert found.base_model is None and "p-tuning-v2" in found.tags  # a folder is no name
    scores = {(s.dataset_split, s.metric_type): s.metric_value for s in found.eval_results}
    assert scores == {
        (split, name): value
        for split, values in report["metrics"].items()
        for name, value in values.items()
    }
    assert "- seed: 7" in written.text and "--seed 7 " in written.text
    assert str(made) not in (run / "README.md").read_text()
    edit(run / "report.json", lambda c: c.update(model="google-bert/bert-base-cased", task="rte"))
    edit(run / "config.json", lambda c: c["data"].update(task="rte"))
    found = huggingface_hub.ModelCard.load(card.write_card(run)).data
    assert found.base_model == "google-bert/bert-base-cased"
    assert found.base_model_relation == "adapter" and found.datasets == ["aps/super_glue"]
    assert found.eval_results[0].dataset_config == "rte"
    folder = str(made / "reviews")
    edit(run / "config.json", lambda c: c["data"].update(dataset=folder, train_file=None))
    text = card.write_card(run).read_text()
    assert "- data: reviews\n" in text and str(made) not in text


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


class Hub:
    """Stands for the API of the hub: a repository is a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, []

    def __call__(self, token=None):
        self.calls.append({"token": token})
        return self

    def create_repo(self, repo_id, **options):
        self.calls.append({"repo_id": repo_id, **options})

    def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns):
        names = [str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file()]
        for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
            (self.folder / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder_path / name, self.folder / repo_id / name)
        return f"https://hub/{repo_id}"

    def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo):
        (self.folder / repo_id / path_in_repo).write_bytes(path_or_fileobj)


def test_an_uploaded_run_opens_elsewhere(made, tmp_path, monkeypatch):
    run, hub = shutil.copytree(made / "run", tmp_path / "run"), Hub(tmp_path / "hub")
    kept = run / "checkpoints" / "checkpoint-1"
    kept.mkdir(parents=True)
    for file in (kept / "model.safetensors", run / "adapter" / "training_args.bin"):
        file.write_text("")
    label = "/people/person"  # which is no path
    edit(run / "config.json", lambda c: c["found"].update(labels=[label, "bad"]))
    edit(run / "config.json", lambda c: c["model"].update(start_from=str(made / "first")))
    edit(run / "report.json", lambda c: c.update(started_from={"folder": str(made / "first")}))
    monkeypatch.setattr(card, "HfApi", hub)
    with pytest.raises(ValueError, match="base_model: expected the name on the hub"):
        card.push_to_hub(run, "user/reviews")
    (run / "notes").symlink_to(made / "train.csv")
    with pytest.raises(ValueError, match="expected no links out of the folder"):
        card.push_to_hub(run, "user/reviews", base_model="user/base")
    (run / "notes").unlink()
    assert not hub.calls
    # Stands for what has this name on the hub.
    shutil.copytree(made / "model", tmp_path / "user" / "base")
    monkeypatch.chdir(tmp_path)
    named = {"private": True, "token": "secret", "base_model": "user/base"}
    assert card.push_to_hub(run, "user/reviews", **named) == "https://hub/user/reviews"
    made_repository = {"repo_id": "user/reviews", "private": True, "exist_ok": True}
    assert hub.calls == [{"token": "secret"}, made_repository]
    copied = tmp_path / "hub" / "user" / "reviews"
    written = huggingface_hub.ModelCard.load(copied / "README.md")
    assert written.data.base_model == "user/base" and "P-Tuning v2 on user/base," in written.text
    assert "--model user/base " in written.text
    assert not list(copied.glob(".ptv2*")) and not (copied / "checkpoints").exists()
    assert (run / "mistakes.json").is_file() and not (copied / "mistakes.json").exists()
    assert not list(copied.rglob("*.bin"))
    config = json.loads((copied / "config.json").read_text())
    assert config["data"]["train_file"] == "train.csv"
    for file in copied.rglob("*"):
        assert file.is_dir() or str(made).encode() not in file.read_bytes(), file
    assert ptv2_fast.load(copied).labels == ptv2_fast.load(run).labels == [label, "bad"]
    card.push_to_hub(run / "adapter", "user/alone", **named)
    assert ptv2_fast.load(tmp_path / "hub" / "user" / "alone").model
    calls = len(hub.calls)
    with pytest.raises(ValueError, match="repo_id: expected a name of the hub"):
        card.push_to_hub(run, "../user/x", base_model="user/base")
    with pytest.raises(ValueError, match="expected a run folder"):
        card.push_to_hub(made / "model", "user/x")
    assert len(hub.calls) == calls
