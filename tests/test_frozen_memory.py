"""What the frozen block keeps by formula, and the policies that a budget buys."""

import re
from dataclasses import replace
from itertools import pairwise, product

import pytest

from ptv2_fast.frozen.memory import (
    choose_policies,
    kept_bytes_per_token,
    peak_bytes,
    recompute_flops_per_token,
)
from ptv2_fast.frozen.spec import POLICIES, UPPER_BLOCK, BlockShape

BASE = BlockShape(768, 3072, 12, 12, 64, False, element_bytes=2, residual_bytes=2)
TOKENS, CHUNK, COLUMNS = 4096, 1024, 640


def choose(budget, shape=BASE, layers=12, lowest=0):
    return choose_policies(
        budget, TOKENS, shape, layers, lowest, chunk=CHUNK, columns=COLUMNS
    )  # fmt: skip


def cost(policies, shape=BASE):
    return sum(recompute_flops_per_token(policy, shape, COLUMNS) for policy in policies)


def test_kept_bytes_in_bf16_are_those_of_the_design():
    h, a = BASE.hidden, BASE.heads
    kept = [kept_bytes_per_token(policy, BASE) for policy in POLICIES]
    assert kept == [20 * h + 4 * a + 16, 12 * h + 4 * a + 16, 6 * h + 4 * a + 16, 2 * h + 8]
    lowest = [kept_bytes_per_token(policy, BASE, UPPER_BLOCK.of_lowest()) for policy in POLICIES]
    assert lowest == [16 * h + 4 * a + 16, 8 * h + 4 * a + 16, 8 * h + 4 * a + 16, 4 * h + 8]


def test_autocast_keeps_totals_in_the_residual_dtype():
    autocast = replace(BASE, residual_bytes=4)
    for policy, totals in zip(POLICIES, (2, 2, 2, 1), strict=True):
        added = kept_bytes_per_token(policy, autocast) - kept_bytes_per_token(policy, BASE)
        assert added == totals * 2 * 768


def test_recomputation_is_the_share_of_a_step_that_the_design_says():
    flops = [recompute_flops_per_token(policy, BASE, columns=0) for policy in POLICIES]
    assert flops == [0, 8 * 768**2, 14 * 768**2, 16 * 768**2]


def test_budget_met_exactly_is_met():
    for policy in ("none", "block"):
        needed = peak_bytes((policy,) * 12, TOKENS, BASE, CHUNK)
        assert cost(choose(needed)) <= cost((policy,) * 12)
    everything = peak_bytes(("none",) * 12, TOKENS, BASE, CHUNK)
    assert choose(everything) == ("none",) * 12
    assert cost(choose(everything - 1)) > 0


def test_smaller_budget_never_recomputes_less_and_always_fits():
    most = peak_bytes(("none",) * 12, TOKENS, BASE, CHUNK)
    least = peak_bytes(("block",) * 12, TOKENS, BASE, CHUNK)
    budgets = range(least, most + 1, (most - least) // 40)
    chosen = [choose(budget) for budget in budgets]
    assert all(
        peak_bytes(policies, TOKENS, BASE, CHUNK) <= budget
        for policies, budget in zip(chosen, budgets, strict=True)
    )
    assert all(cost(larger) <= cost(smaller) for smaller, larger in pairwise(chosen))


def test_choice_is_within_one_step_of_the_best_of_all():
    """Against every assignment of a four-layer encoder."""
    every = [
        (peak_bytes(policies, TOKENS, BASE, CHUNK), cost(policies))
        for policies in product(POLICIES, repeat=4)
    ]
    step = cost(("block",))
    for budget in range(min(every)[0], max(every)[0], 10**7):
        best = min(flops for peak, flops in every if peak <= budget)
        assert best <= cost(choose(budget, layers=4)) < best + step


def test_layers_below_the_lowest_prefix_are_free():
    needed = peak_bytes(("none",) * 4, TOKENS, BASE, CHUNK)
    assert choose(needed, lowest=8) == ("none",) * 4


def test_budget_too_small_names_the_least_that_fits():
    with pytest.raises(ValueError, match="memory_budget: expected at least") as error:
        choose(10**6)
    least = int(re.search(r"at least (\d+)", str(error.value)).group(1))
    assert "got 1000000" in str(error.value)
    choose(least)
    with pytest.raises(ValueError):
        choose(least - 1)
