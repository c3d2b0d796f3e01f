"""The elementwise operators of the frozen block, each backend against float64 and to the bit."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from ptv2_fast.ops.dropout import FEED_FORWARD_STREAM, row_dropout_multiplier
from tests.elementwise_checks import (
    DROPOUT_P,
    DTYPES,
    Case,
    check_gelu,
    check_gelu_tails,
    check_layer_norm_backward,
    check_layer_norm_forward,
    make_case,
    operator,
)

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the kernels are compiled, not interpreted"
)
BACKENDS = ["reference", "cpp", pytest.param("triton", marks=interpreted)]
SHAPES = [(0, 64), (1, 8), (5, 20), (37, 384), (16, 768), (3, 3072)]

pytestmark = [
    pytest.mark.usefixtures("nan_filled_empty"),
    pytest.mark.filterwarnings("ignore:var_mean"),  # of no rows
]


CASES = list(itertools.product(SHAPES, DTYPES, (False, True), (0.0, DROPOUT_P)))
CASE_IDS = [
    f"r{rows}-c{columns}-{dtypes}-{'extras' if extras else 'bare'}-p{p}"
    for (rows, columns), dtypes, extras, p in CASES
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arguments", CASES, ids=CASE_IDS)
def test_operators_are_close_to_float64(backend, arguments):
    case = make_case(*arguments)
    check_gelu(backend, case)
    check_layer_norm_forward(backend, case)
    check_layer_norm_backward(backend, case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gelu_keeps_its_accuracy_in_both_tails(backend, dtype):
    check_gelu_tails(backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_dropout_mask_is_that_of_its_definition(backend, dtypes):
    case = make_case((37, 387), dtypes, extras=False)
    case = dataclasses.replace(
        case,
        input=torch.ones_like(case.input),
        residual=torch.zeros_like(case.residual),
    )
    _, total, _ = operator(backend, "dropout_add_layer_norm")(*case.forward)
    multiplier = row_dropout_multiplier(
        387, DROPOUT_P, case.seed, case.coordinates, FEED_FORWARD_STREAM, torch.float32
    )
    assert torch.equal(total, multiplier.to(total.dtype))
    _, grad_input = operator(backend, "dropout_add_layer_norm_backward")(*case.backward)
    assert torch.equal(grad_input == 0, multiplier == 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_rows_do_not_depend_on_where_they_stand(backend, dtypes):
    case = make_case((37, 387), dtypes)
    order = torch.randperm(37)

    def move(tensor: Tensor) -> Tensor:
        return tensor[order] if tensor.dim() == 2 else tensor

    moved = dataclasses.replace(case.map(move), coordinates=case.coordinates[order])
    for results, moved_results in zip(run_all(backend, case), run_all(backend, moved), strict=True):
        assert torch.equal(results[order], moved_results)


def run_all(backend: str, case: Case) -> list[Tensor]:
    """The results of all five operators."""
    grad_out = case.grad_out.to(case.input.dtype)
    return [
        operator(backend, "bias_gelu")(case.input, case.bias),
        operator(backend, "bias_gelu_backward")(grad_out, case.input, case.bias),
        *operator(backend, "dropout_add_layer_norm")(*case.forward),
        *operator(backend, "dropout_add_layer_norm_backward")(*case.backward),
        operator(backend, "layer_norm_again")(*case.again),
    ]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("extras", "dropout_p"), [(False, 0.0), (True, DROPOUT_P)])
def test_raw_operators_pass_opcheck(dtypes, extras, dropout_p):
    case = make_case((5, 20), dtypes, extras, dropout_p)
    grad_out = case.grad_out.to(case.input.dtype)
    for name, arguments in (
        ("bias_gelu", (case.input, case.bias)),
        ("bias_gelu_backward", (grad_out, case.input, case.bias)),
        ("dropout_add_layer_norm", case.forward),
        ("dropout_add_layer_norm_backward", case.backward),
        ("layer_norm_again", case.again),
    ):
        torch.library.opcheck(getattr(torch.ops.ptv2, name).default, arguments)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_bits_do_not_depend_on_the_number_of_threads(dtypes):
    case, threads = make_case((101, 1000), dtypes), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run_all("cpp", case)
        torch.set_num_threads(2)
        actual = run_all("cpp", case)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, actual, expected))


def test_errors_name_the_argument():
    case = make_case((5, 20), "fp32")
    with pytest.raises(RuntimeError, match=r"input: expected dtype .*, got Half"):
        torch.ops.ptv2.bias_gelu(case.input.half(), None)
    with pytest.raises(RuntimeError, match="input: expected a contiguous tensor"):
        torch.ops.ptv2.bias_gelu(case.input.T.contiguous().T, None)
    with pytest.raises(RuntimeError, match="bias: expected size 20 in dimension 0, got 19"):
        torch.ops.ptv2.bias_gelu(case.input, case.bias[1:])
    with pytest.raises(RuntimeError, match="weight: expected dtype Float, got BFloat16"):
        torch.ops.ptv2.layer_norm_again(
            case.total, case.statistics, case.weight.bfloat16(), case.beta
        )
    with pytest.raises(RuntimeError, match="coordinates: expected an int32"):
        arguments = list(case.forward)
        arguments[7] = None
        torch.ops.ptv2.dropout_add_layer_norm(*arguments)
