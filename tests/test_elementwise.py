"""The elementwise operators of the frozen block, each backend against float64 and to the bit."""

import dataclasses
import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_fast.ops import elementwise
from ptv2_fast.ops.dropout import FEED_FORWARD_STREAM, row_dropout_multiplier
from ptv2_kernels import elementwise as launchers
from tests.closeness import assert_close_to_oracle
from tests.test_cpp_kernels import LEVELS, run_with_level

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the kernels are compiled, not interpreted"
)
BACKENDS = ["reference", "cpp", pytest.param("triton", marks=interpreted)]
SHAPES = [(0, 64), (1, 8), (5, 20), (37, 384), (16, 768), (3, 3072)]
DTYPES = {  # of X and R
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
}
DROPOUT_P = 0.3
EPSILON = 1e-5

pytestmark = [
    pytest.mark.usefixtures("nan_filled_empty"),
    pytest.mark.filterwarnings("ignore:var_mean"),  # of no rows
]


def operator(backend: str, name: str):
    """The callable of one backend, with the arguments of the operator's schema."""
    if backend == "reference":
        return getattr(elementwise, name)
    if backend == "triton":
        return getattr(launchers, "launch_" + name)
    return getattr(torch.ops.ptv2, name)


@dataclass(frozen=True)
class Case:
    """Arguments of all five operators; bias and grad_other may be None."""

    input: Tensor
    bias: Tensor | None
    residual: Tensor
    weight: Tensor
    beta: Tensor
    seed: Tensor
    coordinates: Tensor
    grad_out: Tensor
    grad_other: Tensor | None
    dropout_p: float
    total: Tensor  # of a forward call, in R
    statistics: Tensor

    @property
    def dropout(self) -> tuple[Tensor, Tensor, float, int]:
        return self.seed, self.coordinates, self.dropout_p, FEED_FORWARD_STREAM

    @property
    def forward(self) -> tuple:
        affine = (self.weight, self.beta)
        return self.input, self.bias, self.residual, *affine, EPSILON, *self.dropout

    @property
    def backward(self) -> tuple:
        return (
            self.grad_out, self.grad_other, self.total, self.statistics, self.weight,
            *self.dropout, self.input.dtype,
        )  # fmt: skip

    @property
    def again(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.total, self.statistics, self.weight, self.beta

    @property
    def multiplier(self) -> Tensor | float:
        """float64 [R, C]"""
        if self.dropout_p == 0.0:
            return 1.0
        seed, coordinates, dropout_p, stream = self.dropout
        columns = self.input.shape[1]
        return row_dropout_multiplier(columns, dropout_p, seed, coordinates, stream, torch.float64)

    def map(self, function) -> "Case":
        """Applies a function to every floating tensor."""
        tensors = {
            field.name: function(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and value.is_floating_point()
        }
        return dataclasses.replace(self, **tensors)


def make_case(
    shape: tuple[int, int], dtypes: str, extras: bool = True, dropout_p: float = DROPOUT_P
) -> Case:
    """`extras`: with bias and grad_other. Rows of one large value and far from mean 0 are among
    the inputs; sequences and rows lie in no order."""
    rows, columns = shape
    input_dtype, dtype = DTYPES[dtypes]
    generator = torch.Generator().manual_seed(rows * columns)

    def values(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    input, residual = (2 * values(rows, columns)).to(input_dtype), values(rows, columns)
    residual[::3] += 5.0
    residual[1::3, -1] = 60.0
    total = (residual + values(rows, columns)).to(dtype)
    coordinates = torch.randint(1 << 20, (rows, 2), generator=generator, dtype=torch.int32)
    return Case(
        input,
        values(columns) if extras else None,
        residual.to(dtype),
        1 + 0.2 * values(columns),
        values(columns),
        torch.tensor([-7 << 33]),
        coordinates,
        values(rows, columns).to(dtype),
        values(rows, columns).to(input_dtype) if extras else None,
        dropout_p,
        total,
        exact_statistics(total).float(),
    )


def plain_forward(case: Case) -> tuple[Tensor, Tensor]:
    """What eager torch computes in the dtypes of the case: out, total."""
    dtype = case.residual.dtype
    input = case.input if case.bias is None else case.input + case.bias.to(case.input.dtype)
    if case.dropout_p > 0.0:
        input = input * case.multiplier.to(input.dtype)
    total = case.residual + input
    weight, beta = case.weight.to(dtype), case.beta.to(dtype)
    return F.layer_norm(total, total.shape[1:], weight, beta, EPSILON), total


def exact_statistics(total: Tensor) -> Tensor:
    """float64 [R, 2]"""
    variance, mean = torch.var_mean(total.double(), dim=1, correction=0)
    return torch.stack((mean, torch.rsqrt(variance + EPSILON)), dim=1)


def plain_statistics(total: Tensor) -> Tensor:
    total = total.float()
    _, mean, rstd = torch.native_layer_norm(total, total.shape[1:], None, None, EPSILON)
    return torch.cat((mean, rstd), dim=1)


def plain_backward(case: Case) -> tuple[Tensor, Tensor]:
    grad_out = case.grad_out
    if case.grad_other is not None:
        grad_out = grad_out + case.grad_other.to(grad_out.dtype)
    weight = case.weight.to(grad_out.dtype)
    columns = case.total.shape[1:]
    total = case.total.detach().requires_grad_()
    out = F.layer_norm(total, columns, weight, weight, EPSILON)
    (grad,) = torch.autograd.grad(out, total, grad_out)
    grad_input = grad.to(case.input.dtype)
    if case.dropout_p > 0.0:
        grad_input = grad_input * case.multiplier.to(grad_input.dtype)
    return grad, grad_input


def plain_gelu(case: Case) -> tuple[Tensor, Tensor]:
    """gelu and the gradient that autograd gives."""
    biased = case.input if case.bias is None else case.input + case.bias.to(case.input.dtype)
    out = F.gelu(biased)
    return out, torch.ops.aten.gelu_backward(case.grad_out.to(out.dtype), biased)


def check_gelu(backend: str, case: Case) -> None:
    grad_out = case.grad_out.to(case.input.dtype)
    exact, plain = case.map(Tensor.double), plain_gelu(case)
    size = exact.input.abs() + (0 if exact.bias is None else exact.bias.abs())
    assert_close_to_oracle(
        operator(backend, "bias_gelu")(case.input, case.bias),
        elementwise.bias_gelu(exact.input, exact.bias),
        plain[0],
        size,
        "bias_gelu",
    )
    assert_close_to_oracle(
        operator(backend, "bias_gelu_backward")(grad_out, case.input, case.bias),
        elementwise.bias_gelu_backward(grad_out.double(), exact.input, exact.bias),
        plain[1],
        grad_out.double().abs() * (1 + size * torch.exp(-0.5 * size**2)),
        "bias_gelu_backward",
    )


def check_layer_norm_forward(backend: str, case: Case) -> None:
    exact = case.map(Tensor.double)
    out, total, statistics = operator(backend, "dropout_add_layer_norm")(*case.forward)
    oracle = elementwise.dropout_add_layer_norm(*exact.forward)
    plain = plain_forward(case)
    added = exact.input.abs() + (0 if exact.bias is None else exact.bias.abs())
    size = exact.residual.abs() + added * exact.multiplier
    mean_size, rstd = size.mean(1, keepdim=True), oracle[2][:, 1:]
    assert_close_to_oracle(total, oracle[1], plain[1], size, "total")
    out_size = (size + mean_size) * rstd * exact.weight.abs() + exact.beta.abs()
    assert_close_to_oracle(out, oracle[0], plain[0], out_size, "out")
    # Of the rounded total.
    oracle, plain = exact_statistics(total), plain_statistics(total)
    spread = (size * rstd).square().mean(1, keepdim=True)
    for column, magnitude in enumerate((mean_size, rstd * (1 + spread))):
        results = (x[:, column : column + 1] for x in (statistics, oracle, plain))
        assert_close_to_oracle(*results, magnitude, f"statistics {column}")
    again = operator(backend, "layer_norm_again")(total, statistics, case.weight, case.beta)
    assert torch.equal(again, out)


def check_layer_norm_backward(backend: str, case: Case) -> None:
    exact = case.map(Tensor.double)
    # Those of the case are rounded.
    exact = dataclasses.replace(exact, statistics=exact_statistics(exact.total))
    actual = operator(backend, "dropout_add_layer_norm_backward")(*case.backward)
    oracle = elementwise.dropout_add_layer_norm_backward(*exact.backward)
    plain = plain_backward(case)
    mean, rstd = exact.statistics.split(1, dim=1)
    normal = (exact.total.abs() + mean.abs()) * rstd
    grad = exact.grad_out.abs() + (0 if exact.grad_other is None else exact.grad_other.abs())
    scaled = grad * exact.weight.abs()
    size = rstd * (scaled + scaled.mean(1, True) + normal * (scaled * normal).mean(1, True))
    assert_close_to_oracle(actual[0], oracle[0], plain[0], size, "grad_residual")
    if case.dropout_p == 0.0:
        oracle = (oracle[0], oracle[0])
    if case.dropout_p == 0.0 and case.input.dtype == case.total.dtype:
        assert actual[1].shape == (0,) and actual[1].dtype == case.input.dtype
    else:
        size = size * exact.multiplier
        assert_close_to_oracle(actual[1], oracle[1], plain[1], size, "grad_input")


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
    """The rule of closeness.py within each unit of [-12, 12]: small values are held to small
    errors."""
    for unit in range(-12, 12):
        input = torch.linspace(unit, unit + 1, 2001).to(dtype)[None]
        ones, exact = torch.ones_like(input), input.double()
        for name, grad, torch_operator in (
            ("bias_gelu", (), torch.ops.aten.gelu),
            ("bias_gelu_backward", (ones,), torch.ops.aten.gelu_backward),
        ):
            oracle = getattr(elementwise, name)(*grad, exact, None)
            if name == "bias_gelu" and unit < 0:  # 1 + erf cancels in the left tail
                oracle = 0.5 * exact * torch.special.erfc(-exact * 0.5**0.5)
            actual = operator(backend, name)(*grad, input, None)
            plain = torch_operator(*grad, input)
            assert_close_to_oracle(actual, oracle, plain, oracle.abs(), f"{name} at {unit}")


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


def check_level(level: str) -> None:
    """Runs in a process of its own: the level is read once, at the first call."""
    assert torch.ops.ptv2.cpu_capability() == level
    torch.use_deterministic_algorithms(True, warn_only=True)  # NaN in every torch.empty
    for shape, dtypes in itertools.product([(1, 8), (5, 20), (37, 387)], DTYPES):
        for extras, dropout_p in ((False, 0.0), (True, DROPOUT_P)):
            case = make_case(shape, dtypes, extras, dropout_p)
            check_gelu("cpp", case)
            check_layer_norm_forward("cpp", case)
            check_layer_norm_backward("cpp", case)
    for dtype in (torch.float32, torch.bfloat16):
        test_gelu_keeps_its_accuracy_in_both_tails("cpp", dtype)


@pytest.mark.parametrize("level", LEVELS)
def test_level_matches_oracle(level):
    result = run_with_level(
        level, f"from tests.test_elementwise import check_level; check_level({level!r})"
    )
    if "this CPU lacks the instructions" in result.stderr:
        pytest.skip(f"this CPU lacks {level}")
    assert result.returncode == 0, result.stderr


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
