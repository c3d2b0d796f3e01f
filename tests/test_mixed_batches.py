"""Batches of several data sets in multi-task training: order, pass, loss and gradients."""

import contextlib
import copy
import itertools
import types

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ptv2_fast.training.multitask.heads import TaskHeads, take_head
from ptv2_fast.training.multitask.order import MultiTaskOrder
from ptv2_fast.training.multitask.shared_pass import SharedPass, check_shared_pass
from ptv2_fast.training.order import Batching
from ptv2_fast.training.trainer import TaskTrainer
from tests.models import (
    BACKBONES,
    assert_close_to_model,
    attached,
    make_batch,
    one_thread,  # noqa: F401
    tiny_model,
)
from tests.test_multitask import make_trainer, tiny  # noqa: F401


@pytest.mark.parametrize("batching", [Batching(4, None), Batching(None, 100)])
def test_mixed_batches_keep_the_shares_and_the_lengths_together(batching):
    lengths = [torch.randint(1, 50, (count,)).tolist() for count in (30, 12, 5)]
    every = [length for own in lengths for length in own]
    batches = [9, 3, 1]
    orders = [MultiTaskOrder(lengths, batches, batching, 5, mixed) for mixed in (False, True)]
    seen = []
    for epoch in range(4):
        for order in orders:
            order.set_epoch(epoch)
        apart, mixed = (order.batches() for order in orders)
        # The same examples, in other company.
        examples = [sorted(row for batch in epoch for row in batch) for epoch in (apart, mixed)]
        assert examples[0] == examples[1] and len(mixed) == 13
        assert len(list(orders[1])) == len(orders[1]) == len(orders[0])
        owners = [{(row >= 30) + (row >= 42) for row in batch} for batch in mixed]
        assert set.union(*owners) == {0, 1, 2} and max(map(len, owners)) > 1
        # These batches are sorted as one group: their ranges of lengths do not overlap.
        ranges = sorted((min(every[i] for i in b), max(every[i] for i in b)) for b in mixed)
        assert all(low[1] <= high[0] for low, high in itertools.pairwise(ranges))
        seen.append(mixed)
    assert len({str(sorted(map(sorted, epoch))) for epoch in seen}) == 4
    fresh = MultiTaskOrder(lengths, batches, batching, 5, True)
    fresh.set_epoch(3)
    assert fresh.batches() == seen[3]


class Switched(torch.nn.Module):
    """An attached model and its heads, which are copied together."""

    def __init__(self, models: list, **fields) -> None:
        super().__init__()
        self.heads = TaskHeads(models[0], [take_head(model) for model in models])
        self.model = attached(model=models[0], **fields)

    def gradients(self, batches: list[dict], turns) -> tuple[Tensor, ...]:
        """Of the mean loss of all rows, `turns` around the calls of the model."""
        rows = [len(batch["input_ids"]) for batch in batches]
        loss = torch.zeros(())
        with turns as current:
            for number, batch in enumerate(batches):
                self.heads.activate(number)
                current.turn = number
                loss = loss + rows[number] / sum(rows) * self.model(**batch).loss
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return (loss.detach(), *torch.autograd.grad(loss, trained))


