"""The elementwise operators of the frozen block, each backend against float64 and to the bit."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from ptv2_fast.ops import elementwise
from ptv2_fast.ops.activations import ACTIVATIONS
from tests.activation_checks import check_activations, check_tails, plain_activation
from tests.devices import device_of
from tests.elementwise_cases import DTYPES, make_case, operator, run_all
from tests.elementwise_checks import (
    VARIANTS,
    check_opcheck,
    check_random,
    check_rows_do_not_depend_on_where_they_stand,
    make_variant,
)
from tests.norm_checks import (
    check_dropout_mask,
    check_norms,
    check_rows_of_zeros,
    plain_forward,
    summed_gradient,
)
from tests.rotary_checks import RotaryShape, check_rotations, make_rotary

BACKENDS = ["reference", "cpp", "triton"]
SHAPES = [(0, 64), (1, 8), (5, 21), (37, 384), (16, 768), (3, 3072)]
FLOAT_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

pytestmark = [
    pytest.mark.usefixtures("nan_filled_empty", "two_threads"),
    pytest.mark.filterwarnings("ignore:var_mean"),  # of no rows
]


CASES = list(itertools.product(SHAPES, DTYPES, VARIANTS))
CASE_IDS = [f"r{rows}-c{columns}-{dtypes}-{variant}" for (rows, columns), dtypes, variant in CASES]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arguments", CASES, ids=CASE_IDS)
def test_norms_are_close_to_float64(backend, arguments):
    check_norms(backend, make_variant(*arguments, device_of(backend)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", FLOAT_TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_close_to_float64(backend, dtypes, activation):
    for shape, extras in (((0, 64), True), ((1, 8), True), ((5, 21), False), ((37, 387), True)):
        case = make_case(shape, dtypes, extras, device=device_of(backend))
        check_activations(backend, case, (activation,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOAT_TYPES.values(), ids=FLOAT_TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_keep_their_accuracy_in_both_tails(backend, dtype, activation):
    check_tails(backend, activation, dtype, device_of(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOAT_TYPES.values(), ids=FLOAT_TYPES)
def test_rotation_is_close_to_float64_and_is_undone(backend, dtype):
    check_rotations(backend, dtype, device_of(backend))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("first", [None, True, False], ids=["plain", "first", "second"])
def test_activations_are_those_of_torch_and_their_gradients_those_of_autograd(activation, first):
    case = make_case((37, 40), "fp32").map(Tensor.double)
    if first is None:
        name, arguments = "bias_activation", (case.input, case.bias, activation)
    else:
        name, arguments = "gated_activation", (*case.doubled, activation, first)
    actual = (
        getattr(elementwise, name)(*arguments),
        getattr(elementwise, name + "_backward")(case.total, *arguments),
    )
    expected = plain_activation(activation, case.total, *arguments[:2], first)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_norms_are_those_of_torch_and_their_gradients_those_of_autograd(variant):
    case = make_variant((37, 40), "fp32", variant).map(Tensor.double)
    leaves = case.input.clone().requires_grad_(), case.residual.clone().requires_grad_()
    expected = plain_forward(case, *leaves)
    *actual, statistics = elementwise.dropout_add_norm(*case.forward)
    torch.testing.assert_close(tuple(actual), expected)
    case = dataclasses.replace(case, total=actual[1], statistics=statistics)
    grad_total = torch.zeros_like(case.total) if case.grad_total is None else case.grad_total
    gradients = torch.autograd.grad(expected, leaves, (summed_gradient(case), grad_total))
    grad_residual, grad_input = elementwise.dropout_add_norm_backward(*case.backward)
    torch.testing.assert_close(grad_residual, gradients[1])
    torch.testing.assert_close(grad_input if case.dropout_p else grad_residual, gradients[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("subtract_mean", [True, False], ids=["layer", "rms"])
def test_rows_of_zeros(backend, dtypes, subtract_mean):
    check_rows_of_zeros(backend, dtypes, subtract_mean, device_of(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_hide_no_nan_and_survive_large_values(backend, activation):
    input = torch.tensor([[float("nan"), 1e9, -1e9]], device=device_of(backend))
    for dtype in FLOAT_TYPES.values():
        given = input.to(dtype)
        out = operator(backend, "bias_activation")(given, None, activation)
        assert out[0, 0].isnan() and out[0, 1] == given[0, 1] and out[0, 2] == 0
        grad = torch.ones_like(given)
        slope = operator(backend, "bias_activation_backward")(grad, given, None, activation)
        assert slope[0, 1:].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_dropout_mask_is_that_of_its_definition(backend, dtypes):
    check_dropout_mask(backend, dtypes, device_of(backend))


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_rows_do_not_depend_on_where_they_stand(backend, dtypes):
    shape = (37, 387) if backend == "cpp" else (11, 131)  # interpreted kernels take their time
    check_rows_do_not_depend_on_where_they_stand(backend, dtypes, device_of(backend), shape)


@pytest.mark.parametrize(
    ("dtypes", "variant"),
    [("fp32", "layer-bare"), ("bf16", "layer-extras-dropout"), ("mixed", "rms-bare-dropout")],
)
def test_raw_operators_pass_opcheck(dtypes, variant):
    rotary = make_rotary(RotaryShape(5, 2, 20, 7, behind=9, gap=3), DTYPES[dtypes][0])
    rotary.memory.nan_to_num_()  # opcheck compares what no operator writes, too
    check_opcheck(make_variant((5, 20), dtypes, variant), rotary)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_bits_do_not_depend_on_the_number_of_threads(dtypes):
    case, threads = make_case((101, 1000), dtypes), torch.get_num_threads()
    shape = RotaryShape(101, 12, 64, 32, behind=64)
    rotaries = [make_rotary(shape, DTYPES[dtypes][0]) for _ in range(2)]
    results = []
    try:
        for count, rotary in enumerate(rotaries, start=1):
            torch.set_num_threads(count)
            rotary.rotate("cpp", True, False)
            rotary.rotate("cpp", False, True)
            results.append([*run_all("cpp", case), rotary.packed[:, : 12 * 64]])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 400, 100))
def test_random_calls(first):
    for seed in range(first, first + 100):
        check_random("cpp", seed)


def test_errors_name_the_argument():
    case, operators = make_case((5, 20), "fp32"), torch.ops.ptv2
    with pytest.raises(RuntimeError, match=r"input: expected dtype .*, got Half"):
        operators.bias_activation(case.input.half(), None, "gelu")
    with pytest.raises(RuntimeError, match="input: expected a contiguous tensor"):
        operators.bias_activation(case.input.T.contiguous().T, None, "gelu")
    with pytest.raises(RuntimeError, match="bias: expected size 20 in dimension 0, got 19"):
        operators.bias_activation(case.input, case.bias[1:], "gelu")
    with pytest.raises(RuntimeError, match="input: expected an even number of columns, got 19"):
        operators.gated_activation(case.input[:, 1:].contiguous(), None, "silu", True)
    with pytest.raises(RuntimeError, match="weight: expected dtype Float, got BFloat16"):
        operators.norm_from_stats(case.total, case.statistics, case.weight.bfloat16(), case.beta)
    with pytest.raises(RuntimeError, match="coordinates: expected an int32"):
        operators.dropout_add(*case.addition[:4], None, *case.addition[5:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_unknown_activations_and_missing_gradients_are_refused(backend):
    case = make_case((5, 20), "fp32", device=device_of(backend))
    names = "expected one of " + ", ".join(ACTIVATIONS)
    for name, arguments in (
        ("bias_activation", (case.input, None, "swish")),
        ("bias_activation_backward", (case.input, case.input, None, "swish")),
        ("gated_activation", (case.input, None, "swish", True)),
        ("gated_activation_backward", (case.input[:, :10], case.input, None, "swish", True)),
    ):
        with pytest.raises((ValueError, RuntimeError), match=f"activation: {names}, got 'swish'"):
            operator(backend, name)(*arguments)
    case = dataclasses.replace(case, grad_out=None, grad_other=None)
    with pytest.raises((ValueError, RuntimeError), match="grad_out, grad_other: expected at least"):
        operator(backend, "dropout_add_norm_backward")(*case.backward)


def test_rotations_that_do_not_fit_are_refused():
    rotary = make_rotary(RotaryShape(5, 2, 20, 7), torch.float32)
    packed, cosine, sine = rotary.packed, rotary.cosine, rotary.sine
    for message, arguments in (
        ("heads, head_dim: expected at most 40 columns", (packed, cosine, sine, 3, 20)),
        ("packed: expected last stride 1", (packed.T, cosine, sine, 1, 5)),
        ("packed: expected rows that lie apart",
         (packed[:1].expand(5, -1), cosine, sine, 2, 20)),
        ("cosine: expected at most 5 columns", (packed, cosine, sine, 4, 10)),
        ("sine: expected size 5 in dimension 0", (packed, cosine, sine[1:], 2, 20)),
        ("packed: expected dtype Float or BFloat16", (packed.half(), cosine, sine, 2, 20)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            torch.ops.ptv2.rotate_(*arguments, False, False)
