"""How much memory does a training step take, and what is the largest batch in 8, 16 and 24 GB?

A unit is a case and a method, alone in its process. Beside what is measured stands what
bench/memory_model.py predicts, where it has a formula. Columns:

    kept MiB, kept B/token/layer    for the backward pass, counted by hooks; the latter per token
                                    that is no padding, beside the formula
    peak MiB                        of one step above weights and optimizer state, by the allocator
    batch in ... GB                 the largest that a step was seen to fit with, the allocator
                                    limited to that much (the context of CUDA, about half a GB,
                                    comes on top); to 2 % or eight tries
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from bench.cases import Case
from bench.gpu.runner import FAILED
from bench.gpu.stages import LEFT_OUT, Row, StageOptions, reason_of, release
from bench.gpu.step import case_columns
from bench.memory_model import has_formula, largest_batch
from bench.models import METHODS, MODELS, build, why_left_out
from bench.step_columns import batch_of, encoder_of, kept_columns, mebibytes, peak_columns
from bench.training_step import Step, inputs_of, peak_of_this_process
from ptv2_fast.training.measure import kept_bytes

BUDGETS = (8, 16, 24)
BUDGET_UNIT = {"cpu": 10**6, "cuda": 10**9}  # bytes; a rehearsal takes MB for GB
TRIES = 8
CASES = (
    Case("bert-base", 32, 128, 20, "bf16", lengths="pad50"),
    Case("bert-large", 16, 512, 100, "bf16"),
    Case("bert-base", 16, 512, 128, "bf16", dropout=0.0),
    Case("modernbert-base", 16, 512, 20, "bf16", 0.0, "pad50"),
)
REHEARSED = Case("bert-tiny", 2, 16, 4, "bf16", lengths="pad50")
REHEARSED_METHODS = ("frozen ffn+qkv", "full fine-tuning, sdpa")


def _units(device: torch.device) -> dict[str, tuple[Case, str]]:
    if device.type == "cpu":
        pairs = [(REHEARSED, method) for method in REHEARSED_METHODS]
    else:
        cases = [case for case in CASES if case.model in MODELS]
        pairs = [(case, method) for case in cases for method in METHODS]
    return {f"{case}: {method}": (case, method) for case, method in pairs}


def units(device: torch.device) -> list[str]:
    return list(_units(device))


def run(name: str, device: torch.device, options: StageOptions) -> Iterator[Row]:
    case, method = _units(device)[name]
    sizes = case_columns(case)
    row: Row = {"method": method}
    if method in options.without:
        return
    reason = why_left_out(method, case, device.type)
    if reason is not None:
        yield {**row, "status": LEFT_OUT, "reason": reason, **sizes}
        return
    memory = peak_of_this_process(method, case, device.type)
    row.update(peak_columns(case, method, device.type, memory))
    row.update(kept_columns(case, method, device.type))
    release()
    step = Step(build(method, case, device.type), case, device.type)
    step()
    row["kept MiB"] = mebibytes(kept_bytes(step.loss, step.model))
    encoder = encoder_of(case)
    for budget in BUDGETS:
        allowed = budget * BUDGET_UNIT[device.type]
        if has_formula(method, encoder):
            guess = largest_batch(allowed, method, encoder, batch_of(case, device.type))
            row[f"predicted batch in {budget} GB"] = guess
        else:
            free = allowed - memory.weights - memory.optimizer
            guess = free * case.batch // max(1, memory.above_idle)
        try:
            fits = _limited(step, case, device, allowed)
            row[f"batch in {budget} GB"] = search_largest(fits, guess)
        except Exception as error:
            row |= {"status": FAILED, "reason": f"batch in {budget} GB: {reason_of(error)}"}
    yield row | sizes


def _limited(step: Step, case: Case, device: torch.device, allowed: int) -> Callable[[int], bool]:
    """Whether a step of so many sequences fits into `allowed` bytes; it leaves nothing behind."""

    def fits(batch: int) -> bool:
        if device.type == "cpu":
            step.inputs = inputs_of(replace(case, batch=batch), "cpu")
            return kept_bytes(step.loss, step.model) <= allowed
        release()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
        try:
            step.inputs = inputs_of(replace(case, batch=batch), "cuda")
            step()
            fitted = True
        except torch.OutOfMemoryError:
            fitted = False
        step.inputs = {}
        step.optimizer.zero_grad(set_to_none=True)
        torch.cuda.set_per_process_memory_fraction(1.0)
        return fitted

    return fits


def search_largest(fits: Callable[[int], bool], guess: int) -> int:
    """The largest number that was seen to fit, 0 if none was.

    From the guess in steps that double until one fits and one does not; then between those, until
    they are 2 % apart. At most TRIES numbers are tried.
    """
    largest, too_large = 0, None
    tried = max(1, guess)
    stride = max(1, tried // 8)
    for _ in range(TRIES):
        if fits(tried):
            largest = tried
        else:
            too_large = tried
        if too_large is None:
            tried += stride
        elif largest == 0:
            tried = max(1, too_large - stride)
        else:
            tried = (largest + too_large) // 2
        stride *= 2
        if too_large is not None and too_large - largest <= max(1, largest // 50):
            break
    return largest
