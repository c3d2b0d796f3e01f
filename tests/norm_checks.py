"""The rules that every backend of dropout + add + norm and its parts is held to."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_fast.ops import elementwise
from ptv2_fast.ops.dropout import FEED_FORWARD_STREAM, row_dropout_multiplier
from tests.closeness import assert_close_to_oracle
from tests.devices import CPU
from tests.elementwise_cases import (
    DROPOUT_P,
    EPSILON,
    Case,
    exact_statistics,
    make_case,
    operator,
)


def plain_norm(case: Case, total: Tensor) -> Tensor:
    columns, weight = total.shape[1:], case.weight.to(total.dtype)
    beta = None if case.beta is None else case.beta.to(total.dtype)
    if case.subtract_mean:
        return F.layer_norm(total, columns, weight, beta, EPSILON)
    out = F.rms_norm(total, columns, weight, EPSILON)
    return out if beta is None else out + beta


def plain_forward(case: Case, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """What eager torch computes in the dtypes of its arguments: out, total."""
    added = input if case.bias is None else input + case.bias.to(input.dtype)
    if case.dropout_p > 0.0:
        added = added * case.multiplier.to(input.dtype)
    total = residual + added
    return plain_norm(case, total), total


def plain_statistics(case: Case, total: Tensor) -> Tensor:
    total = total.float()
    if not case.subtract_mean:
        rstd = torch.rsqrt(total.square().mean(1, keepdim=True) + EPSILON)
        return torch.cat((torch.zeros_like(rstd), rstd), dim=1)
    _, mean, rstd = torch.native_layer_norm(total, total.shape[1:], None, None, EPSILON)
    return torch.cat((mean, rstd), dim=1)


def summed_gradient(case: Case) -> Tensor:
    """grad_out + grad_other, as far as they are there, in R."""
    given = [grad for grad in (case.grad_out, case.grad_other) if grad is not None]
    return torch.stack([grad.to(case.total.dtype) for grad in given]).sum(0)


def plain_backward(case: Case) -> tuple[Tensor, Tensor]:
    total = case.total.detach().requires_grad_()
    (grad,) = torch.autograd.grad(plain_norm(case, total), total, summed_gradient(case))
    if case.grad_total is not None:
        grad = grad + case.grad_total
    return grad, plain_dropped(case, grad)


def plain_dropped(case: Case, grad: Tensor) -> Tensor:
    grad_input = grad.to(case.input.dtype)
    return grad_input * case.multiplier.to(grad_input.dtype) if case.dropout_p else grad_input


def check_norms(backend: str, case: Case) -> float:
    """All five operators against float64; the largest error over its budget."""
    checks = [check_norm_forward, check_norm_backward, check_addition]
    cases = [case] * 3
    if case.grad_other is not None:
        checks.append(check_norm_backward)
        cases.append(dataclasses.replace(case, grad_out=None, grad_total=None))
    return max(check(backend, each) for check, each in zip(checks, cases, strict=True))


def check_norm_forward(backend: str, case: Case) -> float:
    exact = case.map(Tensor.double)
    out, total, statistics = operator(backend, "dropout_add_norm")(*case.forward)
    oracle = elementwise.dropout_add_norm(*exact.forward)
    plain = plain_forward(case, case.input, case.residual)
    size = addition_size(exact)
    mean_size, rstd = size.mean(1, keepdim=True) * case.subtract_mean, oracle[2][:, 1:]
    ratios = [assert_close_to_oracle(total, oracle[1], plain[1], size, "total")]
    out_size = (size + mean_size) * rstd * exact.weight.abs()
    if exact.beta is not None:
        out_size = out_size + exact.beta.abs()
    ratios.append(assert_close_to_oracle(out, oracle[0], plain[0], out_size, "out"))
    # Of the rounded total.
    oracle = exact_statistics(total, case.subtract_mean)
    plain = plain_statistics(case, total)
    spread = (size * rstd).square().mean(1, keepdim=True)
    for column, magnitude in enumerate((mean_size, rstd * (1 + spread))):
        results = (x[:, column : column + 1] for x in (statistics, oracle, plain))
        ratios.append(assert_close_to_oracle(*results, magnitude, f"statistics {column}"))
    again = operator(backend, "norm_from_stats")(total, statistics, case.weight, case.beta)
    assert torch.equal(again, out)
    assert torch.equal(operator(backend, "dropout_add")(*case.addition), total)
    return max(ratios)


def addition_size(exact: Case) -> Tensor:
    added = exact.input.abs() + (0 if exact.bias is None else exact.bias.abs())
    return exact.residual.abs() + added * exact.multiplier


def check_norm_backward(backend: str, case: Case) -> float:
    exact = case.map(Tensor.double)
    # Those of the case are rounded.
    statistics = exact_statistics(exact.total, case.subtract_mean)
    exact = dataclasses.replace(exact, statistics=statistics)
    actual = operator(backend, "dropout_add_norm_backward")(*case.backward)
    oracle = elementwise.dropout_add_norm_backward(*exact.backward)
    plain = plain_backward(case)
    mean, rstd = statistics.split(1, dim=1)
    normal = (exact.total.abs() + mean.abs()) * rstd
    grads = (exact.grad_out, exact.grad_other)
    scaled = sum(grad.abs() for grad in grads if grad is not None) * exact.weight.abs()
    size = scaled + normal * (scaled * normal).mean(1, True)
    if case.subtract_mean:
        size = size + scaled.mean(1, True)
    size = rstd * size + (0 if exact.grad_total is None else exact.grad_total.abs())
    ratio = assert_close_to_oracle(actual[0], oracle[0], plain[0], size, "grad_residual")
    return max(ratio, check_dropped(case, actual[1], oracle, plain[1], size))


def check_dropped(
    case: Case, actual: Tensor, oracle: tuple[Tensor, Tensor], plain: Tensor, size: Tensor
) -> float:
    """grad_input: nothing where it would be grad_residual again."""
    if case.dropout_p == 0.0 and case.input.dtype == case.total.dtype:
        assert actual.shape == (0,) and actual.dtype == case.input.dtype
        return 0.0
    exact = oracle[0] if case.dropout_p == 0.0 else oracle[1]
    return assert_close_to_oracle(actual, exact, plain, size * case.multiplier, "grad_input")


def check_addition(backend: str, case: Case) -> float:
    """`dropout_backward`, of a gradient that is `total`; `dropout_add` is the norm's total."""
    actual = operator(backend, "dropout_backward")(*case.addition_backward)
    exact = case.map(Tensor.double)
    oracle = (exact.total, elementwise.dropout_backward(*exact.addition_backward))
    plain = plain_dropped(case, case.total)
    return check_dropped(case, actual, oracle, plain, exact.total.abs())


