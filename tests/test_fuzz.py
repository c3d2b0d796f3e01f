"""Thousands of random calls of the operator, by hand (pytest -m slow); a seed names a case.

Inputs are views into larger buffers that begin at odd elements; what lies around and between their
rows is NaN and must be there unchanged after the call, as must the inputs.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from tests.closeness import assert_close_to_oracle
from tests.inputs import Inputs, Shape, make_inputs
from tests.kernel_runner import poisoned_memory
from tests.oracle import Results, concatenate_and_expand, magnitudes, oracle, run_backend
from tests.test_prefix_attention import DEVICES, random_case

MARGIN = 67  # elements: odd, so that nothing is aligned to more than its elements
CASES_PER_TEST = 100


class GuardedInputs:
    """Inputs inside canaries."""

    def __init__(self, inputs: Inputs) -> None:
        self.buffers: list[tuple[str, Tensor, Tensor]] = []
        moved = {
            field.name: self._guard(field.name, getattr(inputs, field.name))
            for field in dataclasses.fields(inputs)
            if isinstance(getattr(inputs, field.name), Tensor)
        }
        self.inputs = dataclasses.replace(inputs, **moved)

    def _guard(self, name: str, tensor: Tensor) -> Tensor:
        memory = poisoned_memory(tensor.shape, tensor.stride(), tensor.dtype, MARGIN)
        memory = memory.to(tensor.device)
        # Elements that an expanded tensor repeats are written once.
        once = tensor
        for dimension, stride in enumerate(tensor.stride()):
            once = once.narrow(dimension, 0, min(1, once.shape[dimension])) if stride == 0 else once
        memory.as_strided(once.shape, once.stride(), MARGIN).copy_(once)
        self.buffers.append((name, memory, memory.view(torch.uint8).clone()))
        return memory.as_strided(tensor.shape, tensor.stride(), MARGIN)

    def check(self) -> None:
        for name, memory, before in self.buffers:
            assert torch.equal(memory.view(torch.uint8), before), f"{name} or its surroundings"


def assert_equal_bits(actual: Results, wanted: Results, what: str) -> None:
    for name in actual._fields:
        assert torch.equal(getattr(actual, name), getattr(wanted, name)), f"{name}: {what}"


def packed_of(inputs: Inputs, padded: Results) -> Results:
    *of_tokens, grad_prefix_key, grad_prefix_value = padded
    return Results(*map(inputs.pack_rows, of_tokens), grad_prefix_key, grad_prefix_value)


def check_case(backends: list[str], case: dict) -> None:
    made = dict(case)
    p, prefix_p = made.pop("p"), made.pop("prefix_p")
    guarded = GuardedInputs(make_inputs(**made, device=DEVICES.get(backends[0], "cpu")))
    inputs = guarded.inputs
    exact, sizes, plain = (
        function(inputs, p, prefix_p) for function in (oracle, magnitudes, concatenate_and_expand)
    )
    for backend in backends:
        actual = run_backend(inputs, backend, p, prefix_p)
        guarded.check()
        for name in actual._fields:
            results = (getattr(each, name) for each in (actual, exact, plain, sizes))
            assert_close_to_oracle(*results, name=f"{backend} {name}")
        if inputs.padded is not None:
            padded = run_backend(inputs.padded, backend, p, prefix_p)
            assert_equal_bits(actual, packed_of(inputs, padded), f"{backend}, packed and padded")
        for threads in (1, 2, 4) if backend == "cpp" else (1,):
            torch.set_num_threads(threads)
            again = run_backend(inputs, backend, p, prefix_p)
            assert_equal_bits(actual, again, f"{backend}, {threads} threads")
        torch.set_num_threads(1)


def check_seeds(backends: list[str], seeds: range, largest: int) -> None:
    """All of them, so that one run names every case that fails."""
    failures = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for seed in seeds:
        case = random_case(random.Random(f"fuzz {seed}"), largest)
        try:
            check_case(backends, case)
        except Exception as error:  # a raised error is a failure of this case like any other
            failures.append(f"seed {seed}: {type(error).__name__}: {error}\n  {case}")
    torch.set_num_threads(threads)
    assert not failures, f"{len(failures)} of {len(seeds)} cases:\n" + "\n".join(failures)


@pytest.mark.slow
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("first", range(0, 2000, CASES_PER_TEST))
def test_reference_and_cpp(first):
    check_seeds(["reference", "cpp"], range(first, first + CASES_PER_TEST), largest=65)


@pytest.mark.slow
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("first", range(0, 200, CASES_PER_TEST))
def test_triton(first):
    check_seeds(["triton"], range(first, first + CASES_PER_TEST), largest=33)


def test_canaries_notice_a_write():
    guarded = GuardedInputs(make_inputs(Shape(1, 1, 3, 3, 2, 8), torch.float32))
    guarded.check()
    _, memory, _ = guarded.buffers[0]
    memory[MARGIN - 1] = 0
    with pytest.raises(AssertionError, match="query or its surroundings"):
        guarded.check()
