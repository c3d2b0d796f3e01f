"""Every backend against the float64 oracle by the one numerics rule, forward and five gradients."""

import random

import pytest
import torch

from ptv2_fast.ops.attention import prefix_attention, prefix_attention_with_lse
from ptv2_fast.ops.registration import CPP_IMPORT_ERROR
from tests.attention_checks import (
    GROUPED,
    GROUPED_FEW,
    check,
    check_bank_equals_separate_calls,
    check_closed_gates_are_no_prefix,
    check_joint_gradients,
    check_merging_by_lse,
    check_only_needed_gradients,
    check_packed_equals_padded,
    check_prefix_gradient_is_no_worse_than_concatenation,
    check_prefix_only_backward_never_reads_the_tokens,
    check_rows_without_a_visible_column,
    check_runs_are_bit_equal,
    random_case,
)
from tests.devices import device_of
from tests.inputs import MASKS, ROWS, Shape, make_inputs

pytestmark = pytest.mark.usefixtures("two_threads")

# batch, heads, queries, tokens, prefix, head_dim: chosen for their edges.
SHAPES = [
    Shape(2, 3, 17, 17, 5, 64),
    Shape(1, 1, 1, 1, 1, 8),
    Shape(2, 2, 40, 40, 0, 32),  # no prefix: plain attention
    Shape(2, 2, 9, 0, 7, 16),  # no tokens: the prefix alone
    Shape(2, 2, 5, 33, 100, 80),  # prefix longer than a block, head_dim no power of two
    Shape(1, 2, 70, 70, 20, 128),
    Shape(2, 6, 33, 21, 9, 32, group=3),  # three query heads to a key/value head
]
GATED_FEW = Shape(2, 2, 9, 9, 35, 16, group=2)  # two tiles of the prefix
CPU_ONLY_SHAPES = [
    Shape(2, 12, 128, 128, 20, 64),  # BERT-base
    Shape(2, 2, 129, 257, 33, 256),
    Shape(9, 1, 3, 3, 2, 24),  # more sequences than chunks of the batch
    Shape(2, 2, 0, 4, 3, 8),
    Shape(0, 2, 4, 4, 3, 8),
]


def grouped(backend: str) -> Shape:
    return GROUPED_FEW if backend == "triton" else GROUPED


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backend_matches_oracle(shape, dtype, backend):
    mask = MASKS[SHAPES.index(shape) % len(MASKS)]
    check([backend], shape, dtype, mask, 0.0, 0.0)
    if backend != "split":
        check([backend], shape, dtype, mask, 0.1, 0.2)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("rows", ROWS)
def test_rows_with_different_visible_tokens_match_oracle(rows, backend):
    """And the gradient of lse."""
    shape = Shape(3, 2, 75, 75, 7, 32)
    check([backend], shape, torch.float32, "right padding", 0.1, 0.2, rows=rows, lse=True)
    shape = Shape(2, 1, 37, 37, 0, 16)  # without a prefix nothing is visible to some rows
    check([backend], shape, torch.bfloat16, "random", 0.0, 0.0, rows=rows, lse=True)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_banks_and_bias_match_oracle(packed, backend):
    """More sequences than chunks of the batch, rows of the bank that nobody reads, a long one."""
    options = {"packed": packed, "rows": "both", "lse": True}
    shape = Shape(11, 2, 20, 20, 9, 16)
    check([backend], shape, torch.float32, "random", 0.1, 0.2, bank=4, bias="holes", **options)
    shape = Shape(3, 4, 37, 37, 70, 32, group=2)
    check([backend], shape, torch.bfloat16, "none", 0.1, 0.0, bank=2, bias="shared", packed=packed)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_equals_padded_to_the_bit(dtype, backend):
    """Dropout included: its masks are numbered by sequence and row."""
    check_packed_equals_padded(backend, dtype, device_of(backend), grouped(backend))


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_bank_equals_separate_calls(backend):
    """And what lies behind prefix_lengths is never read."""
    check_bank_equals_separate_calls(backend, device_of(backend))


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton", "split"])
def test_joint_gradients_equal_separate_ones(backend):
    """One buffer for the gradients of query, key and value, as one product with W_qkv wants it."""
    check_joint_gradients(backend, device_of(backend), grouped(backend))


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton", "split"])
def test_two_results_over_disjoint_columns_merge_by_lse(backend):
    check_merging_by_lse(backend, device_of(backend))


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("shape", CPU_ONLY_SHAPES, ids=str)
def test_cpu_backends_match_oracle_on_larger_shapes(shape):
    check(["reference", "cpp", "split"], shape, torch.float32, "random", 0.0, 0.0)
    check(["reference", "cpp"], shape, torch.bfloat16, "right padding", 0.3, 0.0, strides="sliced")


