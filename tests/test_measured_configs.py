"""Measured launch configurations: read from a file, by what does not depend on the batch."""

import pytest
import torch

from ptv2_kernels import configs
from ptv2_kernels.arguments import describe_call
from ptv2_kernels.measured import Config, Workload, measured_configs, write_measured
from tests.attention_checks import check
from tests.inputs import Shape, make_inputs

ORIGIN = {"card": "a card", "date": "2026-01-01"}
FOUND = Config(16, 16, 2, 1)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The path of a table that is read once it is written."""
    path = tmp_path / "table.json"
    monkeypatch.setenv("PTV2_TUNED", str(path))
    caches = (configs._launch_options, configs.chosen_config, measured_configs)
    for cache in caches:
        cache.cache_clear()
    yield path
    for cache in caches:
        cache.cache_clear()


def options_of(kernel: str, prefix_length: int | None, dropout_p: float = 0.0) -> dict:
    inputs = make_inputs(Shape(1, 1, 4, 4, 3, 64), torch.bfloat16)
    query, key, _, prefix_key, _ = inputs.raw_tensors
    call = describe_call(query, key, prefix_key, *inputs.raw_options(dropout_p))
    return configs.launch_options(kernel, query, call.extras, prefix_length)


def test_an_entry_serves_its_kernel_width_dtype_dropout_and_prefix_class(table):
    key = Workload("forward", 64, 2, True, 20).key
    assert key == Workload("forward", 64, 2, True, 32).key
    write_measured(table, configs.architecture(), ORIGIN, {key: FOUND})
    assert options_of("forward", 20, 0.1)["BLOCK_QUERIES"] == 16
    for other in (("forward", 33, 0.1), ("forward", 20, 0.0), ("query", 20, 0.1)):
        assert options_of(*other)["BLOCK_QUERIES"] == 64


def test_entries_of_a_second_run_join_those_of_the_first(table):
    first, second = Workload("query", 64, 2, True, 20).key, Workload("prefix", 64, 2, True, 20).key
    write_measured(table, 90, ORIGIN, {first: Config(64, 64, 4, 2)})
    write_measured(table, 90, ORIGIN, {first: FOUND, second: FOUND})
    assert measured_configs(90) == {first: FOUND, second: FOUND}
    assert measured_configs(80) == {}, "measured on another architecture"


@pytest.mark.parametrize("content", ["", "[]", '{"architecture": 80, "configs": {"a": {"x": 1}}}'])
def test_a_file_that_is_no_table_is_an_error(table, content):
    table.write_text(content)
    with pytest.raises(ValueError, match="PTV2_TUNED: expected a file"):
        measured_configs(80)


def test_named_file_that_is_missing_is_an_error(table):
    with pytest.raises(ValueError, match="PTV2_TUNED"):
        measured_configs(80)


@pytest.mark.usefixtures("nan_filled_empty")
def test_measured_tiles_match_oracle(table):
    keys = [
        Workload(kernel, 32, 4, True, None if kernel == "key_value" else 7).key
        for kernel in ("forward", "query", "key_value", "prefix")
    ]
    write_measured(table, configs.architecture(), ORIGIN, dict.fromkeys(keys, FOUND))
    check(["triton"], Shape(2, 2, 35, 35, 7, 32), torch.float32, "random", 0.1, 0.0)
