"""Methods, limits and ends of a run, scoring and measuring."""

import gc
import json
import os
import time
import weakref

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from ptv2_fast.training import trainer
from ptv2_fast.training.baselines import trained_tensors
from ptv2_fast.training.callbacks import DivergedError, StepClock
from ptv2_fast.training.measure import kept_bytes, peak_memory_bytes, reset_peak_memory
from ptv2_fast.training.methods import prepare_model, sample_token_ids
from ptv2_fast.training.models import load_run
from ptv2_fast.training.optimization import head_parameters, vector_parameters
from ptv2_fast.training.options import METHODS, ModelOptions, RunConfig, read_config_file
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.run import train
from tests.models import make_batch, one_thread, tiny_model  # noqa: F401
from tests.tiny_run import save_tiny_model, write_conll


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tiny")
    return {
        "task": "token-classification",
        "model": save_tiny_model(folder / "model"),
        "train_file": write_conll(folder / "train.txt", 24),
        "validation_file": write_conll(folder / "dev.txt", 8),
        "num_virtual_tokens": 4,
        "init": "tokens",
        "learning_rate": 0.1,
        "head_learning_rate": 0.03,
        "batch_size": 4,
        "dropout": 0.0,
        "progress": False,
        "save_steps": 0,
    }


def run_config(tiny, **changes) -> RunConfig:
    return RunConfig.from_dict({**tiny, **changes})


class FakeClock(StepClock):
    """Every step takes a second, whatever the machine does."""

    def elapsed(self) -> float:
        return self.seconds + (self._started is not None)

    def on_step_end(self, *args, **unused) -> None:
        self._started = time.perf_counter() - 1
        super().on_step_end(*args, **unused)


def options(method: str, **more) -> ModelOptions:
    return ModelOptions(model="tiny", method=method, num_virtual_tokens=5, **more)


def test_prompt_tuning_is_the_model_on_prompt_and_word_embeddings():
    """In the four families, padded, logits and the prompt's gradient; the length is unchanged."""
    for model_type in ("bert", "roberta", "xlm-roberta", "electra"):
        model = tiny_model(model_type, "token")
        batch = make_batch()
        prepare_model(model, options("prompt-tuning"))
        logits = model(**batch).logits
        assert logits.shape == (3, 11, 3)
        (gradient,) = torch.autograd.grad(logits.square().sum(), model.prompt.weight)

        plain = tiny_model(model_type, "token")
        plain.load_state_dict(model.state_dict(), strict=False)
        prompt = model.prompt.weight.detach().clone().requires_grad_()
        words = plain.get_input_embeddings()(batch["input_ids"])
        mask = torch.cat((torch.ones(3, 5), batch["attention_mask"]), dim=1)
        embeds = torch.cat((prompt.expand(3, -1, -1), words), dim=1)
        expected = plain(inputs_embeds=embeds, attention_mask=mask).logits[:, 5:]
        torch.testing.assert_close(logits, expected)
        (wanted,) = torch.autograd.grad(expected.square().sum(), prompt)
        torch.testing.assert_close(gradient, wanted)


