"""The rules that every backend of the elementwise operators is held to."""

import dataclasses
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_fast.ops import elementwise
from ptv2_fast.ops.dropout import FEED_FORWARD_STREAM, row_dropout_multiplier
from ptv2_kernels import elementwise as launchers
from tests.closeness import assert_close_to_oracle

DTYPES = {  # of X and R
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
}
DROPOUT_P = 0.3
EPSILON = 1e-5


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


def check_gelu_tails(backend: str, dtype: torch.dtype) -> None:
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


def check_level() -> None:
    """All operators of C++ at the level of this process."""
    for shape, dtypes in itertools.product([(1, 8), (5, 20), (37, 387)], DTYPES):
        for extras, dropout_p in ((False, 0.0), (True, DROPOUT_P)):
            case = make_case(shape, dtypes, extras, dropout_p)
            check_gelu("cpp", case)
            check_layer_norm_forward("cpp", case)
            check_layer_norm_backward("cpp", case)
    for dtype in (torch.float32, torch.bfloat16):
        check_gelu_tails("cpp", dtype)
