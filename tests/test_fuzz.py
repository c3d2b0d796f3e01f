"""Thousands of random calls of the operator, by hand (pytest -m slow)."""

import pytest
import torch

from tests.devices import CPU, KERNEL_DEVICE
from tests.fuzzing import MARGIN, GuardedInputs, check_seeds
from tests.inputs import Shape, make_inputs

CASES_PER_TEST = 100


@pytest.mark.slow
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("first", range(0, 2000, CASES_PER_TEST))
def test_reference_and_cpp(first):
    check_seeds(["reference", "cpp"], range(first, first + CASES_PER_TEST), 65, CPU)


@pytest.mark.slow
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("first", range(0, 200, CASES_PER_TEST))
def test_triton(first):
    check_seeds(["triton"], range(first, first + CASES_PER_TEST), 33, KERNEL_DEVICE)


def test_canaries_notice_a_write():
    guarded = GuardedInputs(make_inputs(Shape(1, 1, 3, 3, 2, 8), torch.float32))
    guarded.check()
    _, memory, _ = guarded.buffers[0]
    memory[MARGIN - 1] = 0
    with pytest.raises(AssertionError, match="query or its surroundings"):
        guarded.check()