def test_prompt_tuning_pools_the_first_token_of_the_text():
    model = tiny_model("bert", "sequence")
    prepare_model(model, options("prompt-tuning"))
    batch = make_batch()
    hidden = model.base_model(**batch).last_hidden_state
    expected = model.classifier(model.base_model.pooler(hidden))
    torch.testing.assert_close(model(**batch).logits, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_moves_what_trains_and_nothing_else(method):
    model = tiny_model("bert", "sequence")
    prepare_model(model, options(method))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = set(trained_tensors(model))
    places = ("l0", "l0_reverse", "l1", "l1_reverse")
    lstm = {f"lstm_head.{kind}_{gate}_{place}" for kind in ("weight", "bias")
            for gate in ("ih", "hh") for place in places}  # fmt: skip
    mlp = {f"mlp_head.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    self_attention = "bert.encoder.layer.{}.attention.self.{}.lora_{}.default.weight"
    new = {
        "p-tuning-v2": {"prefix_encoder.embedding.weight"},
        "prompt-tuning": {"prompt.weight"},
        "p-tuning-v1": {f"prompt.{name}" for name in ("embedding.weight", *lstm, *mlp)},
        "lora": {self_attention.format(layer, part, half) for layer in range(3)
                 for part in ("query", "value") for half in "AB"},
    }  # fmt: skip
    head = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight",
            "bert.pooler.dense.bias"}  # fmt: skip
    if method == "fine-tuning":
        assert trained == set(before)
    else:
        assert trained == head | new.get(method, set())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**make_batch(), labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    # Rows of pads and keys' biases may have no gradient; whole tensors of a frozen part never move.
    # LoRA starts at zero: before its B has moved its A has no gradient.
    first = {name for name in new.get(method, set()) if ".lora_A." not in name}
    assert moved <= trained and first | head <= moved


def test_head_parameters_are_the_head_and_a_pooler_of_a_frozen_backbone():
    counts = {}
    for method in METHODS:
        model = tiny_model("bert", "sequence")
        prepare_model(model, options(method))
        counts[method] = sum(p.numel() for p in head_parameters(model))
    classifier, pooler = 16 * 3 + 3, 16 * 16 + 16
    assert counts == {name: classifier + pooler for name in METHODS} | {"fine-tuning": classifier}


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"bias_learning_rate": 0.02}, 0.02), ({}, 0.01), ({"head_learning_rate": 0.003}, 0.003)],
)
def test_biases_and_norms_train_at_a_rate_of_their_own_and_come_back(
    given, expected, tiny, tmp_path
):
    """By default that of the head up to 0.01, and without weight decay."""
    found = {}

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **unused) -> None:
            for group in optimizer.param_groups:
                rates = (group["lr"], group["weight_decay"])
                found.update(dict.fromkeys(map(id, group["params"]), rates))

    config = run_config(
        tiny, train_biases=True, train_norms=True, weight_decay=0.1, max_steps=3,
        schedule="constant", **given,
    )  # fmt: skip
    prepared = prepare(config, tmp_path / "run")
    model = prepared.model
    vectors, head = vector_parameters(model), head_parameters(model)
    assert len(vectors) == 2 * (6 + 2 * 2) and not {*map(id, vectors)} & {*map(id, head)}
    before = [vector.detach().clone() for vector in vectors]
    report = train(prepared, [Look()])
    assert report["trainable_parameters"] == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert {found[id(vector)] for vector in vectors} == {(expected, 0.0)}
    assert {found[id(p)][0] for p in head} == {given.get("head_learning_rate", 0.03)}
    assert found[id(model.prefix_encoder.embedding.weight)] == (0.1, 0.1)
    assert all(not torch.equal(*pair) for pair in zip(vectors, before, strict=True))
    loaded = load_run(tmp_path / "run").model
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_token_ids_to_start_from_repeat_when_there_are_few(tiny, tmp_path):
    prepared = prepare(run_config(tiny), tmp_path / "run")
    table = prepared.part.features["train"].table
    ids = sample_token_ids(table.select(range(2)), 30)
    assert ids.shape == (30,)
    assert not set(ids.tolist()) & {0, 2, 3}, "special tokens are left out"


def test_scoring_draws_nothing_from_the_generator_of_training(tiny, tmp_path):
    """Otherwise how often a run is scored would change what it learns."""
    results = []
    for eval_steps in (2, 7):
        config = run_config(tiny, max_steps=14, eval_steps=eval_steps, dropout=0.1)
        prepared = prepare(config, tmp_path / f"run{eval_steps}")
        train(prepared)
        results.append(trained_tensors(prepared.model))
    for name, tensor in results[0].items():
        assert tensor.equal(results[1][name]), name


def test_a_run_ends_with_its_best_checkpoint(tiny, tmp_path, monkeypatch):
    scores = iter([0.1, 0.9, 0.3])
    states = []

    def score(part, *unused):
        states.append({k: v.clone() for k, v in trained_tensors(part.model).items()})
        return {"f1": next(scores)}

    monkeypatch.setattr(trainer, "score", score)
    config = run_config(tiny, max_steps=6, eval_steps=2, save_steps=2)
    prepared = prepare(config, tmp_path / "run")
    train(prepared)
    for name, tensor in trained_tensors(prepared.model).items():
        assert tensor.equal(states[1][name]), name
    assert not tensor.equal(states[2][name])


@pytest.mark.parametrize("limit", ["max_steps", "max_seconds"])
def test_a_run_that_was_killed_after_its_last_step_takes_no_other(
    limit, tiny, tmp_path, monkeypatch
):
    """In the middle of an epoch, and resumed in a folder of another name."""
    scores, states = iter([0.9, 0.3, 0.2, 0.1]), []

    def score(part, *unused):
        states.append({k: v.clone() for k, v in trained_tensors(part.model).items()})
        return {"f1": next(scores)}

    def killed(*unused):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "score", score)
    monkeypatch.setattr("ptv2_fast.training.run.StepClock", FakeClock)
    config = run_config(tiny, eval_steps=2, save_steps=2, **{limit: 8})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ptv2_fast.training.run.save_trained", killed)
        train(prepare(config, tmp_path / "run"))
    (tmp_path / "run").rename(tmp_path / "moved")
    prepared = prepare(config, tmp_path / "moved", resume=True)
    assert train(prepared)["steps"] == 8
    for name, tensor in trained_tensors(prepared.model).items():
        assert tensor.equal(states[0][name]), name