def labelled(head: str, lengths: tuple[int, ...], num_labels: int) -> dict[str, Tensor]:
    batch = make_batch(head, lengths, max(lengths))
    if head == "question":
        starts = torch.tensor([length // 2 for length in lengths])
        return {**batch, "start_positions": starts, "end_positions": starts + 1}
    if head == "token":
        labels = torch.randint(0, num_labels, batch["input_ids"].shape)
        return {**batch, "labels": labels.masked_fill(batch["attention_mask"] == 0, -100)}
    return {**batch, "labels": torch.randint(0, num_labels, (len(lengths),))}


@pytest.mark.parametrize(
    ("model_type", "head", "backbone"),
    [
        *itertools.product(
            ["bert"], ["sequence", "token", "question", "choice"], ["frozen", "hook"]
        ),
        ("roberta", "sequence", BACKBONES["roberta"][0]),
        ("deberta-v2", "token", BACKBONES["deberta-v2"][0]),
    ],
)
def test_a_mixed_batch_has_the_gradients_of_separate_ones(model_type, head, backbone):
    counts = (2, 5, 3) if head in ("sequence", "token") else (2, 2, 2)
    more = [{} if head in ("question", "choice") else {"num_labels": n} for n in counts]
    models = [tiny_model(model_type, head, **own) for own in more]
    switched = Switched(models, backbone=backbone).train()
    rows = ((5, 9), (11, 3, 4), (7,))
    batches = [labelled(head, *own) for own in zip(rows, counts, strict=True)]
    runs = []
    switched.model.base_model.register_forward_hook(lambda *unused: runs.append(0))
    actual = switched.gradients(batches, SharedPass(switched.model, batches, pad=1))
    assert len(runs) == 1

    def separate(copied: Switched) -> tuple[Tensor, ...]:
        return copied.gradients(batches, contextlib.nullcontext(types.SimpleNamespace()))

    assert_close_to_model(actual, separate, switched)


def test_models_without_a_backbone_inside_are_refused_for_mixed_batches():
    with pytest.raises(ValueError, match="mixed_batches: expected a model with a head around"):
        check_shared_pass(tiny_model("bert", "bare"))
    model = tiny_model()
    model.config.model_type = "longformer"
    with pytest.raises(
        ValueError, match=r"mixed_batches: expected a model of a known family.*long"
    ):
        check_shared_pass(model)


def uneven(trainer: TaskTrainer) -> tuple[dict, list[int]]:
    """A batch with unequal numbers of rows of the data sets, and these."""
    for batch in trainer.get_train_dataloader():
        rows = [len(part["input_ids"]) for _, part in batch["parts"]]
        if len(set(rows)) == 2:
            return batch, rows
    raise AssertionError("no such batch")


def gradients_of(trainer: TaskTrainer, loss: Tensor) -> list[Tensor]:
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize(
    "changes",
    [
        {"label_smoothing_factor": 0.1, "gradient_checkpointing": True, "backbone": "hook"},
        {"method": "fine-tuning"},
        {"method": "lora", "lora_dropout": 0.0},
        {"method": "prompt-tuning", "batch_size": None, "batch_tokens": 40},
    ],
)
def test_the_loss_of_a_mixed_batch_is_the_mean_over_its_rows(changes, tiny, tmp_path):  # noqa: F811
    trainer = make_trainer(tiny, tmp_path, mixed_batches=True, **changes)
    model = trainer.model.double().train()
    batch, rows = uneven(trainer)
    assert trainer.floating_point_ops(batch) > 0
    whole = gradients_of(trainer, trainer.compute_loss(model, copy.deepcopy(batch)))
    losses = [trainer.compute_loss(model, {"parts": [part]}) for part in batch["parts"]]
    mean = (rows[0] * losses[0] + rows[1] * losses[1]) / sum(rows)
    torch.testing.assert_close(whole, gradients_of(trainer, mean))


def test_a_mixed_batch_is_one_forward_of_a_distributed_model(tiny, tmp_path):  # noqa: F811
    trainer = make_trainer(tiny, tmp_path, mixed_batches=True, gradient_checkpointing=True)
    model = trainer.model.double().train()
    batch, _ = uneven(trainer)
    alone = gradients_of(trainer, trainer.compute_loss(model, batch))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)  # fmt: skip
    try:
        unused = trainer.args.ddp_find_unused_parameters
        wrapper = DistributedDataParallel(model, find_unused_parameters=unused)
        for parts in (batch["parts"], batch["parts"][:1], batch["parts"]):
            model.zero_grad()
            loss = trainer.compute_loss(wrapper, {"parts": parts})
            loss.backward()
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        torch.testing.assert_close([loss.detach(), *trained], alone)
        del wrapper
    finally:
        torch.distributed.destroy_process_group()
    assert "forward" not in vars(model)
