"""DeBERTa's attention behind a prefix: every backend by the numerics rule, slots, bad arguments."""

import dataclasses

import pytest
import torch

from ptv2_fast import disentangled_prefix_attention
from ptv2_fast.ops.disentangled import position_slots
from ptv2_fast.ops.registration import POSITION_BACKENDS
from ptv2_kernels import configs
from ptv2_kernels.measured import Config
from tests.attention_checks import (
    assert_equal_bits,
    check,
    check_equal_sequences_give_equal_bits,
    check_inputs,
    check_joint_gradients,
    check_only_needed_gradients,
    check_packed_equals_padded,
    check_prefix_only_backward_never_reads_the_tokens,
    check_runs_are_bit_equal,
    raw_pair,
)
from tests.devices import CPU, device_of, interpreted
from tests.inputs import MASKS, POSITIONS, Shape, make_inputs
from tests.oracle import run_backend
from tests.triton_interpreter import bounds_checked

# batch, heads, queries, tokens, prefix, head_dim
SHAPES = [
    Shape(3, 2, 17, 17, 5, 64),
    Shape(1, 1, 1, 1, 1, 8),
    Shape(2, 2, 40, 40, 0, 32),
    Shape(2, 2, 33, 33, 100, 80),
    Shape(2, 2, 0, 0, 3, 16),
]


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("backend", POSITION_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("positions", POSITIONS)
def test_backend_matches_oracle(positions, shape, dtype, backend):
    mask = MASKS[SHAPES.index(shape) % len(MASKS)]
    if backend == "triton":
        shape = dataclasses.replace(shape, batch=1, heads=1, prefix=min(shape.prefix, 20))
    check([backend], shape, dtype, mask, 0.0, 0.0, positions=positions, lse=True)
    options = {"positions": positions, "packed": True, "bank": 2 if shape.prefix else 0}
    check([backend], shape, dtype, mask, 0.1, 0.2, **options)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("tokens", "prefix"), [(128, 20), (512, 100), (512, 0)])
def test_cpp_matches_oracle_on_long_texts(tokens, prefix, dtype):
    """Several blocks of columns; distances that share slots, and many that do not."""
    shape = Shape(1, 1, tokens, tokens, prefix, 64)
    for positions, p in (("both", 0.0), ("c2p", 0.1)):
        check(["cpp"], shape, dtype, "right padding", p, p, positions=positions)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_cpp_bits_and_gradients(positions, dtype):
    """Whatever the layout, the batch and the gradients that are wanted."""
    shape, made = Shape(3, 2, 150, 150, 70, 32), {"positions": positions}
    check_packed_equals_padded("cpp", dtype, CPU, shape, **made)
    check_equal_sequences_give_equal_bits("cpp", dtype, CPU, shape, **made)
    check_joint_gradients("cpp", CPU, shape, **made)
    check_only_needed_gradients("cpp", CPU, shape, **made)
    check_prefix_only_backward_never_reads_the_tokens("cpp", CPU, **made)


def test_the_cpu_is_served_by_cpp():
    inputs = make_inputs(Shape(2, 2, 40, 40, 5, 32), torch.float32, positions="both")
    expected = run_backend(inputs, "cpp", 0.1, 0.0)
    assert_equal_bits(run_backend(inputs, None, 0.1, 0.0), expected)


