"""Trained models open in one call, whatever folder of a run is named; what is no run says why."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, T5EncoderModel

import ptv2_fast
from ptv2_fast import PTuningV2Config, cli
from ptv2_fast.tasks import DataOptions
from ptv2_fast.tasks.token_classification import TokenClassification
from ptv2_fast.training import run_folder
from ptv2_fast.training.options import ModelOptions, RunConfig
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.pretrained import load_pretrained
from ptv2_fast.training.run import train
from tests.models import attached, make_batch, one_thread, tiny_config  # noqa: F401
from tests.tiny_run import save_tiny_model, write_conll

LABELS = ["B-LOC", "B-PER", "O"]
SENTENCE = "Anna lives in Oslo ."


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with the pretrained model and a finished run that has kept its checkpoint."""
    folder = tmp_path_factory.mktemp("home")
    values = {
        "task": "token-classification", "model": save_tiny_model(folder / "model"),
        "train_file": write_conll(folder / "train.txt", 8), "num_virtual_tokens": 4,
        "max_steps": 2, "save_steps": 2, "learning_rate": 0.1, "progress": False,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "finish", lambda *unused: None)
        train(prepare(RunConfig.from_dict(values), folder / "run"))
    return folder


def open_lone(folder: Path, home: Path) -> Path:
    """A copy of the adapter that knows nothing of its run."""
    return Path(shutil.copytree(home / "run" / "adapter", folder / "lone"))


def test_every_folder_of_a_run_opens_the_same_model(home, tmp_path):
    run = home / "run"
    model, tokenizer, labels = ptv2_fast.load(str(run))
    assert labels == LABELS and not model.training
    batch = tokenizer(SENTENCE, return_tensors="pt")
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    for folder in (
        run / "adapter",
        run / "checkpoints" / "checkpoint-2",
        open_lone(tmp_path, home),
        tmp_path / "saved",
    ):
        again = ptv2_fast.load(folder)
        assert again.labels == LABELS
        assert torch.equal(again.model(**again.tokenizer(SENTENCE, return_tensors="pt")).logits,
                           expected), folder  # fmt: skip


def test_an_adapter_opens_in_the_dtype_it_was_saved_in(home, tmp_path):
    model = ptv2_fast.load(open_lone(tmp_path, home)).model.bfloat16()
    ptv2_fast.save_adapter(model, tmp_path / "half")
    again = ptv2_fast.load(tmp_path / "half").model
    assert again.dtype == again.classifier.weight.dtype == torch.bfloat16
    assert torch.equal(again.classifier.weight, model.classifier.weight)