def test_a_run_that_diverges_after_its_last_logged_loss_keeps_nothing(tiny, tmp_path):
    config = run_config(tiny, learning_rate=1e38, max_grad_norm=0.0, max_steps=5)
    with pytest.raises(DivergedError, match=r"the trained .*prefix_encoder"):
        train(prepare(config, tmp_path / "run"))
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_model_that_was_cut_short_while_it_was_saved_is_no_finished_run(tiny, tmp_path):
    prepared = prepare(run_config(tiny, method="fine-tuning", max_steps=1), tmp_path / "run")

    def cut_short(folder):
        type(prepared.model).save_pretrained(prepared.model, folder)
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    prepared.model.save_pretrained = cut_short
    with pytest.raises(KeyboardInterrupt):
        train(prepared)
    with pytest.raises(ValueError, match="run: expected a finished run"):
        load_run(tmp_path / "run")


def test_training_stops_at_the_first_of_its_limits(tiny, tmp_path):
    """24 examples in batches of 4: six steps an epoch."""
    for epochs, steps, expected in ((1.5, 100, 9), (3, 4, 4)):
        config = run_config(tiny, num_train_epochs=epochs, max_steps=steps)
        assert prepare(config, tmp_path / "run").arguments.max_steps == expected


@pytest.mark.parametrize(
    "changes",
    [{"bf16": True}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}],
)
def test_options_that_change_the_step_still_train(changes, tiny, tmp_path):
    config = run_config(tiny, num_train_epochs=16, eval_steps=48, **changes)
    report = train(prepare(config, tmp_path / "run"))
    assert report["metrics"]["validation"]["f1"] > 0.9


def test_kept_bytes_count_each_storage_once_and_no_parameters():
    linear = nn.Linear(8, 4)
    x = torch.randn(3, 8)
    assert kept_bytes(lambda: linear(x).sum(), linear) == x.nbytes
    linear.weight.requires_grad_(False)
    assert kept_bytes(lambda: linear(x).sum(), linear) == 0

    def twice() -> torch.Tensor:
        hidden = linear(x).tanh()  # keeps its result
        return (hidden[0] * hidden[1]).sum()  # keeps two views of the same storage

    assert kept_bytes(twice, linear) == 3 * 4 * 4


def test_counting_kept_bytes_leaves_no_graph_behind():
    """tanh keeps its own result, which knows its node: together they would keep each other."""
    linear, hiddens = nn.Linear(8, 4), []

    def loss() -> torch.Tensor:
        hidden = linear(torch.randn(3, 8)).tanh()
        hiddens.append(weakref.ref(hidden))
        return hidden.sum()

    kept_bytes(loss, linear)
    gc.collect()
    assert hiddens[0]() is None


def test_the_peak_of_an_earlier_run_can_be_forgotten():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not reset peaks")
    size = 2**28
    torch.ones(size, dtype=torch.uint8)  # of 256 MiB, given back at once
    peak = peak_memory_bytes(torch.device("cpu"))
    reset_peak_memory()
    assert peak_memory_bytes(torch.device("cpu")) < peak - size // 2


def test_kept_bytes_of_p_tuning_v2_are_fewer_than_of_fine_tuning():
    kept = {}
    for method in ("p-tuning-v2", "fine-tuning"):
        model = tiny_model("bert", "token")
        prepare_model(model, options(method))
        batch = make_batch() | {"labels": torch.zeros(3, 11, dtype=torch.long)}
        kept[method] = kept_bytes(lambda m=model, b=batch: m(**b).loss, model)
    assert kept["p-tuning-v2"] < kept["fine-tuning"]


def test_config_files_and_dictionaries_hold_the_same_options(tmp_path):
    config = RunConfig.from_dict(
        {"task": "text-classification", "model": "m", "depth": "1-2", "seed": 7}
    )
    texts = {
        "run.json": json.dumps(config.to_dict()),
        "run.yaml": "task: text-classification\nmodel: m\ndepth: 1-2\nseed: 7\n",
        "run.toml": 'task = "text-classification"\nmodel = "m"\ndepth = "1-2"\nseed = 7\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        if name.endswith("toml"):
            pytest.importorskip("tomllib")
        assert RunConfig.from_dict(read_config_file(tmp_path / name)) == config