@pytest.mark.usefixtures("nan_filled_empty")
def test_random_shapes_match_oracle():
    generator = random.Random("reference and cpp")
    for _ in range(200):
        check(["reference", "cpp"], **random_case(generator, largest=65))


@pytest.mark.usefixtures("nan_filled_empty")
def test_random_shapes_match_oracle_on_interpreted_triton():
    generator = random.Random("triton")
    for _ in range(40):
        check(["triton"], **random_case(generator, 33, most=2))


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_prefix_gradient_is_no_worse_than_concatenation_in_bf16(backend):
    check_prefix_gradient_is_no_worse_than_concatenation(backend, device_of(backend))


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_two_runs_are_bit_equal(backend):
    check_runs_are_bit_equal(backend, torch.float32, device_of(backend))


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton", "split"])
def test_rows_without_a_visible_column_are_zero(backend):
    check_rows_without_a_visible_column(backend, device_of(backend))


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton", "split"])
def test_only_needed_gradients_are_computed_and_equal_the_full_ones(backend):
    check_only_needed_gradients(backend, device_of(backend))


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_prefix_only_backward_never_reads_the_tokens(backend):
    """Layer 0 of a frozen encoder: key and value may be gone when its backward runs."""
    check_prefix_only_backward_never_reads_the_tokens(backend, device_of(backend))


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton", "split"])
@pytest.mark.parametrize("strides", ["hf", "sliced"])
def test_only_inputs_and_results_are_kept(strides, backend):
    """Query, key, value, out, lse, the prefix as it is, and a mask; no copy of any of them."""
    inputs = make_inputs(
        Shape(4, 2, 12, 12, 6, 32), torch.float32, "right padding", strides=strides,
        device=device_of(backend),
    )  # fmt: skip
    leaves = [tensor.detach().requires_grad_() for tensor in inputs.tensors]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out, lse = prefix_attention_with_lse(*leaves, key_mask=inputs.key_mask, backend=backend)
    known = {x.untyped_storage().data_ptr() for x in (*leaves, out, lse, inputs.key_mask)}
    assert {x.untyped_storage().data_ptr() for x in kept} == known


def test_zero_prefix_is_not_a_no_op():
    inputs = make_inputs(Shape(1, 1, 4, 4, 3, 8), torch.float32)
    zeros = torch.zeros_like(inputs.prefix_key)
    with_zeros = prefix_attention(*inputs.tensors[:3], zeros, zeros)
    without = prefix_attention(*inputs.tensors[:3], zeros[:, :0], zeros[:, :0])
    assert (with_zeros - without).abs().max() > 1e-2


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton", "split"])
def test_gates_match_oracle(backend):
    """Each query head has its own, for each row of a bank."""
    shape = GATED_FEW if backend == "triton" else Shape(3, 4, 21, 21, 35, 32, group=2)
    check([backend], shape, torch.float32, "random", 0.0, 0.0, gate="closed")
    if backend != "split":
        made = {"packed": True, "rows": "both", "lse": True, "bank": 2, "bias": "holes"}
        check([backend], shape, torch.bfloat16, "none", 0.1, 0.2, gate="open", **made)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_a_gate_of_zero_is_no_prefix_to_the_bit(backend):
    """With more columns than a block of the C++ kernels has, too."""
    device = device_of(backend)
    check_closed_gates_are_no_prefix(backend, device, Shape(2, 3, 17, 17, 5, 16))
    if backend == "cpp":
        check_closed_gates_are_no_prefix(backend, device, Shape(2, 6, 9, 400, 150, 96, group=2))


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton", "split"])
def test_bits_and_gradients_of_gates(backend):
    """Whatever the layout, the run and the gradients that are wanted."""
    made, device = {"gate": "closed"}, device_of(backend)
    if backend != "triton":  # one kernel has them all, and the interpreter one order
        check_only_needed_gradients(backend, device, GATED_FEW, **made)
    if backend in ("reference", "cpp"):
        check_runs_are_bit_equal(backend, torch.float32, device, shape=GATED_FEW, **made)
    if backend != "split":
        check_packed_equals_padded(backend, torch.float32, device, GATED_FEW, **made)
        check_joint_gradients(backend, device, GATED_FEW, **made)
    if backend in ("cpp", "triton"):
        check_prefix_only_backward_never_reads_the_tokens(backend, device, **made)


