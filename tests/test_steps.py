"""The steps of a run: order of batches, learning rates, moving average, the loss of a step."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from ptv2_fast.training import trainer
from ptv2_fast.training.baselines import trained_tensors
from ptv2_fast.training.dry_run import describe_run
from ptv2_fast.training.models import load_run
from ptv2_fast.training.order import Batching, LengthGroupedOrder
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.run import train
from tests.models import make_batch, one_thread, tiny_model  # noqa: F401
from tests.test_training import FakeClock, run_config, tiny  # noqa: F401


def test_the_order_groups_lengths_and_depends_on_seed_and_epoch_alone():
    lengths = torch.randint(1, 100, (1003,)).tolist()
    order = LengthGroupedOrder(lengths, Batching(4, None), seed=3)
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
    fresh = LengthGroupedOrder(lengths, Batching(4, None), seed=3)
    fresh.set_epoch(1)
    assert list(fresh) == second
    means = [sum(lengths[i] for i in first[k : k + 4]) for k in range(0, 200, 4)]
    assert means != sorted(means), "batches are shuffled"


def test_batches_of_tokens_have_similar_lengths_and_about_as_many_tokens():
    generator = torch.Generator().manual_seed(0)
    lengths = [*torch.randint(1, 100, (1002,), generator=generator).tolist(), 5000]
    order = LengthGroupedOrder(lengths, Batching(None, 400), seed=3)
    assert order.count == math.ceil((sum(lengths[:-1]) + 400) / 400)
    first = order.batches()
    assert len(first) == order.count
    assert sorted(i for batch in first for i in batch) == list(range(1003))
    assert [1002] in first, "an example with more is a batch of its own"
    others = [[lengths[i] for i in batch] for batch in first if batch != [1002]]
    tokens = [sum(batch) for batch in others]
    assert 400 - 99 <= min(tokens) and max(tokens) <= 400 + 99, "off by a text at most"
    assert sum(max(batch) - min(batch) for batch in others) / len(others) < 10
    order.set_epoch(1)
    assert order.batches() != first
    fresh = LengthGroupedOrder(lengths, Batching(None, 400), seed=3)
    assert fresh.batches() == first and list(fresh) == [i for batch in first for i in batch]
    few = LengthGroupedOrder([7, 900, 7], Batching(None, 1), seed=0)
    assert sorted(few.batches()) == [[0], [1], [2]]


def test_examples_with_more_tokens_than_a_batch_leave_the_others_whole_batches():
    lengths = [10] * 990 + [1000] * 10
    tokens = [
        sum(lengths[i] for i in batch)
        for batch in LengthGroupedOrder(lengths, Batching(None, 500), seed=0).batches()
    ]
    assert tokens.count(1000) == 10 and len(tokens) == 30
    assert sorted(tokens)[:20] == [490] * 10 + [500] * 10


def test_a_run_of_batches_of_tokens_resumes_within_an_epoch(tiny, tmp_path):  # noqa: F811
    """216 tokens in batches of 20 are 11 of them, two to a step: six steps an epoch."""
    batch = {"batch_size": None, "batch_tokens": 20, "gradient_accumulation_steps": 2}
    config = run_config(tiny, **batch, num_train_epochs=2, save_steps=4, eval_steps=4, dropout=0.1)
    seen: list[int] = []

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **unused) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    whole = prepare(config, tmp_path / "whole")
    assert sum(whole.part.features["train"].lengths) == 24 * 7 + 24 * 2
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


def test_a_time_limit_stops_training_and_the_learning_rate_decays_over_it(
    tiny,  # noqa: F811
    tmp_path,
    monkeypatch,
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


def test_an_exponential_schedule_multiplies_the_rates_after_each_epoch(tiny, tmp_path):  # noqa: F811
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


def test_a_warmup_stable_decay_schedule_and_the_betas_reach_the_optimizer(tiny, tmp_path):  # noqa: F811
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
def test_a_run_with_an_average_scores_and_ends_with_it(method, tiny, tmp_path, monkeypatch):  # noqa: F811
    """The best of three scorings is the second; the run that is killed goes on to the same bits
    from the checkpoint before one that has lost its average."""
    scored, after_steps = [], []

    def score(part, *unused):
        scored.append({k: v.clone() for k, v in trained_tensors(part.model).items()})
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
        config, training=config.training.changed(save_steps=2, load_best=False)
    )
    train(prepare(config, tmp_path / "last"))
    with pytest.raises(KeyboardInterrupt):
        train(prepare(config, tmp_path / "killed"), [Kill()])
    opened = load_run(tmp_path / "killed/checkpoints/checkpoint-4").model.state_dict()
    assert all(tensor.equal(opened[name]) for name, tensor in scored[1].items())
    (tmp_path / "killed/checkpoints/checkpoint-4/average.safetensors").unlink()
    prepared = prepare(config, tmp_path / "killed", resume=True)
    with pytest.warns(UserWarning, match=r"checkpoint-4 has no weights average\.safetensors"):
        train(prepared)
    ends = load_run(tmp_path / "last").model.state_dict()
    for name, tensor in trained_tensors(prepared.model).items():
        assert tensor.equal(ends[name]), name
        assert tensor.equal(scored[2][name]), name


def test_label_smoothing_is_torchs(tiny, tmp_path):  # noqa: F811
    config = run_config(tiny, label_smoothing_factor=0.2, max_steps=1, logging_steps=1)
    prepared = prepare(config, tmp_path / "run")
    wanted = []

    def loss(model, args, kwargs, output):
        if model.training and "labels" not in kwargs:
            wanted.append(output.logits.detach().clone())

    prepared.model.register_forward_hook(loss, with_kwargs=True)
    collate, labels = prepared.part.task.collator(prepared.tokenizer), []

    def collator(tokenizer):
        def collate_and_keep(rows):
            batch = collate(rows)
            labels.append(batch["labels"])
            return batch

        return collate_and_keep

    prepared.part.task.collator = collator
    train(prepared)
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    smoothed = nn.functional.cross_entropy(
        wanted[0].flatten(0, 1), labels[0].flatten(), label_smoothing=0.2
    )
    assert line["loss"] == pytest.approx(smoothed.item(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_step_of_two_batches_is_that_of_one_as_large(smoothing, tiny, tmp_path):  # noqa: F811
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
