"""The host code of the Triton kernels on a GPU that only compiles: grids, limits, recompilation."""

from math import ceil

import pytest

from tests.json_lines import json_lines

BACKWARD = ["delta", "grad_query", "grad_key_value", "grad_prefix", "sum_partials"]
FORWARD_BACKWARD = ["prefix_attention_forward", *BACKWARD]
HEADS, PREFIX = 3, 100


@pytest.fixture(scope="module")
def scenarios() -> dict[str, dict]:
    return {result["scenario"]: result for result in json_lines("tests.dry_run")}


def kernels(result: dict) -> list[str]:
    return [launch["kernel"] for launch in result["launches"]]


def assert_grids(result: dict, batch: int, longest: int, rows_of_bank: int = 1, group: int = 1):
    """Tiles of each sequence times sequences, then heads; no program for nothing."""
    assert kernels(result) == FORWARD_BACKWARD
    for launch in result["launches"]:
        queries, keys = launch["block_queries"], launch["block_keys"]
        if launch["kernel"] in ("prefix_attention_forward", "grad_query"):
            assert launch["grid"] == [ceil(longest / queries) * batch, HEADS * group, 1]
        elif launch["kernel"] == "grad_key_value":
            assert launch["grid"] == [ceil(longest / keys) * batch, HEADS, 1]
        elif launch["kernel"] == "grad_prefix":
            tiles, heads, splits = launch["grid"]
            assert [tiles, heads] == [ceil(PREFIX / keys), HEADS]
            assert splits % rows_of_bank == 0
            assert 1 <= splits // rows_of_bank <= batch


def test_grids_of_padded_calls(scenarios):
    assert_grids(scenarios["padded"], batch=2, longest=200)


def test_grids_of_grouped_heads(scenarios):
    assert_grids(scenarios["grouped_joint"], batch=2, longest=200, group=2)


def test_grids_of_packed_calls(scenarios):
    assert_grids(scenarios["packed"], batch=4, longest=200)


def test_grids_of_banks(scenarios):
    assert_grids(scenarios["packed_bank"], batch=3, longest=200, rows_of_bank=2)


def test_raw_operators_launch_what_the_launchers_do(scenarios):
    assert scenarios["raw_operators"]["launches"] == scenarios["padded"]["launches"]


def test_first_layer_computes_the_gradient_of_the_prefix_alone(scenarios):
    launched = kernels(scenarios["first_layer"])
    assert launched == ["prefix_attention_forward", "delta", "grad_prefix", "sum_partials"]


def test_compiled_model_traces_and_launches(scenarios):
    assert kernels(scenarios["compiled_model"]) == FORWARD_BACKWARD


@pytest.mark.parametrize("name", ["other_sizes", "other_lengths"])
def test_other_sizes_recompile_nothing(scenarios, name):
    first, *later = scenarios[name]["compilations"]
    assert first == len(FORWARD_BACKWARD)
    assert later == [0] * len(later)


def test_other_numbers_of_rows_recompile_no_elementwise_kernel(scenarios):
    first, *later = scenarios["other_rows"]["compilations"]
    assert first == len(set(kernels(scenarios["other_rows"])))
    assert later == [0] * len(later)


def test_other_prefix_lengths_recompile_for_the_shape_of_tiles_alone(scenarios):
    """A prefix keeps its length in training: kernels are built for tiles as short as it."""
    result = scenarios["other_prefixes"]
    versions = {(launch["kernel"], launch["constants"]) for launch in result["launches"]}
    assert sum(result["compilations"]) == len(versions)
    assert len(versions) <= 4 * len(FORWARD_BACKWARD)


def test_other_biases_recompile_for_alignment_alone(scenarios):
    """Once for aligned rows and once for others; all that take the options, read or not."""
    first, *later = scenarios["other_biases"]["compilations"]
    assert first == len(FORWARD_BACKWARD)
    assert sum(later) <= len(FORWARD_BACKWARD)


def test_launches_are_served_by_the_kernels_that_triton_chooses(scenarios):
    result = scenarios["random_calls"]
    assert result["differ"] == 0
    assert result["launches"] > 1000 and result["chosen"] > 100
    assert 2 * result["direct"] > result["launches"], "what was launched before goes directly"


def test_too_little_shared_memory_raises(scenarios):
    result = scenarios["little_shared_memory"]
    assert "out of resource: shared memory" in result["error"]
    assert "4096" in result["error"]
    assert result["launches"] == []