def test_cpp_takes_slots_in_any_order_and_only_what_goes_with_them():
    inputs = make_inputs(Shape(2, 2, 40, 40, 5, 32), torch.float32, positions="both")
    slots = inputs.position_slots[torch.randperm(79, generator=torch.Generator().manual_seed(0))]
    check_inputs(["cpp"], dataclasses.replace(inputs, position_slots=slots), 0.0, 0.0)
    forward, _ = raw_pair("cpp")
    options = inputs.raw_options()
    for change, message in (
        ({"window": 3}, "window: expected none"),
        ({"context_lengths": torch.zeros(2, dtype=torch.int32)}, "context_lengths: expected None"),
        ({"bias": torch.zeros(1, 2, 40, 40)}, "bias: expected None"),
        ({"position_key": None, "position_query": None}, "expected at least one"),
        ({"position_slots": slots + 26}, r"position_slots: expected values in 0..25"),
        ({"position_slots": slots[:-2]}, "at least 79, got 77"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*inputs.raw_tensors, *options._replace(**change))


@pytest.mark.parametrize("backend", POSITION_BACKENDS)
def test_equal_bits_and_gradients_against_gradients(backend):
    """Of tiles that lie on both sides of the diagonal, and of tiles on one."""
    device, shape = device_of(backend), Shape(2, 1, 40, 40, 5, 16)
    check_packed_equals_padded(backend, torch.float32, device, shape, positions="both")
    check_runs_are_bit_equal(backend, torch.float32, device, shape=shape, positions="both")
    shape = Shape(1, 1, 9, 9, 3, 16)
    check_joint_gradients(backend, device, shape, positions="both")
    check_only_needed_gradients(backend, device, shape, positions="both")


@interpreted
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(("blocks", "packed"), [((32, 16), False), ((16, 32), True)], ids=str)
def test_tiles_need_not_be_square_and_stay_inside_their_tensors(blocks, packed, monkeypatch):
    monkeypatch.setattr(configs, "chosen_config", lambda *_: Config(*blocks, 4, 1))
    made = {"positions": "both", "packed": packed, "strides": "sliced"}
    with bounds_checked():
        check(["triton"], Shape(2, 1, 33, 33, 3, 24), torch.float32, "random", 0.1, 0.0, **made)


def test_the_scores_are_those_of_the_definition():
    """Element by element, on two tokens and one column of a prefix."""
    query, key, value = torch.randn(3, 1, 1, 2, 8, dtype=torch.float64).unbind()
    prefix_key, prefix_value = torch.randn(2, 1, 1, 8, dtype=torch.float64).unbind()
    of_key, of_query = torch.randn(2, 1, 3, 8, dtype=torch.float64).unbind()
    slots = torch.tensor([2, 0, 1], dtype=torch.int32)  # of the distances -1, 0, 1
    scores = torch.empty(2, 3, dtype=torch.float64)
    for row in range(2):
        scores[row, 0] = query[0, 0, row] @ prefix_key[0, 0]
        for column in range(2):
            slot = (0, 1, 2)[slots[row - column + 1]]
            scores[row, 1 + column] = (
                query[0, 0, row] @ key[0, 0, column]
                + query[0, 0, row] @ of_key[0, slot]
                + key[0, 0, column] @ of_query[0, slot]
            )
    expected = (scores / 24**0.5).softmax(dim=-1) @ torch.cat((prefix_value[0], value[0, 0]))
    actual = disentangled_prefix_attention(
        query, key, value, prefix_key, prefix_value, of_key, of_query, slots
    )
    torch.testing.assert_close(actual[0, 0], expected)


@pytest.mark.parametrize("tokens", [1, 7, 40, 600])
@pytest.mark.parametrize(("buckets", "most"), [(0, 16), (0, 512), (8, 512), (256, 512)])
def test_slots_are_those_of_transformers(buckets, most, tokens):
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    span = buckets or most
    text = torch.zeros(1, tokens, 1)
    expected = build_relative_position(text, text, bucket_size=buckets, max_position=most)
    expected = (expected.reshape(tokens, tokens) + span).clamp(0, 2 * span - 1)
    rows = torch.arange(tokens)
    slots = position_slots(tokens, span, buckets, max_position=most)
    assert torch.equal(slots[rows[:, None] - rows + tokens - 1].long(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_key": None, "position_query": None}, "at least one tensor"),
        (
            {"position_key": torch.zeros(2, 6, 8)},
            r"\[H, slots, D\] = \[2, 6, 16\], got \[2, 6, 8\]",
        ),
        ({"position_query": torch.zeros(2, 5, 16)}, r"\[2, 6, 16\], got \[2, 5, 16\]"),
        ({"position_key": torch.zeros(2, 6, 16).bfloat16()}, "query's dtype torch.float32"),
        ({"position_key": torch.zeros(2, 6, 16, requires_grad=True)}, "no requires_grad"),
        ({"position_slots": torch.zeros(13)}, "torch.int32"),
        ({"position_slots": torch.zeros(12, dtype=torch.int32)}, "odd length, at least 17"),
        ({"position_slots": torch.full((17,), 6, dtype=torch.int32)}, r"values in 0\.\.5"),
        ({"backend": "split"}, "backend: expected None or one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    inputs = make_inputs(Shape(1, 2, 9, 9, 3, 16), torch.float32, positions="both")
    names = (
        "query", "key", "value", "prefix_key", "prefix_value",
        "position_key", "position_query", "position_slots",
    )  # fmt: skip
    arguments = {name: getattr(inputs, name) for name in names} | change
    with pytest.raises(ValueError, match=message):
        disentangled_prefix_attention(**arguments)


def test_grouped_heads_are_refused():
    inputs = make_inputs(Shape(1, 2, 9, 9, 3, 16), torch.float32, positions="both")
    query, key, value, *prefix = inputs.tensors
    prefix = (each[:1] for each in prefix)
    with pytest.raises(ValueError, match="key: expected query's 2 heads, got 1"):
        disentangled_prefix_attention(query, key[:, :1], value[:, :1], *prefix, *inputs.positions)
