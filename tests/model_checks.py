"""A small BERT with frozen blocks, on any device: against transformers and between policies."""

import copy
import warnings

import torch

from ptv2_fast import AdapterBank
from ptv2_fast.frozen.spec import POLICIES
from tests.models import (
    DROPOUT,
    WITHOUT_FALLBACK,
    assert_close_to_model,
    attached,
    check_equals_concatenation,
    make_batch,
    set_fields,
    step_results,
    tiny_model,
)

HEAD = "token"
# Heads of width 32, and products that tensor cores compute.
ON_DEVICE = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "initializer_range": 0.1,
}


def made_on(device: torch.device, dtype: torch.dtype, **overrides):
    """A plain model and a batch."""
    sizes = ON_DEVICE if device.type == "cuda" else {}
    plain = tiny_model(head=HEAD, **sizes, **overrides).to(device, dtype)
    lengths = (37, 20, 1, 9) if device.type == "cuda" else (11, 7)
    batch = make_batch(HEAD, lengths, width=max(lengths))
    return plain, {name: tensor.to(device) for name, tensor in batch.items()}


def check_model(device: torch.device, dtype: torch.dtype, **fields) -> float:
    """Outputs and prefix gradients against transformers' cache, no kernel replaced by torch."""
    plain, batch = made_on(device, dtype)
    model = attached(HEAD, model=copy.deepcopy(plain), **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        return check_equals_concatenation(plain, model, batch, HEAD, dtype=dtype)


def check_bank(device: torch.device, dtype: torch.dtype, backbone: str) -> float:
    """A mixed batch and its gradients against each adapter in a model of its own."""
    plain, batch = made_on(device, dtype)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    ways = ({"num_virtual_tokens": 1}, {"num_virtual_tokens": 37}, {"layers": (1, 2)})
    models = [
        attached(HEAD, model=copy.deepcopy(plain), backbone=backbone, **fields) for fields in ways
    ]
    bank = AdapterBank(copy.deepcopy(plain), backbone=backbone)
    for number, model in enumerate(models):
        bank.add(f"adapter-{number}", model)
    rows = [(text, number) for text in range(len(lengths)) for number in range(len(models))]
    grads = [torch.randn(lengths[text], plain.config.num_labels).to(device) for text, _ in rows]

    def results(logits: list, parameters: list) -> tuple[torch.Tensor, ...]:
        loss = sum((row * grad.to(row)).sum() for row, grad in zip(logits, grads, strict=True))
        return (*(row.detach() for row in logits), *torch.autograd.grad(loss, parameters))

    def separate(*models) -> tuple[torch.Tensor, ...]:
        whole = [model(**batch).logits for model in models]
        logits = [whole[number][text, : lengths[text]] for text, number in rows]
        return results(logits, [model.prefix_encoder.embedding.weight for model in models])

    bank.train_mode(bank.names)
    asked = [list(bank.names) for _ in lengths]
    logits = [row for text in bank(adapter_names=asked, **batch) for row in text]
    actual = results(logits, [bank.parameters_of(name)[0] for name in bank.names])
    return assert_close_to_model(actual, separate, *models, dtype=dtype)


def check_policies_give_equal_bits(device: torch.device, precision: str) -> None:
    """With dropout everywhere. `precision`: float32, bfloat16 or autocast."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    plain, batch = made_on(device, dtype, **DROPOUT)
    model = attached(HEAD, model=plain, prefix_dropout=0.2, **WITHOUT_FALLBACK).train()
    expected = None
    for policy in POLICIES:
        set_fields(model, recompute=policy)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast"):
            results = step_results(model, batch, HEAD)
        expected = results if expected is None else expected
        for index, (actual, wanted) in enumerate(zip(results, expected, strict=True)):
            assert torch.equal(actual, wanted), f"{policy}, result {index}"
