"""The stages of bench.gpu, rehearsed on a CPU; that of the checks is in test_gpu.py.

Units in processes of their own are without the packages that a rented machine lacks.
"""

import contextlib
import csv
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from bench.gpu import step
from bench.gpu.__main__ import main
from bench.gpu.elementwise import random_case
from bench.gpu.elementwise_operators import OPERATORS, Operator
from bench.gpu.memory import TRIES, search_largest
from bench.gpu.runner import StageRun
from bench.gpu.stages import Row, StageOptions, module_of, run_unit
from bench.models import METHODS
from ptv2_kernels import elementwise as launchers
from tests.byte_counter import counted_bytes
from tests.devices import interpreted

BLOCKED = ("datasets", "seqeval", "optuna", "peft")
BERT, *OTHERS = step.units(torch.device("cpu"))
STEP = ("step", "--only", BERT)
STAGES_HERE = ("memory", "attention", "tune")
FAILING = "bias_activation_backward gelu bf16"
SITE = f"""
import os, sys
sys.modules.update(dict.fromkeys({BLOCKED}))
if os.environ.get("FAILING_UNIT") in sys.orig_argv:
    sys.modules["ptv2_kernels"] = None
"""


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def bare_machine(tmp_path_factory) -> Path:
    """A folder for PYTHONPATH that hides packages."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(SITE)
    return folder


def bench_gpu(folder: Path, *arguments: str, **variables: str) -> Ended:
    """A rehearsal from here; its units are processes that see `folder` and `variables`."""
    for stage in ("step", "elementwise", *STAGES_HERE):
        module_of(stage)  # while its kernels become interpreted ones
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        for name, value in {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **variables}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["bench.gpu", *arguments, "--dry-run"])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main()
    return Ended(code, out.getvalue(), err.getvalue())


def rows_of(output: Path, stage: str) -> list[dict[str, str]]:
    with (output / f"{stage}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def rehearsed(bare_machine, tmp_path_factory):
    """The folder of a rehearsal in which one unit failed, and how it ended."""
    output = tmp_path_factory.mktemp("results")
    done = bench_gpu(bare_machine, *STEP, "--output", str(output))
    assert done.returncode == 0, done.stdout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageRun, "_rows_of", rows_here)
        done = bench_gpu(bare_machine, *STAGES_HERE, "--output", str(output))
    assert done.returncode == 0, done.stdout
    arguments = ("elementwise", "--output", str(output))
    return output, bench_gpu(bare_machine, *arguments, FAILING_UNIT=FAILING)


def rows_here(run: StageRun, name: str) -> Iterator[Row]:
    """The rows of a unit without a process of its own, which takes as long to begin as a unit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for package in BLOCKED:
            patch.setitem(sys.modules, package, None)
        yield from run_unit(run.stage, name, run.device, run.options)


def test_every_method_is_a_row_with_its_time_or_a_reason(rehearsed):
    output, _ = rehearsed
    rows = {row["method"]: row for row in rows_of(output, "step")}
    left_out = {name for name, row in rows.items() if row["status"] == "left out"}
    assert left_out == {name for name in rows if "peft" in name or "flash" in name}
    for name in left_out:
        assert rows[name]["reason"].endswith("is not installed here") and not rows[name]["step ms"]
    for name in rows.keys() - left_out:
        assert rows[name]["status"] == "ok", name
        assert float(rows[name]["step ms"]) > 0 and float(rows[name]["tokens/s"]) > 0
        for other in ("frozen none", "full fine-tuning, sdpa"):
            expected = float(rows[name]["step ms"]) / float(rows[other]["step ms"])
            assert float(rows[name][f"time / {other}"]) == pytest.approx(expected, rel=0.02)
    assert {"frozen block", "hook", "prefix, original recipe"} <= rows.keys() - left_out


@pytest.mark.parametrize("unit", OTHERS)
def test_a_method_that_fails_or_cannot_run_is_a_row_and_the_others_go_on(unit, monkeypatch):
    def broken(case, layers):
        raise torch.OutOfMemoryError("no\nmemory")

    monkeypatch.setitem(METHODS, "full fine-tuning, sdpa", broken)
    kept = ("full fine-tuning, sdpa", "frozen none", "hook", "prefix, original recipe")
    options = StageOptions(without=tuple(name for name in METHODS if name not in kept))
    device = torch.device("cpu")
    rows = {row["method"]: row for row in step.run(unit, device, options)}
    assert rows.keys() == set(kept)
    left_out = rows.pop("prefix, original recipe")
    reason = "ModernBertModel takes no past keys and values"
    assert (left_out["status"], left_out["reason"]) == ("left out", reason)
    failed = rows.pop("full fine-tuning, sdpa")
    assert (failed["status"], failed["reason"]) == ("failed", "OutOfMemoryError: no memory")
    assert rows["frozen none"]["time / frozen none"] == 1.0 and rows["hook"]["step ms"] > 0
    assert not any("time / full fine-tuning, sdpa" in row for row in rows.values())


def test_memory_is_measured_beside_its_prediction(rehearsed):
    output, _ = rehearsed
    rows = {row["method"]: row for row in rows_of(output, "memory")}
    batches = {}
    for name, row in rows.items():
        assert row["status"] == "ok"
        counted, formula = float(row["kept B/token/layer"]), float(row["formula B/token/layer"])
        assert counted == pytest.approx(formula, rel=0.01)
        batches[name] = [int(row[f"batch in {budget} GB"]) for budget in (8, 16, 24)]
        assert 0 < batches[name][0] < batches[name][1] < batches[name][2]
        assert float(row["peak MiB"]) > 0 and int(row["predicted batch in 8 GB"]) > 0
    assert batches["frozen ffn+qkv"][0] > batches["full fine-tuning, sdpa"][0]


