"""The C++ kernels' own promises: every CPU level is right, and bits do not depend on threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptv2_fast.ops.dropout import dropout_multiplier
from tests import elementwise_checks
from tests.closeness import assert_close_to_oracle
from tests.inputs import Inputs, Shape, make_inputs
from tests.oracle import concatenate_and_expand, magnitudes, oracle, run_backend

ROOT = Path(__file__).parent.parent
# "emulated" is avx512_bf16's vector width and pair layout run by AVX2: its shapes and rounding can
# be tested on a CPU without these instructions.
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16", "emulated")
SHAPES = [
    Shape(2, 2, 70, 45, 21, 64),  # rows, columns and prefix that fill no tile and no pair
    Shape(1, 2, 9, 700, 300, 40),  # several blocks of columns, a block of prefix columns only
    Shape(9, 1, 65, 7, 3, 8),  # head_dim shorter than a vector, more sequences than chunks
    Shape(1, 1, 67, 130, 1, 256),
]
POSITION_SHAPES = [Shape(2, 1, 70, 70, 21, 40), Shape(1, 1, 270, 270, 5, 64)]


def check_level(level: str) -> None:
    """Runs in a process of its own: the level is read once, at the first call."""
    assert torch.ops.ptv2.cpu_capability() == level
    torch.use_deterministic_algorithms(True, warn_only=True)  # NaN in every torch.empty
    for index, shape in enumerate([*SHAPES, *POSITION_SHAPES]):
        positions = "both" if shape in POSITION_SHAPES else "none"
        for dtype in (torch.float32, torch.bfloat16):
            for p, prefix_p, mask in ((0.0, 0.0, "random"), (0.2, 0.3, "right padding")):
                gate = "closed" if p else "none"
                inputs = make_inputs(shape, dtype, mask, seed=index, positions=positions, gate=gate)
                actual = run_backend(inputs, "cpp", p, prefix_p)
                plain, exact, sizes = (
                    function(inputs, p, prefix_p)
                    for function in (concatenate_and_expand, oracle, magnitudes)
                )
                for name in actual._fields:
                    results = (getattr(x, name) for x in (actual, exact, plain, sizes))
                    assert_close_to_oracle(*results, name=f"{level} {shape} {name}")
    elementwise_checks.check_level()


# Each level in a fork of one process that has imported torch but called no kernel.
CHECK_LEVELS = """
import os, sys
from tests.test_cpp_kernels import LEVELS, check_level
for level in LEVELS:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"{sys.argv[1]}/{level}", os.O_WRONLY | os.O_CREAT), 2)
        os.environ["PTV2_CPU_LEVEL"] = level
        check_level(level)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def checked_levels(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Exit code and stderr of check_level by level."""
    folder = tmp_path_factory.mktemp("levels")
    command = [sys.executable, "-c", CHECK_LEVELS, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return {
        level: (int(code), (folder / level).read_text())
        for level, code in zip(LEVELS, done.stdout.split(), strict=True)
    }


@pytest.mark.parametrize("level", LEVELS)
def test_level_matches_oracle(level, checked_levels):
    code, stderr = checked_levels[level]
    if "this CPU lacks the instructions" in stderr:
        pytest.skip(f"this CPU lacks {level}")
    assert code == 0, stderr


def test_unknown_level_is_an_error_that_names_it():
    result = subprocess.run(
        [sys.executable, "-c", "import torch, ptv2_fast.ops; torch.ops.ptv2.cpu_capability()"],
        cwd=ROOT,
        env={**os.environ, "PTV2_CPU_LEVEL": "mmx"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "avx2, avx512 or avx512_bf16, got mmx; the best level of this CPU is" in result.stderr


@pytest.fixture
def set_threads():
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bits_do_not_depend_on_the_number_of_threads(dtype, set_threads):
    """With one head more threads than (sequence, head) pairs cut queries and columns into parts."""
    for shape, options in (
        (Shape(11, 3, 20, 20, 6, 32), {"bank": 3}),
        (Shape(1, 1, 200, 500, 90, 64), {}),
        (Shape(2, 2, 400, 400, 300, 32, group=2), {"packed": True, "rows": "both", "gate": "open"}),
        (Shape(2, 1, 400, 400, 70, 32), {"packed": True, "positions": "both"}),
    ):
        inputs = make_inputs(shape, dtype, "random", **options)
        set_threads(1)
        expected = run_backend(inputs, "cpp", 0.1, 0.1)
        for threads in (2, 4, 7):
            set_threads(threads)
            for name, actual in run_backend(inputs, "cpp", 0.1, 0.1)._asdict().items():
                assert torch.equal(actual, getattr(expected, name)), (name, threads)


def test_masked_tokens_are_left_out_to_the_bit():
    """Columns behind the last visible token are skipped: padding changes no bit of the rest."""
    inputs = make_inputs(Shape(2, 2, 33, 40, 5, 64), torch.float32)
    padded = make_inputs(Shape(2, 2, 33, 150, 5, 64), torch.float32)
    mask = torch.zeros(2, 150, dtype=torch.bool)
    mask[:, :40] = True
    for tensor, short in zip(padded.tensors, inputs.tensors, strict=True):
        tensor.narrow(-2, 0, short.shape[-2]).copy_(short)
    padded = Inputs(*padded.tensors, mask, inputs.seed, inputs.grad_out)
    expected, actual = (run_backend(x, "cpp", 0.2, 0.0) for x in (inputs, padded))
    for name in actual._fields:
        result = getattr(actual, name)
        if name in ("grad_key", "grad_value"):
            assert not result[:, :, 40:].any()
            result = result[:, :, :40]
        assert torch.equal(result, getattr(expected, name)), name


def test_exponential_keeps_its_error_bound():
    numbers = torch.cat((torch.linspace(-87, 1, 400001), -torch.logspace(-9, 1, 1001)))
    exact = numbers.double().exp()
    error = (torch.ops.ptv2.micro_exp(numbers).double() - exact).abs() / exact
    assert (error <= 1e-7).all()
    below = torch.tensor([-88.5, -1e30, float("-inf")])
    assert torch.equal(torch.ops.ptv2.micro_exp(below), torch.zeros(3))
    assert torch.ops.ptv2.micro_exp(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_dropout_draws_the_bits_of_the_definition(dtype):
    inputs, seed = torch.randn(2, 3, 5, 77).to(dtype), torch.tensor([-3 << 40])
    for stream in range(4):
        actual = torch.ops.ptv2.micro_dropout(inputs, seed, 0.3, stream)
        factors = dropout_multiplier(inputs.shape, 0.3, seed, stream, torch.float32)
        assert torch.equal(actual, (inputs * factors).to(dtype))
