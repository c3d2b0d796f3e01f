"""What the benchmarks compare: cases, the gates in front of their figures, who is left out."""

import csv
from itertools import product

import pytest

from bench import bench_training_step, training_step
from bench.cases import ACCEPTANCE_CASES, CPU_CASES, DENSITIES, FAMILY_CASES, Case, spread_lengths
from bench.models import FLASH, METHODS, why_left_out
from bench.training_step import check_gradients, small_case
from tests.models import one_thread  # noqa: F401


def test_every_sequence_has_a_token():
    for batch, tokens, density in product((1, 2, 7, 32, 400), (1, 16, 128), DENSITIES.values()):
        lengths = spread_lengths(batch, tokens, density)
        assert len(lengths) == batch and 1 <= min(lengths) <= max(lengths) <= tokens
    cases = (*ACCEPTANCE_CASES, *CPU_CASES, *FAMILY_CASES)
    assert all(min(case.sequence_lengths()) >= 1 for case in cases)
    assert len({str(case) for case in FAMILY_CASES}) == len(FAMILY_CASES)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["roberta", "modernbert", "nomic_bert"])
def test_the_gate_of_a_training_step_holds(family, dtype):
    check_gradients(small_case(Case(f"{family}-tiny", 8, 16, 4, dtype)), "cpu")


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
    for family, backbone in (("modernbert", "ModernBertModel"), ("nomic_bert", "NomicBertModel")):
        case = Case(f"{family}-tiny", 2, 16, 4)
        reasons = {method: why_left_out(method, case, "cpu") for method in METHODS}
        reasons = {method: reason for method, reason in reasons.items() if "peft" not in method}
        assert reasons.pop(FLASH)
        assert reasons.pop("prefix, original recipe") == f"{backbone} takes no past keys and values"
        assert not any(reasons.values())
    assert why_left_out("prefix, original recipe", Case("bert-tiny", 2, 16, 4), "cpu") is None


def test_a_whole_case_of_another_family_is_measured(tmp_path):
    case = Case("modernbert-tiny", 2, 16, 4, "bf16", 0.0, "pad50")
    output = bench_training_step.Output(tmp_path / "steps.csv")
    chosen = ["frozen none", "full fine-tuning, sdpa", "prefix, original recipe"]
    bench_training_step.measure_case(case, chosen, 1, output)
    with output.path.open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows.keys() == set(chosen[:2]) and {row["case"] for row in rows.values()} == {str(case)}
    assert all(float(row["step ms"]) > 0 for row in rows.values())
    assert rows["frozen none"]["formula B/token/layer"] == rows["frozen none"]["kept B/token/layer"]
    assert rows["full fine-tuning, sdpa"]["formula B/token/layer"] == ""
