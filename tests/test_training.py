"""Methods, order of batches, learning rates, the time limit, scoring and measuring."""

import dataclasses
import gc
import json
import math
import os
import time
import weakref

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from ptv2_fast.training import trainer
from ptv2_fast.training.baselines import trained_tensors
from ptv2_fast.training.clock import StepClock
from ptv2_fast.training.divergence import DivergedError
from ptv2_fast.training.dry_run import describe_run
from ptv2_fast.training.measure import kept_bytes, peak_memory_bytes, reset_peak_memory
from ptv2_fast.training.methods import prepare_model, sample_token_ids
from ptv2_fast.training.models import load_run
from ptv2_fast.training.options import METHODS, ModelOptions, RunConfig, read_config_file
from ptv2_fast.training.order import LengthGroupedOrder, TokenOrder
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.run import train
from ptv2_fast.training.trainer import head_parameters, vector_parameters
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
    table = prepared.features["train"].table
    ids = sample_token_ids(table.select(range(2)), 30)
    assert ids.shape == (30,)
    assert not set(ids.tolist()) & {0, 2, 3}, "special tokens are left out"


def test_the_order_groups_lengths_and_depends_on_seed_and_epoch_alone():
    lengths = torch.randint(1, 100, (1003,)).tolist()
    order = LengthGroupedOrder(lengths, batch_size=4, seed=3)
    first = list(order)
    assert sorted(first) == list(range(1003))
    assert list(order) == first
    spread = [
        max(lengths[i] for i in first[k : k + 4]) - min(lengths[i] for i in first[k : k + 4])
        for k in range(0, 1000, 4)
    ]
    assert sum(spread) / len(spread) < 5
    order.set_epoch(1)
    second = list(order)
    assert second != first
    torch.rand(1)  # another state of the global generator
    fresh = LengthGroupedOrder(lengths, batch_size=4, seed=3)
    fresh.set_epoch(1)
    assert list(fresh) == second
    means = [sum(lengths[i] for i in first[k : k + 4]) for k in range(0, 200, 4)]
    assert means != sorted(means), "batches are shuffled"


def test_batches_of_tokens_have_similar_lengths_and_about_as_many_tokens():
    generator = torch.Generator().manual_seed(0)
    lengths = [*torch.randint(1, 100, (1002,), generator=generator).tolist(), 5000]
    order = TokenOrder(lengths, tokens=400, seed=3)
    assert order.count == math.ceil(sum(lengths) / 400)
    first = order.batches()
    assert len(first) == order.count
    assert sorted(i for batch in first for i in batch) == list(range(1003))
    assert [1002] in first, "an example with more is a batch of its own"
    others = [[lengths[i] for i in batch] for batch in first if batch != [1002]]
    tokens = [sum(batch) for batch in others]
    assert max(tokens) <= 400 + 50 and min(tokens) > 400 / 2
    assert sum(max(batch) - min(batch) for batch in others) / len(others) < 10
    order.set_epoch(1)
    assert order.batches() != first
    fresh = TokenOrder(lengths, tokens=400, seed=3)
    assert fresh.batches() == first and list(fresh) == [i for batch in first for i in batch]
    few = TokenOrder([7, 900, 7], tokens=1, seed=0)
    assert sorted(few.batches()) == [[0], [1], [2]]


def test_a_run_of_batches_of_tokens_resumes_within_an_epoch(tiny, tmp_path):
    """216 tokens in batches of 20 are 11 of them, two to a step: six steps an epoch."""
    batch = {"batch_size": None, "batch_tokens": 20, "gradient_accumulation_steps": 2}
    config = run_config(tiny, **batch, num_train_epochs=2, save_steps=4, eval_steps=4, dropout=0.1)
    seen: list[int] = []

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **unused) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    whole = prepare(config, tmp_path / "whole")
    assert sum(whole.features["train"].lengths) == 24 * 7 + 24 * 2
    described = describe_run(whole)["run"]

    def count(model, args, kwargs):
        if model.training:
            seen.append(int(kwargs["attention_mask"].sum()))

    whole.model.register_forward_pre_hook(count, with_kwargs=True)
    report = train(whole)
    assert report["steps"] == described["steps"] == 12 and report["kept_bytes"] > 0
    assert sum(seen[:22]) == 2 * 216 and max(seen[:22]) <= 25
    with pytest.raises(KeyboardInterrupt):
        train(prepare(config, tmp_path / "killed"), [Kill()])
    killed = prepare(config, tmp_path / "killed", resume=True)
    train(killed)
    for name, tensor in trained_tensors(killed.model).items():
        assert tensor.equal(trained_tensors(whole.model)[name]), name


class FakeClock(StepClock):
    """Every step takes a second, whatever the machine does."""

    def elapsed(self) -> float:
        return self.seconds + (self._started is not None)

    def on_step_end(self, *args, **unused) -> None:
        self._started = time.perf_counter() - 1
        super().on_step_end(*args, **unused)


def test_a_time_limit_stops_training_and_the_learning_rate_decays_over_it(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr("ptv2_fast.training.run.StepClock", FakeClock)
    config = run_config(tiny, max_seconds=20, eval_seconds=8, logging_steps=1, warmup_ratio=0.2,
                        learning_rate=1.0)  # fmt: skip
    report = train(prepare(config, tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert report["steps"] == len(rates) == 20
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.01)
    assert rates[4:] == pytest.approx([1 - k / 16 for k in range(16)], abs=0.01)
    scored = [line["step"] for line in lines if "eval_f1" in line]
    assert scored == [8, 16, 20], "every 8 seconds, and at the end"


def test_an_exponential_schedule_multiplies_the_rates_after_each_epoch(tiny, tmp_path):
    """24 examples in batches of 4, two to a step: three steps an epoch; prompt and head alike."""
    config = run_config(tiny, schedule="exponential", schedule_decay=0.5, logging_steps=1,
                        gradient_accumulation_steps=2, learning_rate=0.8,
                        num_train_epochs=3)  # fmt: skip
    rates = []

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **unused) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups if group["params"]])

    train(prepare(config, tmp_path / "run"), [Rates()])
    assert [sorted(set(step)) for step in rates] == [
        [0.03 * factor, 0.8 * factor] for factor in (1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25)
    ]