def check_rows_of_zeros(
    backend: str, dtypes: str, subtract_mean: bool, device: torch.device = CPU
) -> None:
    """Their statistics are 0 and 1 / sqrt(epsilon), what follows is finite and right."""
    case = make_case((5, 21), dtypes, True, 0.0, device, subtract_mean)
    total = torch.zeros_like(case.total)
    statistics = exact_statistics(total, subtract_mean).float()
    case = dataclasses.replace(
        case, input=torch.zeros_like(case.input), residual=total, bias=None, total=total,
        statistics=statistics,
    )  # fmt: skip
    check_norms(backend, case)
    out, total, _ = operator(backend, "dropout_add_norm")(*case.forward)
    assert not total.any() and torch.equal(out, case.beta.to(out.dtype).expand_as(out))


def check_dropout_mask(backend: str, dtypes: str, device: torch.device = CPU) -> None:
    """It is that of its definition, in every operator that draws one."""
    case = make_case((37, 387), dtypes, extras=False, device=device)
    ones, zeros = torch.ones_like(case.input), torch.zeros_like(case.residual)
    case = dataclasses.replace(case, input=ones, residual=zeros)
    multiplier = row_dropout_multiplier(
        387, DROPOUT_P, case.seed, case.coordinates, FEED_FORWARD_STREAM, torch.float32
    )
    _, total, _ = operator(backend, "dropout_add_norm")(*case.forward)
    for actual in (total, operator(backend, "dropout_add")(*case.addition)):
        assert torch.equal(actual, multiplier.to(actual.dtype))
    case = dataclasses.replace(case, total=torch.ones_like(case.total))
    actual = operator(backend, "dropout_backward")(*case.addition_backward)
    assert torch.equal(actual, multiplier.to(actual.dtype))
    case = make_case((37, 387), dtypes, extras=False, device=device)
    _, grad_input = operator(backend, "dropout_add_norm_backward")(*case.backward)
    assert torch.equal(grad_input == 0, multiplier == 0)
