"""Interpreted Triton for the whole test process; offline Hugging Face; NaN in every torch.empty."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before anything imports triton: kernels become interpreted on a machine without a GPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.triton_interpreter import repair_interpreter

    repair_interpreter()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def nan_filled_empty():
    """torch.empty and its relatives return NaN, so that an unwritten output cannot go unseen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