def test_a_base_with_a_head_of_its_own_opens(home, tmp_path):
    base, auto = tmp_path / "base", transformers.AutoModelForTokenClassification
    shutil.copytree(home / "model", base)
    auto.from_pretrained(home / "model", num_labels=7).save_pretrained(base)
    options = ModelOptions(model=str(base))
    model, _ = load_pretrained(
        options, TokenClassification(DataOptions(task="token-classification")), LABELS
    )
    ptv2_fast.attach(model, PTuningV2Config(num_virtual_tokens=4))
    ptv2_fast.save_adapter(model, tmp_path / "adapter")
    again, tokenizer, _ = ptv2_fast.load(tmp_path / "adapter")
    words = tokenizer(SENTENCE, return_tensors="pt")
    assert torch.equal(again(**words).logits, model.eval()(**words).logits)
    weights = load_file(base / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing \['bert\.encoder\.layer\.1\.output"):
        ptv2_fast.load(tmp_path / "adapter")


def test_auto_classes_and_pipelines_open_an_adapter(home, tmp_path):
    """As sentence-transformers and SetFit do, to load, to resume and to take the best one back."""
    model, tokenizer, _ = ptv2_fast.load(home / "run")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    auto = transformers.AutoModelForTokenClassification
    again, text = auto.from_pretrained(str(tmp_path)), tokenizer(SENTENCE, return_tensors="pt")
    assert torch.equal(again(**text).logits, model(**text).logits)
    tagged = transformers.pipeline("token-classification", str(tmp_path))(SENTENCE)
    assert tagged == transformers.pipeline("token-classification", model, tokenizer=tokenizer)(
        SENTENCE
    )
    with torch.no_grad():
        again.prefix_encoder.embedding.weight.zero_()
    again.load_state_dict(auto.from_pretrained(tmp_path, dtype=torch.float64).state_dict())
    assert torch.equal(again(**text).logits, model(**text).logits)
    for other, options, message in (
        (transformers.AutoModel, {}, "for AutoModel, got one of a BertForTokenClassification"),
        (auto, {"num_labels": 5}, r"expected no options but dtype .* \['id2label', 'label2id'\]"),
        (auto, {"device_map": "auto"}, r"expected no options but dtype .* \['device_map'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            other.from_pretrained(tmp_path, **options)


def test_the_encoder_of_a_model_with_a_decoder_opens(home, tmp_path):
    base = str(shutil.copytree(home / "model", tmp_path / "model"))
    T5EncoderModel(tiny_config("t5")).save_pretrained(base)
    model = attached("bare", model=T5EncoderModel.from_pretrained(base))
    ptv2_fast.save_adapter(model, tmp_path / "adapter")
    batch = make_batch("bare")
    expected = model.eval()(**batch).last_hidden_state
    for again in (
        ptv2_fast.load(tmp_path / "adapter").model,
        AutoModel.from_pretrained(tmp_path / "adapter"),
    ):
        assert torch.equal(again(**batch).last_hidden_state, expected)


def test_predict_and_pipelines_agree_on_what_was_loaded(home, capsys):
    model, tokenizer, _ = ptv2_fast.load(home / "run")
    tagged = transformers.pipeline("token-classification", model, tokenizer=tokenizer)(SENTENCE)
    assert cli.main(["predict", "--run", str(home / "run" / "checkpoints" / "checkpoint-2"),
                     "--text", SENTENCE]) == 0  # fmt: skip
    line = json.loads(capsys.readouterr().out)
    named = [
        (tag, pytest.approx(score, abs=1e-6), *offsets)
        for tag, score, offsets in zip(line["tags"], line["scores"], line["offsets"], strict=True)
        if tag != "O"
    ]
    assert [(t["entity"], t["score"], t["start"], t["end"]) for t in tagged] == named


def test_a_fine_tuned_run_opens_too(home, tmp_path):
    config = json.loads((home / "run" / "config.json").read_text())
    values = config["data"] | config["model"] | config["training"]
    values |= {"method": "fine-tuning", "max_steps": 1, "save_steps": None}
    prepared = prepare(RunConfig.from_dict(values), tmp_path / "run")
    train(prepared)
    model, tokenizer, labels = ptv2_fast.load(tmp_path / "run")
    batch = tokenizer(SENTENCE, return_tensors="pt")
    assert labels == LABELS
    assert torch.equal(model(**batch).logits, prepared.model.eval()(**batch).logits)

    for name, content in {
        "model/model.safetensors": b"{[", "model/config.json": b'{"model_type": "bert"}',
        "tokenizer/tokenizer.json": b"[]", "tokenizer/tokenizer_config.json": b"[]",
    }.items():  # fmt: skip
        before = (tmp_path / "run" / name).read_bytes()
        (tmp_path / "run" / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"run/(model|tokenizer) cannot be read"):
            ptv2_fast.load(tmp_path / "run")
        (tmp_path / "run" / name).write_bytes(before)


def test_a_checkpoint_of_a_method_that_cannot_open_it_is_refused(home, tmp_path):
    shutil.copytree(home / "run", tmp_path / "run")
    config = (tmp_path / "run" / "config.json").read_text()
    (tmp_path / "run" / "config.json").write_text(config.replace("p-tuning-v2", "linear-probe"))
    with pytest.raises(ValueError, match="a finished run of linear-probe, got its checkpoint-2"):
        ptv2_fast.load(tmp_path / "run" / "checkpoints" / "checkpoint-2")


def test_transformers_and_peft_refuse_a_run_and_say_what_to_call(home):
    run = str(home / "run")
    for opens in (
        lambda: transformers.pipeline("token-classification", model=run),
        lambda: transformers.AutoModelForTokenClassification.from_pretrained(run),
    ):
        with pytest.raises(ValueError, match=r"call ptv2_fast.load\(folder\)"):
            opens()
    base = transformers.AutoModel.from_pretrained(home / "model")
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
        PeftModel.from_pretrained(base, run)


def change_description(folder: Path, **changes) -> None:
    path = folder / "ptv2_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model": ""}, "names its base model.*make the model and call ptv2_fast.load_adapt"),
        ({"base_model": 3}, "names its base model"),
        ({"model_class": "BertForMaskedLM"}, "one of the heads"),
        (
            {"model_class": "BertForSequenceClassification"},
            "expected the tensors of BertForSequenceClassification",
        ),
        ({"model_class": ["x"]}, "one of the heads"),
        ({"base_model": "/nowhere"}, "nowhere"),
        ({"num_labels": 10**9}, "a label for each number below num_labels 1000000000"),
    ],
)
def test_a_bad_adapter_outside_a_run_is_one_value_error(home, tmp_path, changes, message):
    lone = open_lone(tmp_path, home)
    change_description(lone, **changes)
    with pytest.raises(ValueError, match=message):
        ptv2_fast.load(lone)


def test_folders_without_one_run_are_refused_by_what_they_hold(home, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"whose config.json is not that of a run"):
        ptv2_fast.load(home / "model")
    with pytest.raises(ValueError, match="folder: expected a path, got None"):
        ptv2_fast.load(None)
    with pytest.raises(ValueError, match=r"expected a run folder with config.json"):
        ptv2_fast.load(tmp_path / "nowhere")
    for seed in range(7):
        run = tmp_path / "runs" / f"seed-{seed}"
        run.mkdir(parents=True)
        shutil.copy(home / "run" / "config.json", run)
    names = r"with several; name one of .*/runs/seed-0', .*/runs/seed-4'\] and 2 others"
    with pytest.raises(ValueError, match=names):
        ptv2_fast.load(tmp_path / "runs")
    for command in (["predict", "--text", "Anna"], ["eval", "--data", "/nowhere"]):
        assert cli.main([*command, "--run", str(tmp_path / "runs")]) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1 and "/runs/seed-0', " in shown
    shutil.copytree(home / "run" / "adapter", tmp_path / "runs" / "seed-3" / "adapter")
    with pytest.raises(ValueError, match=r"name one of \['[^,]*/runs/seed-3'\]$"):
        ptv2_fast.load(tmp_path / "runs")
    assert cli.main(["predict", "--run", str(open_lone(tmp_path, home)), "--text", "Anna"]) == 2
    assert "ptv2_fast.load opens it" in capsys.readouterr().err
