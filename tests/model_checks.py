"""A small BERT with frozen blocks, on any device: against transformers and between policies."""

import copy
import warnings

import torch

from ptv2_fast.frozen.spec import POLICIES
from tests.models import (
    DROPOUT,
    WITHOUT_FALLBACK,
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
