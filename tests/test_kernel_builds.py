"""Every shipped Triton kernel compiles for every target, within its registers and shared memory."""

import pytest

from tests.build_rules import (
    BOUNDED_TARGETS,
    HELPERS,
    elementwise_faults,
    faults,
    key_of,
    over_bounds,
    read_bounds,
)
from tests.json_lines import json_lines
from tests.sample_calls import STYLES

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


def build(targets, *options: str, processes: int = 1) -> list[dict]:
    """A second process takes as long to begin as most of these builds."""
    words = ("--processes", str(processes), "--targets", *targets, *options)
    return list(json_lines("tests.triton_builds", *words))


def assert_sound(rows: list[dict]) -> None:
    assert rows
    bounds = read_bounds()
    messages = [(key_of(row), fault) for row in rows for fault in faults(row)]
    messages += [(key_of(row), over) for row in rows for over in over_bounds(row, bounds)]
    assert not messages, "\n".join(map(str, messages))


@pytest.fixture(scope="module")
def common_builds() -> list[dict]:
    """bf16, head_dim 64, with and without dropout, on the two targets that have records."""
    return build(BOUNDED_TARGETS, "--dropout", "0.0", "0.1")


def test_common_kernels_are_sound(common_builds):
    assert_sound(common_builds)
    kernels = {row["kernel"] for row in common_builds}
    assert kernels >= {"prefix_attention_forward", "grad_query", "grad_key_value", "grad_prefix"}


def test_common_kernels_have_a_hottest_loop_and_a_record(common_builds):
    bounds = read_bounds()
    if not bounds:
        pytest.skip("no records of this version of triton")
    for row in common_builds:
        if row["kernel"] not in HELPERS:
            assert row["loop_matrix_instructions"] > 0, row
            assert over_bounds(row | {"instructions_per_mma": 1e9}, bounds), row


def test_other_targets_are_sound():
    assert_sound(build(["sm_100", "gfx942"], "--dropout", "0.1"))


def test_positions_gates_and_packed_banks_are_sound_and_packed_sums_are_padded_ones(common_builds):
    rows = build(["sm_80"], "--layouts", "positions", "packed", "gated")
    assert_sound(rows)
    packed = [row for row in rows if row["layout"] == "packed"]
    padded = {
        row["kernel"]: row["sum_orders"]
        for row in common_builds
        if (row["target"], row["dropout"]) == ("sm_80", 0.0)
    }
    assert padded["prefix_attention_forward"]
    assert {row["kernel"]: row["sum_orders"] for row in packed} == padded


def assert_elementwise_sound(rows: list[dict]) -> None:
    names = {"bias_activation", "gated_activation", "dropout_add_norm"}
    names |= {name + "_backward" for name in names}
    names |= {"norm_from_stats", "dropout_add", "dropout_backward", "rotate"}
    assert {row["kernel"] for row in rows} == names
    messages = [(row, fault) for row in rows for fault in elementwise_faults(row)]
    assert not messages, "\n".join(map(str, messages))


def test_elementwise_kernels_are_sound():
    options = "--columns 768 --dropout 0.1 --pairs mixed --styles bert glm".split()
    assert_elementwise_sound(build(["sm_80", "gfx942"], *options))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_elementwise_kernels_are_sound_on_every_target(target):
    every_style = ("--columns", "768", "--dropout", "0.1", "--styles", *STYLES)
    every_width = ("--columns", "1024", "4096", "--dropout", "0.0", "0.1")
    assert_elementwise_sound(build([target], *every_style, processes=2))
    assert_elementwise_sound(build([target], *every_width, processes=2))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_whole_matrix_is_sound(target, dtype):
    head_dims = ("16", "32", "64", "80", "128", "256")
    options = ("--dtypes", dtype, "--head-dims", *head_dims, "--dropout", "0.0", "0.1")
    assert_sound(build([target], *options, processes=2))
    assert_sound(build([target], *options, "--prefix-dropout", "0.1", processes=2))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_other_layouts_are_sound_on_every_target(target):
    layouts = ("short_prefix", "rows", "packed", "biased", "positions", "gated")
    assert_sound(build([target], "--layouts", *layouts, "--dropout", "0.0", "0.1", processes=2))
