"""What the benchmarks compare: cases, the gates in front of their figures, who is left out."""

import csv
from itertools import product

import pytest
import torch

from bench import bench_training_step, training_step
from bench.attention_cases import Case as AttentionCase
from bench.attention_cases import check_numerics, inputs_of
from bench.attention_providers import running_calls, timed_calls
from bench.cases import ACCEPTANCE_CASES, CPU_CASES, DENSITIES, FAMILY_CASES, Case, spread_lengths
from bench.models import FLASH, METHODS, MODELS, why_left_out
from bench.roofline import one_product
from bench.shapes import AttentionShape
from bench.training_step import check_gradients, small_case
from tests.models import one_thread  # noqa: F401

CPU = torch.device("cpu")
OTHERS = {"modernbert": "ModernBertModel", "nomic_bert": "NomicBertModel"}
OTHERS = {family: name for family, name in OTHERS.items() if f"{family}-tiny" in MODELS}
SHAPES = {
    "plain": AttentionShape(3, 2, 24, 24, 5, 16),
    "window": AttentionShape(3, 2, 24, 24, 5, 16, window=3),
    "bias": AttentionShape(3, 2, 24, 24, 5, 16, has_bias=True),
    "positions": AttentionShape(3, 2, 24, 24, 5, 16, has_positions=True),
}


def test_every_sequence_has_a_token():
    for batch, tokens, density in product((1, 2, 7, 32, 400), (1, 16, 128), DENSITIES.values()):
        lengths = spread_lengths(batch, tokens, density)
        assert len(lengths) == batch and 1 <= min(lengths) <= max(lengths) <= tokens
    cases = (*ACCEPTANCE_CASES, *CPU_CASES, *FAMILY_CASES)
    assert all(min(case.sequence_lengths()) >= 1 for case in cases)
    assert len({str(case) for case in FAMILY_CASES}) == len(FAMILY_CASES)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["roberta", *OTHERS])
def test_the_gate_of_a_training_step_holds(family, dtype):
    check_gradients(small_case(Case(f"{family}-tiny", 8, 16, 4, dtype)), "cpu")


@pytest.mark.skipif("modernbert" not in OTHERS, reason="transformers has no windows here")
def test_the_gate_of_a_training_step_sees_a_window(monkeypatch):
    """A token more on each side fails."""
    case, stock = small_case(Case("modernbert-tiny", 8, 16, 4)), training_step.classifier

    def wider(*arguments):
        model = stock(*arguments)
        model.config.local_attention += 2
        return model

    monkeypatch.setattr(training_step, "classifier", wider)
    with pytest.raises(SystemExit, match="gradient of hook is off by"):
        check_gradients.__wrapped__(case, "cpu")


def test_methods_that_cannot_serve_a_family_are_left_out_with_a_reason():
    for family, backbone in OTHERS.items():
        case = Case(f"{family}-tiny", 2, 16, 4)
        reasons = {method: why_left_out(method, case, "cpu") for method in METHODS}
        reasons = {method: reason for method, reason in reasons.items() if "peft" not in method}
        assert reasons.pop(FLASH)
        assert reasons.pop("prefix, original recipe") == f"{backbone} takes no past keys and values"
        for policy in ("none", "ffn+qkv"):
            reason = reasons.pop(f"frozen {policy}, biases and norms")
            assert reason == f"{family} has no biases that could train"
        assert not any(reasons.values())
    assert why_left_out("prefix, original recipe", Case("bert-tiny", 2, 16, 4), "cpu") is None


@pytest.mark.parametrize("family", OTHERS)
def test_a_whole_case_of_another_family_is_measured(family, tmp_path):
    case = Case(f"{family}-tiny", 2, 16, 4, "bf16", 0.0, "pad50")
    output = bench_training_step.Output(tmp_path / "steps.csv")
    chosen = ["frozen none", "full fine-tuning, sdpa", "prefix, original recipe"]
    bench_training_step.measure_case(case, chosen, 1, output)
    with output.path.open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows.keys() == set(chosen[:2]) and {row["case"] for row in rows.values()} == {str(case)}
    assert all(float(row["step ms"]) > 0 for row in rows.values())
    assert rows["frozen none"]["formula B/token/layer"] == rows["frozen none"]["kept B/token/layer"]
    assert rows["full fine-tuning, sdpa"]["formula B/token/layer"] == ""


@pytest.mark.parametrize("name", SHAPES)
def test_every_way_of_attention_computes_the_same(name):
    for dtype, density, backward in (("fp32", 0.5, True), ("bf16", 1.0, False)):
        case = AttentionCase(name, SHAPES[name], dtype, density, 0.0, backward, CPU)
        check_numerics(case, "cpp")
        running, refusals = running_calls(timed_calls(inputs_of(case), 0.0, backward), 0.0)
        assert {"concat+sdpa", "concat+eager"} <= running.keys()
        assert refusals.keys() <= {"split"} and (name == "plain") == ("split" in running)
        assert all("expected None" in reason for reason in refusals.values())


def test_products_count_what_a_row_sees():
    mask = torch.arange(24) < torch.tensor([24, 9, 1])[:, None]
    plain, window = SHAPES["plain"], SHAPES["window"]
    flops = 2 * 2 * 16  # of one pair, both heads
    assert one_product(plain, mask) == flops * 24 * (24 + 9 + 1 + 3 * 5)
    seen = sum(
        1 for length in (24, 9, 1) for i in range(24) for j in range(length) if abs(i - j) <= 3
    )
    assert one_product(window, mask) == flops * (seen + 24 * 3 * 5)