def test_a_warmup_stable_decay_schedule_and_the_betas_reach_the_optimizer(tiny, tmp_path):
    """2 of 10 steps up and 4 down, by 1 - sqrt of the part of these that is over."""
    config = run_config(tiny, lr_scheduler_type="warmup_stable_decay", max_steps=10,
                        warmup_ratio=0.2, decay_ratio=0.4, decay_type="1-sqrt", learning_rate=1.0,
                        adam_beta1=0.8, adam_beta2=0.98)  # fmt: skip
    seen = []

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **unused) -> None:
            group = optimizer.param_groups[0]
            seen.append(group["lr"])
            assert group["betas"] == (0.8, 0.98)

    train(prepare(config, tmp_path / "run"), [Rates()])
    falling = [1 - math.sqrt(k / 4) for k in range(4)]
    assert seen == pytest.approx([0, 0.5, 1, 1, 1, 1, *falling])


@pytest.mark.parametrize("method", ["p-tuning-v2", "fine-tuning"])
def test_a_run_with_an_average_scores_and_ends_with_it(method, tiny, tmp_path, monkeypatch):
    """The best of three scorings is the second; the run that is killed goes on to the same bits
    from the checkpoint before one that has lost its average."""
    scored, after_steps = [], []

    def score(model, *unused):
        scored.append({k: v.clone() for k, v in trained_tensors(model).items()})
        return {"f1": (0.1, 0.9, 0.3)[len(scored) - 1]}

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **unused) -> None:
            after_steps.append({k: v.clone() for k, v in trained_tensors(model).items()})

        def on_step_end(self, args, state, control, model, **unused) -> None:
            self.on_train_begin(args, state, control, model)

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **unused) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    config = run_config(tiny, method=method, ema_decay=0.3, max_steps=6, eval_steps=2,
                        save_steps=2, learning_rate=1e-2, dropout=0.1)  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "score", score)
        prepared = prepare(config, tmp_path / "whole")
        train(prepared, [Watch()])
    average = after_steps[0]
    for number, tensors in enumerate(after_steps[1:]):
        decay = min(0.3, (1 + number) / (10 + number))
        average = {k: decay * v + (1 - decay) * tensors[k] for k, v in average.items()}
        if number % 2:
            torch.testing.assert_close(scored[number // 2], average)
    assert all(t.equal(scored[1][name]) for name, t in trained_tensors(prepared.model).items())

    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, save_steps=2, load_best=False)
    )
    train(prepare(config, tmp_path / "last"))
    with pytest.raises(KeyboardInterrupt):
        train(prepare(config, tmp_path / "killed"), [Kill()])
    (tmp_path / "killed/checkpoints/checkpoint-4/average.safetensors").unlink()
    prepared = prepare(config, tmp_path / "killed", resume=True)
    with pytest.warns(UserWarning, match=r"checkpoint-4 has no weights average\.safetensors"):
        train(prepared)
    ends = load_run(tmp_path / "last").model.state_dict()
    for name, tensor in trained_tensors(prepared.model).items():
        assert tensor.equal(ends[name]), name
        assert tensor.equal(scored[2][name]), name


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

    def score(model, *unused):
        states.append({k: v.clone() for k, v in trained_tensors(model).items()})
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

    def score(model, *unused):
        states.append({k: v.clone() for k, v in trained_tensors(model).items()})
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


def test_label_smoothing_is_torchs(tiny, tmp_path):
    config = run_config(tiny, label_smoothing_factor=0.2, max_steps=1, logging_steps=1)
    prepared = prepare(config, tmp_path / "run")
    wanted = []

    def loss(model, args, kwargs, output):
        if model.training and "labels" not in kwargs:
            wanted.append(output.logits.detach().clone())

    prepared.model.register_forward_hook(loss, with_kwargs=True)
    collate, labels = prepared.task.collator(prepared.tokenizer), []

    def collator(tokenizer):
        def collate_and_keep(rows):
            batch = collate(rows)
            labels.append(batch["labels"])
            return batch

        return collate_and_keep

    prepared.task.collator = collator
    train(prepared)
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    smoothed = nn.functional.cross_entropy(
        wanted[0].flatten(0, 1), labels[0].flatten(), label_smoothing=0.2
    )
    assert line["loss"] == pytest.approx(smoothed.item(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_step_of_two_batches_is_that_of_one_as_large(smoothing, tiny, tmp_path):
    """Without -100 among the labels: all sentences have the same length and one piece a word."""
    file = tmp_path / "train.txt"
    file.write_text("Anna B-PER\nlives O\n.  O\n\nOslo B-LOC\nloves O\nBob B-PER\n\n" * 8)
    logged = []
    for batch_size, count in ((8, 1), (4, 2)):
        config = run_config(tiny, train_file=str(file), batch_size=batch_size, max_steps=1,
                            label_smoothing_factor=smoothing,
                            gradient_accumulation_steps=count, logging_steps=1)  # fmt: skip
        train(prepare(config, tmp_path / f"run{count}"))
        first = (tmp_path / f"run{count}/metrics.jsonl").read_text().splitlines()[0]
        logged.append([json.loads(first)[name] for name in ("loss", "grad_norm")])
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


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
