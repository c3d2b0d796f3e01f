"""Random calls of the operator; a seed names a case.

Inputs are views into larger buffers that begin at odd elements; what lies around and between their
rows is NaN and must be there unchanged after the call, as must the inputs.
"""

import dataclasses
import random

import torch
from torch import Tensor

from tests.attention_checks import assert_equal_bits, packed_of, random_case
from tests.closeness import assert_close_to_oracle
from tests.inputs import Inputs, make_inputs
from tests.kernel_runner import poisoned_memory
from tests.oracle import concatenate_and_expand, magnitudes, oracle, run_backend

MARGIN = 67  # elements: odd, so that nothing is aligned to more than its elements


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


def check_case(backends: list[str], case: dict, device: torch.device) -> float:
    """The numerics rule, packed = padded and equal bits of two runs; the largest error ratio."""
    made = dict(case)
    p, prefix_p = made.pop("p"), made.pop("prefix_p")
    guarded = GuardedInputs(make_inputs(**made, device=device))
    inputs = guarded.inputs
    exact, sizes, plain = (
        function(inputs, p, prefix_p) for function in (oracle, magnitudes, concatenate_and_expand)
    )
    worst = 0.0
    for backend in backends:
        actual = run_backend(inputs, backend, p, prefix_p)
        guarded.check()
        for name in actual._fields:
            results = (getattr(each, name) for each in (actual, exact, plain, sizes))
            worst = max(worst, assert_close_to_oracle(*results, name=f"{backend} {name}"))
        if inputs.padded is not None:
            padded = run_backend(inputs.padded, backend, p, prefix_p)
            assert_equal_bits(actual, packed_of(inputs, padded), f"{backend}, packed and padded")
        for threads in (1, 2, 4) if backend == "cpp" else (1,):
            torch.set_num_threads(threads)
            again = run_backend(inputs, backend, p, prefix_p)
            assert_equal_bits(actual, again, f"{backend}, {threads} threads")
        torch.set_num_threads(1)
    return worst


def check_seeds(backends: list[str], seeds: range, largest: int, device: torch.device) -> float:
    """All of them, so that one run names every case that fails."""
    failures, worst = [], 0.0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for seed in seeds:
        case = random_case(random.Random(f"fuzz {seed}"), largest)
        try:
            worst = max(worst, check_case(backends, case, device))
        except Exception as error:  # a raised error is a failure of this case like any other
            failures.append(f"seed {seed}: {type(error).__name__}: {error}\n  {case}")
    torch.set_num_threads(threads)
    assert not failures, f"{len(failures)} of {len(seeds)} cases:\n" + "\n".join(failures)
    return worst
