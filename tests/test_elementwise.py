"""The elementwise operators of the frozen block, each backend against float64 and to the bit."""

import itertools

import pytest
import torch

from tests.devices import device_of
from tests.elementwise_checks import (
    DROPOUT_P,
    DTYPES,
    check_dropout_mask,
    check_gelu_tails,
    check_opcheck,
    check_operators,
    check_rows_do_not_depend_on_where_they_stand,
    make_case,
    run_all,
)

BACKENDS = ["reference", "cpp", "triton"]
SHAPES = [(0, 64), (1, 8), (5, 20), (37, 384), (16, 768), (3, 3072)]

pytestmark = [
    pytest.mark.usefixtures("nan_filled_empty", "two_threads"),
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
    check_operators(backend, make_case(*arguments, device_of(backend)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gelu_keeps_its_accuracy_in_both_tails(backend, dtype):
    check_gelu_tails(backend, dtype, device_of(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_dropout_mask_is_that_of_its_definition(backend, dtypes):
    check_dropout_mask(backend, dtypes, device_of(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_rows_do_not_depend_on_where_they_stand(backend, dtypes):
    check_rows_do_not_depend_on_where_they_stand(backend, dtypes, device_of(backend))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("extras", "dropout_p"), [(False, 0.0), (True, DROPOUT_P)])
def test_raw_operators_pass_opcheck(dtypes, extras, dropout_p):
    check_opcheck(make_case((5, 20), dtypes, extras, dropout_p))


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
