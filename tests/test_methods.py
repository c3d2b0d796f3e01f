"""Methods: prompt depth, prompt encoders, LoRA; what they train, save and resume."""

import copy
import logging
import sys

import pytest
import torch
from transformers import TrainerCallback

from ptv2_fast.encoders.families import FAMILIES
from ptv2_fast.tasks import DataOptions
from ptv2_fast.training import trainer
from ptv2_fast.training.baselines import final_tensors, trained_tensors
from ptv2_fast.training.depth import parse_depth
from ptv2_fast.training.methods import METHODS, longest_input, prefix_config, prepare_model
from ptv2_fast.training.models import load_run
from ptv2_fast.training.options import ModelOptions, RunConfig
from ptv2_fast.training.prepare import choose_max_length, prepare
from ptv2_fast.training.run import train
from ptv2_fast.training.scoring import run_model
from tests.models import (
    MODEL_TYPES,
    MODELS,
    assert_close_to_model,
    make_batch,
    one_thread,  # noqa: F401
    tiny_model,
)
from tests.tiny_run import save_tiny_model, write_conll, write_reviews


def options(method: str, **more) -> ModelOptions:
    return ModelOptions(model="tiny", method=method, num_virtual_tokens=5, **more)


@pytest.mark.parametrize(
    ("text", "layers"),
    [("1-4", (0, 1, 2, 3)), ("21-24", (20, 21, 22, 23)), ("9, 1-2", (0, 1, 8)), ("3", (2,))],
)
def test_depth_counts_layers_from_one(text, layers):
    assert parse_depth(text) == layers
    assert prefix_config(options("p-tuning-v2", depth=text)).layers == layers


@pytest.mark.parametrize("text", ["", "4-1", "0-3", "1-4,4", "1-4-8", "a", "-1", "1,,2"])
def test_a_bad_depth_is_named_before_a_model_is_loaded(text):
    with pytest.raises(ValueError, match=r"^depth: expected"):
        options("p-tuning-v2", depth=text)


def test_a_depth_beyond_the_model_or_without_a_prefix_is_refused():
    with pytest.raises(ValueError, match="depth: expected layers 1 to 3, which the model has"):
        prepare_model(tiny_model(), options("p-tuning-v2", depth="2-4"))
    with pytest.raises(ValueError, match="depth: expected None for the method fine-tuning"):
        options("fine-tuning", depth="1")
    model = tiny_model()
    prepare_model(model, options("p-tuning-v2", depth="2-3"))
    assert model.prefix_encoder.layers == (1, 2)


@pytest.mark.parametrize("network", ["lstm", "mlp"])
def test_p_tuning_v1_is_prompt_tuning_with_computed_vectors(network):
    model = tiny_model("bert", "token")
    init_ids = torch.tensor([7, 8, 9, 10, 11])
    prepare_model_from(init_ids, model, options("p-tuning-v1", prompt_encoder=network))
    words = model.get_input_embeddings().weight
    assert model.prompt.embedding.weight.equal(words[init_ids])
    hidden = words[init_ids]
    if network == "lstm":
        hidden, _ = model.prompt.lstm_head(hidden)
        assert hidden.shape == (5, 2 * 16), "both directions"
    vectors = model.prompt.mlp_head(hidden)

    shallow = tiny_model("bert", "token")
    shallow.load_state_dict(model.state_dict(), strict=False)
    prepare_model(shallow, options("prompt-tuning"))
    shallow.prompt.weight.data.copy_(vectors)
    batch = make_batch()
    torch.testing.assert_close(model(**batch).logits, shallow(**batch).logits, rtol=0, atol=0)
    assert longest_input(tiny_model(), options("p-tuning-v1"))[0] == 40 - 5


def prepare_model_from(init_ids, model, model_options) -> None:
    METHODS[model_options.method](model, model_options, init_ids)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_lora_adds_its_product_to_queries_and_values(model_type):
    """With the updates added to the plain weights, alpha / r times B A, logits are the same."""
    torch.manual_seed(0)
    head = "sequence" if (model_type, "sequence") in MODELS else "token"
    plain = tiny_model(model_type, head)
    model = copy.deepcopy(plain)
    prepare_model(model, options("lora", lora_rank=2, lora_alpha=6.0))
    batch = make_batch(lengths=(11, 11, 11))
    assert model.eval()(**batch).logits.equal(plain(**batch).logits), "it starts at zero"
    linears = dict(plain.named_modules())
    changed = 0
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
        rows, columns = linears[name].weight.shape
        assert (down.shape, up.shape) == ((2, columns), (rows, 2))
        torch.nn.init.normal_(up)
        linears[name].weight.data += 6 / 2 * up.data @ down.data
        changed += 1
    family = FAMILIES[model_type]
    # Queries and values may have one weight, and several layers too.
    parts, layers = {family.query, family.value}, set(family.layer_modules(plain.base_model))
    assert changed == len(parts) * len(layers)
    assert_close_to_model(
        (model(**batch).logits.detach(),), lambda plain: (plain(**batch).logits,), plain
    )