def test_every_way_of_the_attention_is_timed(rehearsed):
    output, _ = rehearsed
    rows = rows_of(output, "attention")
    assert {(row["dropout"], row["pass"]) for row in rows} == {
        (dropout, name) for dropout in ("0.0", "0.1") for name in ("forward", "forward+backward")
    }
    for row in rows:
        assert row["status"] == "ok" and row["clock"] == "call"
        for way in ("ptv2-fast", "ptv2-fast packed", "concat+sdpa", "concat+eager"):
            assert float(row[f"{way} median ms"]) > 0
        over_sdpa = float(row["concat+sdpa median ms"]) / float(row["ptv2-fast median ms"])
        assert float(row["speed-up over concat+sdpa"]) == pytest.approx(over_sdpa, abs=0.006)


def test_tuning_tries_configurations_and_proves_what_it_found(rehearsed):
    output, _ = rehearsed
    rows = rows_of(output, "tune")
    searched = [row for row in rows if row["unit"] != "proof"]
    assert [row["entry"] for row in searched] == [
        "prefix width 64 16bit dropout short",
        "key_value width 64 16bit dropout",
    ]
    assert all(row["tried"] == "2" and row["rejected"] == "0" for row in searched)
    proof = [row for row in rows if row["unit"] == "proof"]
    assert proof and all(row["status"] == "ok" and row["check"] for row in proof)


def test_a_failing_unit_is_a_row_and_the_next_call_measures_it_alone(rehearsed, bare_machine):
    output, done = rehearsed
    assert done.returncode == 1, done.stderr
    rows = {row["unit"]: row for row in rows_of(output, "elementwise")}
    assert rows[FAILING]["status"] == "failed" and "ptv2_kernels" in rows[FAILING]["reason"]
    others = [row for row in rows_of(output, "elementwise") if row["unit"] != FAILING]
    assert others and all(
        row["status"] == "ok" and float(row["ours call ms"]) > 0 for row in others
    )

    again = bench_gpu(bare_machine, "elementwise", "--output", str(output))
    assert again.returncode == 0, again.stderr
    assert f"{FAILING}: operator bias_activation_backward gelu" in again.stdout
    after = rows_of(output, "elementwise")
    assert [row for row in after if row["unit"] != FAILING] == others
    assert [row["status"] for row in after if row["unit"] == FAILING] == ["ok"]


def call_launcher(operator: Operator, arguments: tuple) -> object:
    result = getattr(launchers, f"launch_{operator.operator}")(*arguments)
    return result[0] if isinstance(result, tuple) else result


@interpreted
@pytest.mark.parametrize("name", OPERATORS)
def test_torch_computes_the_same_as_an_elementwise_operator_of_these_bytes(name):
    operator = OPERATORS[name]
    case = random_case((5, operator.columns["cpu"][0]), "fp32", 0.0, torch.device("cpu"))
    with counted_bytes() as launches:
        call_launcher(operator, operator.arguments(case)[0])
    (launch,) = launches
    vectors = launch.traffic.keys() & {"bias", "weight", "beta"}
    moved = sum(launch.tensors[vector].nbytes for vector in vectors)
    per_row = [each for name, each in launch.traffic.items() if name not in vectors]
    moved += sum(each.loaded + each.stored for each in per_row)
    assert operator.byte_count(case) == moved

    # Beside torch, whose matrix product has added the bias.
    ours, arguments = operator.arguments(replace(case, bias=None))
    expected = operator.plain(*(0.0,) * operator.drops, *arguments)
    expected = expected[0] if isinstance(expected, tuple) else expected
    actual = call_launcher(operator, ours)
    if actual is None:  # in place
        actual = ours[0][:, : expected[0].numel()].view_as(expected)
    torch.testing.assert_close(actual, expected)


def test_a_second_call_measures_nothing(rehearsed, bare_machine):
    output, _ = rehearsed
    before = rows_of(output, "step"), rows_of(output, "memory")
    for stage in (STEP, ("memory",)):
        done = bench_gpu(bare_machine, *stage, "--output", str(output))
        assert done.returncode == 0, done.stderr
        assert "units are there already" in done.stdout and "method" not in done.stdout
    assert (rows_of(output, "step"), rows_of(output, "memory")) == before


def bare_process(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """bench.gpu itself in a process that sees `folder`, and no GPU."""
    path = os.pathsep.join([".", "kernels", str(folder)])
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", *arguments],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def test_every_stage_is_imported_without_the_packages(bare_machine, tmp_path):
    stages = ("step", "elementwise", *STAGES_HERE)
    done = bare_process(bare_machine, *stages, "--dry-run", "--list", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert {BERT, FAILING} <= {*done.stdout.splitlines()}


def test_without_a_gpu_a_stage_ends_with_one_line(bare_machine, tmp_path):
    done = bare_process(bare_machine, "step", "--output", str(tmp_path))
    assert done.returncode == 2
    expected = "bench.gpu step: no CUDA device here; --dry-run rehearses it on the CPU"
    assert done.stderr.splitlines() == [expected]


@pytest.mark.parametrize(
    ("limit", "guess"), [(0, 50), (1, 40), (100, 100), (100, 30), (1000, 4000), (5000, 5100)]
)
def test_the_largest_batch_is_found_within_few_tries(limit, guess):
    tried = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= limit

    found = search_largest(fits, guess)
    assert found <= limit and (found == max([n for n in tried if n <= limit], default=0))
    assert len(tried) <= TRIES
    if abs(limit - guess) < 0.1 * limit:
        assert found >= 0.97 * limit
