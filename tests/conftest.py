"""Interpreted Triton for the whole test process; offline Hugging Face; NaN in every torch.empty."""

import gc
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before anything imports triton: kernels become interpreted on a machine without a GPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.triton_interpreter import repair_interpreter

    repair_interpreter()

from tests.devices import unwritten_is_nan

# What tests of tasks, training and reports need, and a machine for the kernels may not have.
OPTIONAL = {
    "accelerate", "datasets", "fastapi", "filelock", "httpx", "jinja2", "matplotlib", "optuna",
    "pandas", "peft", "prometheus_client", "sentence_transformers", "seqeval", "shtab", "sklearn",
    "uvicorn",
}  # fmt: skip


def pytest_collection_finish():
    """Each training run begins with gc.collect(): it need not look at what was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def own_accelerator_state():
    """accelerate keeps the first precision asked for as long as the process lives."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def two_threads():
    """For the kernels that share work out, in a process that would use one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, 2))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def nan_filled_empty():
    with unwritten_is_nan():
        yield


class _Module(pytest.Module):
    """A test file; one that imports a package of OPTIONAL is skipped where that is missing."""

    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            _skip_without_optional_package(error.__cause__)
            raise


def pytest_pycollect_makemodule(module_path, parent):
    return _Module.from_parent(parent, path=module_path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup():
    return (yield from _skipping_without_optional_package())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    return (yield from _skipping_without_optional_package())


def _skipping_without_optional_package():
    try:
        return (yield)
    except ModuleNotFoundError as error:
        _skip_without_optional_package(error)
        raise


def _skip_without_optional_package(error: BaseException | None) -> None:
    """Skips, naming the package; what else may be missing stays an error."""
    package = (getattr(error, "name", None) or "").split(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in OPTIONAL:
        pytest.skip(f"needs {package}, not installed here", allow_module_level=True)