def test_a_table_of_positions_limits_the_length_and_nothing_else_does():
    for model_type, default, asked in (("t5", 512, 600), ("bert", 40, 40)):
        model = tiny_model(model_type, "token")
        for length, chosen in ((None, default), (asked, asked)):
            data = DataOptions("token-classification", max_length=length)
            assert choose_max_length(data, model, options("lora")) == chosen
    data = DataOptions("token-classification", max_length=41)
    with pytest.raises(ValueError, match="max_length: expected at most 40, got 41"):
        choose_max_length(data, model, options("lora"))


@pytest.mark.parametrize("method", ["p-tuning-v1", "lora"])
def test_methods_by_peft_say_so_when_it_is_missing(method, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=f"method: '{method}' needs the package peft"):
        prepare_model(tiny_model(), options(method))


LEARNING_RATES = {"p-tuning-v1": 0.01, "lora": 0.02}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("tiny")
    ner = {
        "task": "token-classification",
        "train_file": write_conll(folder / "train.txt", 24),
        "validation_file": write_conll(folder / "dev.txt", 8),
    }
    reviews = {
        "task": "text-classification",
        "train_file": write_reviews(folder / "train.csv", 24),
        "validation_file": write_reviews(folder / "dev.csv", 8),
    }
    shared = {
        "model": save_tiny_model(folder / "model"), "num_virtual_tokens": 4, "batch_size": 4,
        "head_learning_rate": 0.03, "progress": False,
    }  # fmt: skip
    return {"ner": ner | shared, "reviews": reviews | shared}


def run_config(tiny, data: str, method: str, **changes) -> RunConfig:
    rate = LEARNING_RATES[method]
    return RunConfig.from_dict(tiny[data] | {"method": method, "learning_rate": rate} | changes)


@pytest.mark.parametrize("data", ["ner", "reviews"])
@pytest.mark.parametrize("method", LEARNING_RATES)
def test_a_run_learns_and_its_folder_scores_the_same(method, data, tiny, tmp_path):
    config = run_config(tiny, data, method, num_train_epochs=12, dropout=0.0, eval_steps=24)
    prepared = prepare(config, tmp_path / "run")
    report = train(prepared)
    (scores,) = report["metrics"].values()
    assert scores["f1"] > 0.9
    loaded = load_run(tmp_path / "run")
    validation = prepared.part.features["validation"]
    again = run_model(loaded, validation).results
    trained = run_model(prepared.part, validation).results
    assert again == trained, "to the last bit"


class KilledError(Exception):
    """Stands for a crash in the middle of training."""


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **unused) -> None:
        if state.global_step == 9:
            raise KilledError


@pytest.mark.parametrize("method", LEARNING_RATES)
def test_a_killed_run_resumes_to_the_same_bits(method, tiny, tmp_path, caplog):
    """Killed in the second epoch, with the exponential schedule in its second rate."""
    config = run_config(tiny, "ner", method, max_steps=14, eval_steps=4, schedule="exponential",
                        schedule_decay=0.5, dropout=0.1)  # fmt: skip
    whole = prepare(config, tmp_path / "whole")
    train(whole)
    with pytest.raises(KilledError):
        train(prepare(config, tmp_path / "killed"), [Kill()])
    resumed = prepare(config, tmp_path / "killed", resume=True)
    with caplog.at_level(logging.WARNING, "transformers"):
        train(resumed)
    assert not [r for r in caplog.records if "keys in the checkpoint" in r.getMessage()]
    expected, actual = trained_tensors(whole.model), trained_tensors(resumed.model)
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not expected[name].equal(actual[name])] == []


@pytest.mark.parametrize("method", LEARNING_RATES)
def test_the_best_checkpoint_is_what_is_saved(method, tiny, tmp_path, monkeypatch):
    scores, states = iter([0.1, 0.9, 0.3]), []

    def score(part, *unused):
        states.append({name: t.clone() for name, t in final_tensors(part.model).items()})
        return {"f1": next(scores)}

    monkeypatch.setattr(trainer, "score", score)
    config = run_config(tiny, "ner", method, max_steps=6, eval_steps=2)
    train(prepare(config, tmp_path / "run"))
    saved = trained_tensors(load_run(tmp_path / "run").model)
    assert saved.keys() == states[1].keys()
    assert [name for name in saved if not saved[name].equal(states[1][name])] == []
    assert [name for name in saved if not saved[name].equal(states[2][name])] != []


@pytest.mark.parametrize("method", LEARNING_RATES)
@pytest.mark.parametrize("changes", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_options_that_change_the_step_still_train(changes, method, tiny, tmp_path):
    config = run_config(tiny, "ner", method, num_train_epochs=12, dropout=0.0, eval_steps=24,
                        **changes)  # fmt: skip
    assert train(prepare(config, tmp_path / "run"))["metrics"]["validation"]["f1"] > 0.9
