"""The C++ kernels in a program without torch: other compilers, sanitizers, another CPU."""

import dataclasses
import random

import pytest
import torch

from tests.attention_checks import random_case
from tests.inputs import Shape, make_inputs
from tests.kernel_runner import (
    ADDRESS,
    ARM64,
    OPTIMISED,
    PLAIN,
    THREAD,
    Case,
    CaseFile,
    Expected,
    run_rows,
    run_runner,
    with_padded,
)
from tests.test_cpp_kernels import LEVELS

ALL = (True, True, True)
NEEDS = [ALL, ALL, (False, False, True), (True, False, False), (False, True, False),
         (True, True, False), (True, False, True)]  # fmt: skip


def fuzzed_case(seed: int, largest: int = 65) -> Case:
    generator = random.Random(f"kernel runner {seed}")
    made = random_case(generator, largest)
    p, prefix_p = made.pop("p"), made.pop("prefix_p")
    needs = generator.choice(NEEDS)
    square = made["shape"].queries == made["shape"].tokens
    joint = needs[:2] == (True, True) and square and generator.random() < 0.5
    gaps = generator.random() < 0.5
    return Case(make_inputs(**made), p, prefix_p, needs, joint, gaps)


@pytest.fixture(scope="module")
def expected():
    """What a case is held against, by its seed."""
    known = {}

    def find(seed: int) -> Expected:
        if seed not in known:
            known[seed] = Expected(fuzzed_case(seed))
        return known[seed]

    return find


def check_seeds(build, seeds, expected, folder, level="generic") -> None:
    """Each case by the numerics rule; the runner itself compares thread counts and canaries."""
    missing = build.missing_tool()
    if missing is not None:
        pytest.skip(f"{missing} is not installed")
    cases = [expected(seed).case for seed in seeds]
    process, results = run_runner(build, cases, folder, level)
    if "this CPU lacks the instructions" in process.stderr:
        pytest.skip(f"this CPU lacks {level}")
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"{len(cases)} cases at level {level}\n"
    failures = []
    for seed, actual in zip(seeds, results, strict=True):
        try:
            expected(seed).check(actual, f"seed {seed}")
        except AssertionError as error:
            failures.append(f"{error}\n  {expected(seed).case}")
    assert not failures, "\n".join(failures)


def test_kernels_without_torch_match_oracle(expected, tmp_path):
    check_seeds(PLAIN, range(12), expected, tmp_path)


def test_a_write_behind_a_buffer_is_noticed(tmp_path):
    """Unless it is, silent canaries say nothing."""
    case = CaseFile(Case(make_inputs(Shape(1, 1, 5, 5, 3, 8), torch.float32)))
    shorten(case, "out")
    process, _ = run_runner(PLAIN, [case], tmp_path, "generic")
    assert process.returncode == 1 and process.stderr == "case 0: tensor: canary behind\n"


def shorten(file: CaseFile, name: str) -> None:
    """The buffer of a tensor loses its last row."""
    index = file.records[name][0]
    is_output, memory = file.buffers[index]
    file.buffers[index] = is_output, memory[: -file.case.inputs.query.shape[-1]]


def check_rows(build, level) -> None:
    missing = build.missing_tool()
    if missing is not None:
        pytest.skip(f"{missing} is not installed")
    process = run_rows(build, level)
    if "this CPU lacks the instructions" in process.stderr:
        pytest.skip(f"this CPU lacks {level}")
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith(f" calls at level {level}\n")


@pytest.mark.parametrize("level", LEVELS)
def test_elementwise_kernels_write_their_results_and_nothing_else(level):
    check_rows(PLAIN, level)


def test_a_write_behind_a_row_is_noticed():
    process = run_rows(PLAIN, "generic", missing=1)
    assert process.returncode == 1 and process.stderr == "result: canary behind\n"


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_packed_equals_padded_to_the_bit_without_torch(level, tmp_path):
    cases = [case for case in map(fuzzed_case, range(300)) if case.packed]
    pairs = [each for case in cases for each in (case, with_padded(case))]
    process, results = run_runner(OPTIMISED, pairs, tmp_path, level)
    if "this CPU lacks the instructions" in process.stderr:
        pytest.skip(f"this CPU lacks {level}")
    assert process.returncode == 0, process.stderr
    for case, packed, padded in zip(cases, results[::2], results[1::2], strict=True):
        for name, actual in packed.items():
            wanted = padded[name]
            if not name.startswith("grad_prefix"):
                wanted = case.inputs.pack_rows(wanted)
            assert torch.equal(actual, wanted), (name, case)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_optimised_kernels_without_torch_match_oracle(level, expected, tmp_path):
    check_seeds(OPTIMISED, range(500), expected, tmp_path, level)


@pytest.mark.slow
@pytest.mark.parametrize("build", [ADDRESS, THREAD], ids=lambda build: build.name)
@pytest.mark.parametrize("level", LEVELS)
def test_sanitizers_find_nothing(build, level, expected, tmp_path):
    check_seeds(build, range(200), expected, tmp_path, level)
    check_rows(build, level)


@pytest.mark.slow
def test_address_sanitizer_reports_a_row_too_many(tmp_path):
    for name in ("key", "grad_query"):
        case = CaseFile(Case(make_inputs(Shape(1, 1, 5, 5, 3, 8), torch.float32)))
        shorten(case, name)
        process, _ = run_runner(ADDRESS, [case], tmp_path, "generic")
        assert process.returncode != 0 and "heap-buffer-overflow" in process.stderr
    process = run_rows(ADDRESS, "generic", missing=1)
    assert process.returncode != 0 and "heap-buffer-overflow" in process.stderr


@pytest.mark.slow
def test_address_sanitizer_reports_an_overrun_from_one_piece_of_scratch_into_the_next(tmp_path):
    """A sequence longer than max_seqlen: its packed columns do not fit the piece for them."""
    inputs = make_inputs(Shape(1, 1, 40, 40, 3, 8), torch.float32, packed=True)
    length = inputs.query.shape[0]
    assert length > 16
    case = Case(dataclasses.replace(inputs, max_seqlen=8))
    process, _ = run_runner(ADDRESS, [case], tmp_path, "generic")
    assert process.returncode != 0 and "use-after-poison" in process.stderr


@pytest.mark.slow
def test_undefined_behaviour_sanitizer_reports_a_misaligned_load(tmp_path):
    inputs = make_inputs(Shape(1, 1, 5, 5, 3, 8), torch.float32, rows="causal")
    case = CaseFile(Case(inputs))
    index, _, *rest = case.records["context_lengths"]
    case.records["context_lengths"] = (index, 2, *rest)
    case.buffers[index] = False, torch.zeros(2, dtype=torch.int32)
    process, _ = run_runner(ADDRESS, [case], tmp_path, "generic")
    assert process.returncode != 0 and "misaligned address" in process.stderr


@pytest.mark.slow
def test_thread_sanitizer_reports_a_race(tmp_path):
    """All sequences write their rows of out to one place."""
    case = CaseFile(Case(make_inputs(Shape(16, 1, 65, 65, 3, 64), torch.float32)))
    record = list(case.records["out"])
    record[3] = 0  # stride of the batch
    case.records["out"] = tuple(record)
    process, _ = run_runner(THREAD, [case], tmp_path, "generic")
    assert process.returncode != 0 and "data race" in process.stderr


@pytest.mark.slow
def test_arm64_kernels_match_oracle(expected, tmp_path):
    check_seeds(ARM64, range(40), expected, tmp_path)
    check_rows(ARM64, "generic")