def test_a_gate_multiplies_the_weights_of_the_prefix():
    """By definition, and its gradient at 0 by the difference that a small one makes."""
    inputs = make_inputs(Shape(2, 2, 4, 4, 3, 8), torch.float64)
    gate = torch.tensor([0.25, 0.0], dtype=torch.float64, requires_grad=True)
    query, key, value, prefix_key, prefix_value = inputs.tensors

    def weights(keys):
        return (query @ keys.transpose(-1, -2) * 8**-0.5).exp()

    of_prefix = gate.detach()[:, None, None] * weights(prefix_key)
    total = of_prefix @ prefix_value + weights(key) @ value
    expected = total / (of_prefix.sum(-1, True) + weights(key).sum(-1, True))
    actual = prefix_attention(*inputs.tensors, prefix_gate=gate)
    torch.testing.assert_close(actual, expected)
    (gradient,) = torch.autograd.grad((actual * inputs.grad_out).sum(), gate)
    for head in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[head] = 1e-6
        moved = prefix_attention(*inputs.tensors, prefix_gate=gate.detach() + step)
        difference = ((moved - actual.detach()) * inputs.grad_out).sum() / 1e-6
        torch.testing.assert_close(gradient[head], difference, rtol=1e-4, atol=1e-4)


def test_seed_is_drawn_from_torch_generator():
    inputs = make_inputs(Shape(1, 2, 8, 8, 3, 8), torch.float32)
    draws = []
    for manual_seed in (1, 1, 2):
        torch.manual_seed(manual_seed)
        draws.append(prefix_attention(*inputs.tensors, dropout_p=0.5))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    state = torch.get_rng_state()
    prefix_attention(*inputs.tensors)
    assert torch.equal(state, torch.get_rng_state())


def test_fp32_prefix_gets_an_fp32_gradient_from_a_bf16_call():
    inputs = make_inputs(Shape(2, 2, 8, 8, 3, 16), torch.bfloat16)
    prefix = [tensor.float().requires_grad_() for tensor in inputs.tensors[3:]]
    prefix_attention(*inputs.tensors[:3], *prefix).backward(inputs.grad_out)
    assert prefix[0].grad.dtype == torch.float32 and prefix[0].grad.abs().max() > 0


