"""A kernel that does not compile is replaced with one warning; what fails on a device is raised."""

import subprocess
import warnings

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from ptv2_fast.ops import elementwise, triton_calls
from ptv2_fast.ops.registration import _default_backward, _default_forward
from tests.devices import KERNEL_DEVICE
from tests.inputs import Shape, make_inputs


@pytest.fixture
def no_failures(monkeypatch):
    monkeypatch.setattr(triton_calls, "_failed", set())


def raising(error: Exception, calls: list):
    def launch(*arguments):
        calls.append(arguments)
        raise error

    return launch


@pytest.mark.usefixtures("no_failures")
@pytest.mark.parametrize(
    "error",
    [
        CompilationError(None, None, "shape element 1 must have type constexpr"),
        OutOfResources(300000, 232448, "shared memory"),
        subprocess.CalledProcessError(1, ["gcc"]),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_does_not_compile_is_computed_by_torch(error):
    inputs = make_inputs(Shape(2, 2, 5, 5, 3, 16), torch.float32, "random")
    arguments = (*inputs.raw_tensors, *inputs.raw_options(0.2, 0.1))
    calls: list = []
    serve = triton_calls.with_fallback("attention", raising(error, calls), _default_forward)
    with pytest.warns(RuntimeWarning, match="attention .*do not compile with triton"):
        out, lse = serve(*arguments)
    expected = torch.ops.ptv2.prefix_attention_forward_reference(*arguments)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        serve(*arguments)
    assert len(calls) == 1
    with pytest.warns(RuntimeWarning):  # another dtype may compile
        serve(*(x.bfloat16() for x in arguments[:5]), *arguments[5:])


@pytest.mark.usefixtures("no_failures")
def test_backward_falls_back_after_a_forward_by_triton():
    shape = Shape(2, 2, 5, 5, 3, 16)
    inputs = make_inputs(shape, torch.float32, "random", device=KERNEL_DEVICE)
    options = inputs.raw_options(0.2, 0.1)
    results = torch.ops.ptv2.prefix_attention_forward_triton(*inputs.raw_tensors, *options)
    arguments = (inputs.grad_out, *inputs.raw_tensors, *results, None, True, True, True, False)
    failure = raising(CompilationError(None, None, "no"), [])
    serve = triton_calls.with_fallback("backward", failure, _default_backward)
    with pytest.warns(RuntimeWarning):
        actual = serve(*arguments, *options)
    expected = torch.ops.ptv2.prefix_attention_backward_triton(*arguments, *options)
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.usefixtures("no_failures")
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError("input"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_fails_on_the_device_is_raised(error):
    serve = triton_calls.with_fallback("gelu", raising(error, []), elementwise.bias_activation)
    with pytest.raises(type(error)):
        serve(torch.randn(2, 8), None)
