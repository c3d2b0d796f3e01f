"""The bench's formulas of kept bytes against a count of what autograd saves."""

import pytest

from bench.cases import Case
from bench.memory_model import (
    Batch,
    Encoder,
    has_formula,
    kept_bytes_of_layer,
    largest_batch,
    predict_step,
)
from bench.models import GATED, METHODS, MODELS, why_left_out
from bench.step_columns import batch_of, encoder_of, kept_columns
from bench.training_step import Step, kept_bytes_per_layer
from tests.models import one_thread  # noqa: F401

pytest.importorskip("peft")
SEED_BYTES = 8  # of a layer's dropout
ENCODER = Encoder(layers=2, hidden=64, heads=4, intermediate=256)


@pytest.fixture
def small(monkeypatch):
    from transformers import BertConfig

    config = BertConfig(hidden_size=64, num_attention_heads=4, intermediate_size=256)
    monkeypatch.setitem(MODELS, "small", config)


@pytest.mark.parametrize(
    ("dtype", "dropout", "lengths"),
    [("fp32", 0.0, "pad50"), ("bf16", 0.1, "full")],
)
def test_formulas_give_what_autograd_keeps(small, dtype, dropout, lengths):
    case = Case("small", 4, 32, 8, dtype, dropout, lengths)
    batch = Batch(
        sequences=4, tokens=32, prefix=8, element_bytes=case.torch_dtype.itemsize,
        real_tokens=sum(case.sequence_lengths()), has_dropout=dropout > 0, device="cpu",
    )  # fmt: skip
    for method in METHODS:
        if why_left_out(method, case, "cpu") is not None:
            continue
        counted = kept_bytes_per_layer(method, case, "cpu")
        formula = kept_bytes_of_layer(method, ENCODER, batch)
        assert 0 <= counted - formula <= SEED_BYTES, method


@pytest.mark.parametrize("family", [f for f in GATED if f"{f}-tiny" in MODELS])
def test_blocks_of_other_kinds_keep_their_spec_s_sum_and_their_rivals_are_counted(family):
    """BERT's formulas would be wrong for the latter."""
    case = Case(f"{family}-tiny", 4, 24, 8, "bf16", 0.0, "pad50")
    encoder, batch = encoder_of(case), batch_of(case, "cpu")
    for policy in ("none", "ffn+qkv"):
        counted = kept_bytes_per_layer(f"frozen {policy}", case, "cpu")
        assert counted == kept_bytes_of_layer(f"frozen {policy}", encoder, batch)
    columns = kept_columns(case, "full fine-tuning, sdpa", "cpu")
    assert columns.keys() == {"kept B/token/layer"} and columns["kept B/token/layer"] > 0
    assert not any(has_formula(name, encoder) for name in METHODS if not name.startswith("frozen"))


def test_parameters_are_those_of_the_model(small):
    case = Case("small", 1, 8, 4)
    for method in ("full fine-tuning, sdpa", "prefix, peft sdpa", "LoRA r8, peft sdpa"):
        if why_left_out(method, case, "cpu") is not None:
            continue
        step = Step(METHODS[method](case, 2), case, "cpu")
        trained = sum(p.numel() for p in step.trained)
        batch = Batch(sequences=1, tokens=8, prefix=4, element_bytes=4)
        predicted = predict_step(method, ENCODER, batch).gradients // 4
        assert 0 <= trained - predicted <= 2 * (64 * 2 + 2), method  # the head, which PEFT copies


def test_largest_batch_fits_and_one_more_does_not():
    batch = Batch(sequences=1, tokens=128, prefix=20)
    for method in METHODS:
        budget = 3 * 10**7
        largest = largest_batch(budget, method, ENCODER, batch)
        peaks = [
            predict_step(method, ENCODER, Batch(count, 128, 20)).peak
            for count in (largest, largest + 1)
        ]
        assert peaks[0] <= budget < peaks[1], method
    assert largest_batch(1000, "hook", ENCODER, batch) == 0