def test_bad_arguments_name_argument_expected_and_actual():
    inputs = make_inputs(Shape(2, 2, 4, 4, 3, 16), torch.float32)
    query, key, value, prefix_key, prefix_value = inputs.tensors
    starts = torch.tensor([0, 4, 8], dtype=torch.int32)
    packed = {"cu_seqlens": starts, "max_seqlen": 4}
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in inputs.tensors[:3]]
    flat = [*flat, prefix_key, prefix_value]
    bank = [query, key, value, *(p.expand(3, *p.shape) for p in (prefix_key, prefix_value))]
    rows = {"prefix_index": torch.tensor([2, 0], dtype=torch.int32)}
    cases = [
        ("query", (query[0], key, value, prefix_key, prefix_value), {}),
        ("query", [tensor[..., :12] for tensor in inputs.tensors], {}),
        ("value", (query, key[:, :1], value, prefix_key, prefix_value), {}),
        ("key", (query, key.double(), value, prefix_key, prefix_value), {}),
        ("key", (query, key.mT.contiguous().mT, value, prefix_key, prefix_value), {}),
        ("value", (query, key, value[:, :, :2], prefix_key, prefix_value), {}),
        ("key", (query[:, :1], key, value, prefix_key, prefix_value), {}),
        ("prefix_key", (query, key, value, prefix_key[0], prefix_value), {}),
        ("prefix_value", (query, key, value, prefix_key[None], prefix_value), {}),
        ("prefix_value", (query, key, value, prefix_key, prefix_value[:, :2]), {}),
        ("prefix_value", (query, key, value, prefix_key, prefix_value.long()), {}),
        ("value", (query, key, value.to("meta"), prefix_key, prefix_value), {}),
        ("key_mask", inputs.tensors, {"key_mask": torch.ones(2, 1, 4, 4, dtype=torch.bool)}),
        ("key_mask", inputs.tensors, {"key_mask": torch.ones(2, 4)}),
        ("dropout_p", inputs.tensors, {"dropout_p": 1.0}),
        ("prefix_dropout_p", inputs.tensors, {"prefix_dropout_p": -0.1}),
        ("dropout_p", inputs.tensors, {"dropout_p": 0.1, "backend": "split"}),
        ("seed", inputs.tensors, {"seed": torch.zeros(2, dtype=torch.int64)}),
        ("prefix_gate", inputs.tensors, {"prefix_gate": torch.ones(3)}),
        ("prefix_gate", inputs.tensors, {"prefix_gate": torch.ones(1, 2)}),
        ("prefix_gate", inputs.tensors, {"prefix_gate": torch.ones(2, dtype=torch.int64)}),
        ("prefix_gate", inputs.tensors, {"prefix_gate": torch.tensor([0.0, -0.5])}),
        ("prefix_gate", inputs.tensors, {"prefix_gate": torch.tensor([1.0, float("inf")])}),
        ("prefix_gate", bank, {**rows, "prefix_gate": torch.ones(2)}),
        ("window", inputs.tensors, {"window": -1}),
        ("window", inputs.tensors, {"window": 2.0}),
        ("window", (query[:, :, :2], *inputs.tensors[1:]), {"window": 2}),
        ("window", inputs.tensors, {"window": 2, "backend": "split"}),
        ("context_lengths", inputs.tensors, {"context_lengths": torch.zeros(2)}),
        ("context_lengths", inputs.tensors, {"context_lengths": torch.tensor([0, 5]).int()}),
        ("context_lengths", inputs.tensors, {"context_lengths": torch.tensor([-1, 2]).int()}),
        ("query", inputs.tensors, packed),
        ("key", (query[0], key, value, prefix_key, prefix_value), packed),
        ("max_seqlen", flat, {"cu_seqlens": starts}),
        ("max_seqlen", flat, {"cu_seqlens": starts, "max_seqlen": 4.0}),
        ("max_seqlen", flat, {"cu_seqlens": starts, "max_seqlen": 3}),
        ("max_seqlen", inputs.tensors, {"max_seqlen": 4}),
        ("cu_seqlens", flat, {**packed, "cu_seqlens": starts.long()}),
        ("cu_seqlens", flat, {**packed, "cu_seqlens": starts[:0]}),
        ("cu_seqlens", flat, {**packed, "cu_seqlens": torch.tensor([0, 4, 2, 8]).int()}),
        ("cu_seqlens", flat, {**packed, "cu_seqlens": torch.tensor([0, 4, 7]).int()}),
        ("cu_seqlens", flat, {**packed, "cu_seqlens": torch.tensor([1, 4, 8]).int()}),
        ("key_mask", flat, {**packed, "key_mask": torch.ones(2, 4, dtype=torch.bool)}),
        ("key", (flat[0], flat[1][:6], *flat[2:]), packed),
        ("prefix_index", bank, {}),
        ("prefix_index", bank, {"prefix_index": torch.zeros(2)}),
        ("prefix_index", bank, {"prefix_index": torch.zeros(3).int()}),
        ("prefix_index", bank, {"prefix_index": torch.tensor([0, 3]).int()}),
        ("prefix_index", bank, {"prefix_index": torch.tensor([-1, 0]).int()}),
        ("prefix_index", inputs.tensors, {"prefix_index": torch.zeros(2).int()}),
        ("prefix_lengths", inputs.tensors, {"prefix_lengths": torch.zeros(1).int()}),
        ("prefix_lengths", bank, {**rows, "prefix_lengths": torch.zeros(2).int()}),
        ("prefix_lengths", bank, {**rows, "prefix_lengths": torch.tensor([0, -1, 2]).int()}),
        ("prefix_lengths", bank, {**rows, "prefix_lengths": torch.tensor([0, 4, 2]).int()}),
        ("prefix_value", (*bank[:4], bank[4][:2]), rows),
        ("prefix_value", (*bank[:4], prefix_value), rows),
        ("bias", inputs.tensors, {"bias": torch.zeros(2, 4, 4)}),
        ("bias", inputs.tensors, {"bias": torch.zeros(3, 2, 4, 4)}),
        ("bias", inputs.tensors, {"bias": torch.zeros(1, 1, 4, 4)}),
        ("bias", inputs.tensors, {"bias": torch.zeros(1, 2, 4, 4).bfloat16()}),
        ("bias", inputs.tensors, {"bias": torch.zeros(1, 2, 4, 4).bool()}),
        ("bias", inputs.tensors, {"bias": torch.zeros(1, 2, 4, 1).expand(1, 2, 4, 4)}),
        ("bias", inputs.tensors, {"bias": torch.zeros(1, 2, 4, 4, requires_grad=True)}),
        ("cu_seqlens", flat, {**packed, "backend": "split"}),
        ("prefix_index", bank, {**rows, "backend": "split"}),
        ("bias", inputs.tensors, {"bias": torch.zeros(1, 2, 4, 4), "backend": "split"}),
        ("backend", inputs.tensors, {"backend": "fastest"}),
        ("query", [tensor.double() for tensor in inputs.tensors], {"backend": "cpp"}),
    ]
    for argument, tensors, options in cases:
        with pytest.raises(ValueError, match=rf"^{argument}: .*expected .*, got"):
            prefix_attention(*tensors, **options)


def test_cpp_extension_is_there():
    """The suite must not pass by leaving the C++ backend out."""
    assert CPP_IMPORT_ERROR is None
