"""What is checked on a GPU (`pytest -m gpu`, with `-n 8`: kernels compile), and without one."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.devices import KERNEL_DEVICE, Unavailable
from tests.gpu_cases import GROUPS
from tests.inputs import Shape, make_inputs

ROOT = Path(__file__).parent.parent
NAMES = [(group, name) for group, checks in GROUPS.items() for name in checks]


@pytest.mark.gpu
@pytest.mark.skipif(KERNEL_DEVICE.type != "cuda", reason="no CUDA device; interpreted elsewhere")
@pytest.mark.parametrize(("group", "name"), NAMES, ids=[": ".join(each) for each in NAMES])
def test_on_the_device(group, name):
    try:
        GROUPS[group][name].run(KERNEL_DEVICE)
    except Unavailable as reason:
        pytest.skip(str(reason))


def run_module(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess:
    """A module of Python in a process of its own; `path`: searched for modules before all else."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_a_rehearsal_writes_a_row_a_check(tmp_path):
    done = run_module(
        "bench.gpu", "check", "--dry-run", "--only", "bits", "--output", str(tmp_path)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "check.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["status"] for row in rows} == {"ok"}
    bits = [
        check for group in GROUPS if group.startswith("bits-") for check in GROUPS[group].values()
    ]
    assert len(rows) == sum(check.rehearsed for check in bits)


BLOCKED = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def blocked(finder, name, *rest, **options):
    return None if name in {packages!r} else find(name, *rest, **options)
PathFinder.find_spec = classmethod(blocked)
"""
TEST_FILES = {
    "test_tasks.py": "import datasets.fingerprint\ndef test_mine(): pass",
    "test_later.py": "def test_mine():\n    import optuna\ndef test_mine_too(): pass",
    "test_ours.py": "import ptv2_fast.nothing",
}


def test_files_that_need_a_missing_package_are_skipped_by_name(tmp_path):
    """But a missing module of ours is an error; no other file of tests is one."""
    blocked = BLOCKED.format(packages=["datasets", "seqeval", "optuna", "peft", "httpx"])
    (tmp_path / "sitecustomize.py").write_text(blocked)
    for name, text in TEST_FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "conftest.py").write_text("from tests.conftest import *  # noqa: F403")
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", "pyproject.toml")
    chosen = ("-k", "test_mine or test_on_the_device", "--continue-on-collection-errors")
    done = run_module("pytest", *options, *chosen, str(tmp_path), "tests", path=tmp_path)
    assert re.search(r"1 passed, \d+ skipped, \d+ deselected.*, 1 error", done.stdout), done.stdout
    for package in ("datasets", "optuna"):
        assert f"needs {package}, not installed here" in done.stdout
    assert "No module named 'ptv2_fast.nothing'" in done.stdout
    assert "no CUDA device" in done.stdout


@pytest.mark.parametrize("strides", ["hf", "sliced"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_inputs_on_a_device_keep_their_strides(packed, strides):
    """Checks of strides would otherwise be made on a CPU only."""
    shape, options = Shape(2, 2, 5, 5, 3, 8), {"packed": packed, "strides": strides}
    here, there = (
        make_inputs(shape, torch.float32, device=device, **options) for device in ("cpu", "meta")
    )
    for expected, actual in zip(here.tensors, there.tensors, strict=True):
        assert (actual.stride(), actual.shape) == (expected.stride(), expected.shape)
    assert there.grad_out.stride() == here.grad_out.stride()
    empty = make_inputs(Shape(2, 2, 0, 0, 3, 8), torch.float32, device="meta", **options)
    assert empty.query.numel() == 0
