"""Arguments of the elementwise operators, and the callables of every backend."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ptv2_fast.ops import elementwise
from ptv2_fast.ops.activations import ACTIVATIONS
from ptv2_fast.ops.dropout import FEED_FORWARD_STREAM, row_dropout_multiplier
from ptv2_kernels import elementwise as launchers
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
    """Arguments of all operators but the rotation; what may be None in a schema may be here."""

    input: Tensor
    bias: Tensor | None
    residual: Tensor
    weight: Tensor
    beta: Tensor | None
    seed: Tensor
    coordinates: Tensor
    grad_out: Tensor | None
    grad_other: Tensor | None
    grad_total: Tensor | None
    dropout_p: float
    subtract_mean: bool
    total: Tensor  # of a forward call, in R
    statistics: Tensor

    @property
    def dropout(self) -> tuple[Tensor, Tensor, float, int]:
        return self.seed, self.coordinates, self.dropout_p, FEED_FORWARD_STREAM

    @property
    def forward(self) -> tuple:
        norm = (self.weight, self.beta, EPSILON, self.subtract_mean)
        return self.input, self.bias, self.residual, *norm, *self.dropout

    @property
    def backward(self) -> tuple:
        return (
            self.grad_out, self.grad_other, self.grad_total, self.total, self.statistics,
            self.weight, self.subtract_mean, *self.dropout, self.input.dtype,
        )  # fmt: skip

    @property
    def again(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.total, self.statistics, self.weight, self.beta

    @property
    def addition(self) -> tuple:
        return self.input, self.bias, self.residual, *self.dropout

    @property
    def addition_backward(self) -> tuple:
        return self.total, *self.dropout, self.input.dtype

    @property
    def doubled(self) -> tuple[Tensor, Tensor | None]:
        """An input of a gated activation [R, 2C], and its bias."""
        bias = None if self.bias is None else torch.cat((self.bias, self.bias.flip(0)))
        return torch.cat((self.input, self.input.flip(1)), dim=1), bias

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
    subtract_mean: bool = True,
) -> Case:
    """`extras`: with bias, beta, grad_other and grad_total. Rows of one large value and far from
    mean 0 are among the inputs; sequences and rows lie in no order."""
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
        values(columns) if extras else None,
        torch.tensor([-7 << 33]),
        coordinates,
        values(rows, columns).to(dtype),
        values(rows, columns).to(input_dtype) if extras else None,
        values(rows, columns).to(dtype) if extras else None,
        dropout_p,
        subtract_mean,
        total,
        exact_statistics(total, subtract_mean).float(),
    ).to(device)


def exact_statistics(total: Tensor, subtract_mean: bool) -> Tensor:
    """float64 [R, 2]"""
    total = total.double()
    if subtract_mean:
        variance, mean = torch.var_mean(total, dim=1, correction=0)
    else:
        variance, mean = total.square().mean(1), total.new_zeros(len(total))
    return torch.stack((mean, torch.rsqrt(variance + EPSILON)), dim=1)


def calls_of(case: Case, activations: tuple[str, ...] = ACTIVATIONS) -> list[tuple[str, tuple]]:
    """One call of every operator but the rotation, for each activation: names and arguments."""
    grad = case.total.to(case.input.dtype)
    calls: list[tuple[str, tuple]] = []
    for activation in activations:
        calls += [
            ("bias_activation", (case.input, case.bias, activation)),
            ("bias_activation_backward", (grad, case.input, case.bias, activation)),
            ("gated_activation", (*case.doubled, activation, True)),
            ("gated_activation_backward", (grad, *case.doubled, activation, False)),
        ]
    return [
        *calls,
        ("dropout_add_norm", case.forward),
        ("dropout_add_norm_backward", case.backward),
        ("norm_from_stats", case.again),
        ("dropout_add", case.addition),
        ("dropout_backward", case.addition_backward),
    ]


def results_of(backend: str, name: str, arguments: tuple) -> tuple[Tensor, ...]:
    """Of one operator."""
    result = operator(backend, name)(*arguments)
    return (result,) if isinstance(result, Tensor) else tuple(result or ())


def run_all(backend: str, case: Case) -> list[Tensor]:
    """The results of `calls_of`."""
    return [
        result
        for name, arguments in calls_of(case)
        for result in results_of(backend, name, arguments)
    ]
