"""The plain Trainer of transformers on an attached model: checkpoints, resume, best model."""

import dataclasses
import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

import ptv2_fast
from ptv2_fast import PTuningV2Config
from tests.models import MODEL_TYPES, make_batch, one_thread, tiny_model  # noqa: F401

STEPS = 6
# What transformers calls deprecated must not reach a user by our doing.
pytestmark = pytest.mark.filterwarnings("error::FutureWarning")


class Examples(torch.utils.data.Dataset):
    """Twelve short texts with random labels, padded to one width or all of full length."""

    def __init__(self, padded: bool = True) -> None:
        generator = torch.Generator().manual_seed(3)
        lengths = torch.randint(4, 12, (12,), generator=generator) if padded else [11] * 12
        torch.manual_seed(3)
        self.batch = {
            **make_batch(lengths=list(lengths)),
            "labels": torch.randint(0, 3, (12,)),
            "unused_column": torch.zeros(12),
        }

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict:
        return {name: tensor[index] for name, tensor in self.batch.items()}


class KilledError(Exception):
    """Stands for a crash in the middle of training."""


class Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **unused) -> None:
        if state.global_step == self.step:
            raise KilledError


def make_trainer(
    directory, callbacks=(), padded: bool = True, model_type: str = "bert", more=None, **arguments
) -> Trainer:
    """`more`: fields of the prefix."""
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    model = tiny_model(model_type, **dropout)
    fields = {"prefix_projection": True, "prefix_dropout": 0.1, **(more or {})}
    ptv2_fast.attach(model, PTuningV2Config(num_virtual_tokens=5, **fields))
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(str(directory), **{**defaults, **arguments}),
        train_dataset=Examples(padded),
        eval_dataset=Examples(padded),
        callbacks=list(callbacks),
    )


def trained_tensors(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_bit_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


KINDS = {  # and what trains beside the prefix
    "bert": {},
    "roberta": {"train_biases": True, "train_norms": True},
    "modernbert": {},
    "llama": {"train_norms": True},
}


@pytest.mark.parametrize("kind", [name for name in KINDS if name in MODEL_TYPES])
def test_a_killed_run_resumes_to_the_same_bits(kind, tmp_path, caplog):
    what = {"model_type": kind, "more": KINDS[kind]}
    whole = make_trainer(tmp_path / "whole", **what)
    whole.train()
    killed = make_trainer(tmp_path / "killed", [Kill(step=5)], **what)
    with pytest.raises(KilledError):
        killed.train()
    resumed = make_trainer(tmp_path / "killed", **what)
    start = trained_tensors(resumed.model)
    with caplog.at_level(logging.WARNING, "transformers"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert_bit_equal(trained_tensors(resumed.model), trained_tensors(whole.model))
    moved = trained_tensors(whole.model)
    assert all(not torch.equal(moved[name], start[name]) for name in moved)
    assert not [r for r in caplog.records if "keys in the checkpoint" in r.getMessage()]


def test_the_weights_of_checkpoints_are_the_adapter_alone(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"model.safetensors", "ptv2_config.json"} <= names
    trained = trained_tensors(trainer.model)
    saved = {name: t for name, t in load_file(checkpoint / "model.safetensors").items() if len(t)}
    assert_bit_equal(saved, trained)
    bytes_trained = sum(4 * tensor.numel() for tensor in trained.values())
    assert (checkpoint / "model.safetensors").stat().st_size < bytes_trained + 1500


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    scores = iter([1, 3, 2, 1, 0, 1])
    trainer = make_trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    trainer.compute_metrics = lambda prediction: {"score": next(scores)}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best, last = (
        load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (2, STEPS)
    )
    end = trained_tensors(trainer.model)
    assert_bit_equal(end, {name: best[name] for name in end})
    assert all(not torch.equal(best[name], last[name]) for name in end)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("use_reentrant", [None, True])
@pytest.mark.filterwarnings("ignore:reentrant gradient checkpointing:UserWarning")
def test_gradient_checkpointing_trains_the_same_prefix(tmp_path, padded, use_reentrant):
    names = [field.name for field in dataclasses.fields(TrainingArguments)]
    name = "activation" if "activation_checkpointing" in names else "gradient"
    checkpointing = {f"{name}_checkpointing": True}
    if use_reentrant:
        checkpointing[f"{name}_checkpointing_kwargs"] = {"use_reentrant": True}
    results = []
    for arguments in ({}, checkpointing):
        trainer = make_trainer(tmp_path, padded=padded, save_strategy="no", **arguments)
        start = trained_tensors(trainer.model)
        trainer.train()
        results.append(trained_tensors(trainer.model))
    assert_bit_equal(*results)
    assert all(not torch.equal(results[1][name], start[name]) for name in start)


def test_bfloat16_training_moves_a_float32_prefix(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True, save_strategy="no")
    start = trained_tensors(trainer.model)
    trainer.train()
    end = trained_tensors(trainer.model)
    assert all(tensor.dtype == torch.float32 for tensor in end.values())
    assert all(not torch.equal(start[name], end[name]) for name in start)


def test_the_final_folder_loads_into_a_fresh_model(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    torch.manual_seed(0)
    fresh = ptv2_fast.load_adapter(tiny_model(), tmp_path / "final")
    batch = make_batch()
    assert torch.equal(fresh(**batch).logits, trainer.model.eval()(**batch).logits)
