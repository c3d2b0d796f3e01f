"""The rules that every backend of the elementwise operators is held to."""

import dataclasses
import itertools
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_fast.ops import elementwise
from ptv2_fast.ops.dropout import FEED_FORWARD_STREAM, row_dropout_multiplier
from ptv2_kernels import elementwise as launchers
from tests.closeness import assert_close_to_oracle
from tests.devices import CPU

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

    @property
    def tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def map(self, function) -> "Case":
        """Applies a function to every floating tensor."""
        changed = {
            name: function(tensor)
            for name, tensor in self.tensors.items()
            if tensor.is_floating_point()
        }
        return dataclasses.replace(self, **changed)

    def to(self, device: torch.device) -> "Case":
        return dataclasses.replace(
            self, **{name: tensor.to(device) for name, tensor in self.tensors.items()}
        )


def make_case(
    shape: tuple[int, int],
    dtypes: str,
    extras: bool = True,
    dropout_p: float = DROPOUT_P,
    device: torch.device = CPU,
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
    ).to(device)


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


def check_operators(backend: str, case: Case) -> float:
    """All five against float64; the largest error over its budget, as of every check here."""
    checks = (check_gelu, check_layer_norm_forward, check_layer_norm_backward)
    return max(check(backend, case) for check in checks)


def check_gelu(backend: str, case: Case) -> float:
    grad_out = case.grad_out.to(case.input.dtype)
    exact, plain = case.map(Tensor.double), plain_gelu(case)
    size = exact.input.abs() + (0 if exact.bias is None else exact.bias.abs())
    forward = assert_close_to_oracle(
        operator(backend, "bias_gelu")(case.input, case.bias),
        elementwise.bias_gelu(exact.input, exact.bias),
        plain[0],
        size,
        "bias_gelu",
    )
    backward = assert_close_to_oracle(
        operator(backend, "bias_gelu_backward")(grad_out, case.input, case.bias),
        elementwise.bias_gelu_backward(grad_out.double(), exact.input, exact.bias),
        plain[1],
        grad_out.double().abs() * (1 + size * torch.exp(-0.5 * size**2)),
        "bias_gelu_backward",
    )
    return max(forward, backward)


def check_layer_norm_forward(backend: str, case: Case) -> float:
    exact = case.map(Tensor.double)
    out, total, statistics = operator(backend, "dropout_add_layer_norm")(*case.forward)
    oracle = elementwise.dropout_add_layer_norm(*exact.forward)
    plain = plain_forward(case)
    added = exact.input.abs() + (0 if exact.bias is None else exact.bias.abs())
    size = exact.residual.abs() + added * exact.multiplier
    mean_size, rstd = size.mean(1, keepdim=True), oracle[2][:, 1:]
    ratios = [assert_close_to_oracle(total, oracle[1], plain[1], size, "total")]
    out_size = (size + mean_size) * rstd * exact.weight.abs() + exact.beta.abs()
    ratios.append(assert_close_to_oracle(out, oracle[0], plain[0], out_size, "out"))
    # Of the rounded total.
    oracle, plain = exact_statistics(total), plain_statistics(total)
    spread = (size * rstd).square().mean(1, keepdim=True)
    for column, magnitude in enumerate((mean_size, rstd * (1 + spread))):
        results = (x[:, column : column + 1] for x in (statistics, oracle, plain))
        ratios.append(assert_close_to_oracle(*results, magnitude, f"statistics {column}"))
    again = operator(backend, "layer_norm_again")(total, statistics, case.weight, case.beta)
    assert torch.equal(again, out)
    return max(ratios)


def check_layer_norm_backward(backend: str, case: Case) -> float:
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
    ratio = assert_close_to_oracle(actual[0], oracle[0], plain[0], size, "grad_residual")
    if case.dropout_p == 0.0:
        oracle = (oracle[0], oracle[0])
    if case.dropout_p == 0.0 and case.input.dtype == case.total.dtype:
        assert actual[1].shape == (0,) and actual[1].dtype == case.input.dtype
        return ratio
    size = size * exact.multiplier
    return max(ratio, assert_close_to_oracle(actual[1], oracle[1], plain[1], size, "grad_input"))


def check_gelu_tails(backend: str, dtype: torch.dtype, device: torch.device = CPU) -> float:
    """The rule of closeness.py within each unit of [-12, 12]: small values are held to small
    errors.

    Plain torch is that of the CPU on every device: CUDA's GELU computes the left tail by another
    formula, exact to the last bit where the CPU's has cancelled, in values below 1e-6.
    """
    worst = 0.0
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
            moved = (tensor.to(device) for tensor in (*grad, input))
            actual = operator(backend, name)(*moved, None).cpu()
            results = (actual, oracle, torch_operator(*grad, input), oracle.abs())
            worst = max(worst, assert_close_to_oracle(*results, f"{name} at {unit}"))
    return worst


def check_dropout_mask(backend: str, dtypes: str, device: torch.device = CPU) -> None:
    """It is that of its definition."""
    case = make_case((37, 387), dtypes, extras=False, device=device)
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


def check_rows_do_not_depend_on_where_they_stand(
    backend: str, dtypes: str, device: torch.device = CPU, shape: tuple[int, int] = (37, 387)
) -> None:
    case = make_case(shape, dtypes, device=device)
    order = torch.randperm(shape[0]).to(device)

    def move(tensor: Tensor) -> Tensor:
        return tensor[order] if tensor.dim() == 2 else tensor

    moved = dataclasses.replace(case.map(move), coordinates=case.coordinates[order])
    for results, moved_results in zip(run_all(backend, case), run_all(backend, moved), strict=True):
        assert torch.equal(results[order], moved_results)


def check_dispatch(dtypes: str, device: torch.device) -> None:
    """On a GPU the dispatcher serves the operators by Triton, and without a warning.

    On a CPU other kernels serve them, by the numerics rule.
    """
    case = make_case((37, 387), dtypes, device=device)
    if device.type == "cpu":
        check_operators("dispatched", case)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of a kernel that does not compile
        results = run_all("dispatched", case)
    for actual, expected in zip(results, run_all("triton", case), strict=True):
        assert torch.equal(actual, expected)


def check_opcheck(case: Case) -> None:
    """Schemas and fakes of all five operators."""
    grad_out = case.grad_out.to(case.input.dtype)
    for name, arguments in (
        ("bias_gelu", (case.input, case.bias)),
        ("bias_gelu_backward", (grad_out, case.input, case.bias)),
        ("dropout_add_layer_norm", case.forward),
        ("dropout_add_layer_norm_backward", case.backward),
        ("layer_norm_again", case.again),
    ):
        torch.library.opcheck(getattr(torch.ops.ptv2, name).default, arguments)


def check_level() -> None:
    """All operators of C++ at the level of this process."""
    for shape, dtypes in itertools.product([(1, 8), (5, 20), (37, 387)], DTYPES):
        for extras, dropout_p in ((False, 0.0), (True, DROPOUT_P)):
            case = make_case(shape, dtypes, extras, dropout_p)
            check_operators("cpp", case)
    for dtype in (torch.float32, torch.bfloat16):
        check_gelu_tails("cpp", dtype)
