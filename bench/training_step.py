"""One training step of one method: taken, checked, and its memory counted."""

import ctypes
import functools
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.cases import Case
from bench.models import MODELS, build, original_recipe, ours
from ptv2_fast.encoders.families import find_family
from ptv2_fast.frozen.spec import POLICIES
from ptv2_fast.training.measure import kept_bytes, process_memory

_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD


class Step:
    """A model, its optimizer and a fixed batch; calling it takes one training step."""

    def __init__(self, model: nn.Module, case: Case, device: str) -> None:
        self.model = model.to(device).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.inputs = inputs_of(case, device)

    def loss(self) -> Tensor:
        return self.model(**self.inputs).loss

    def __call__(self) -> None:
        self.loss().backward()
        self.update()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def inputs_of(case: Case, device: str) -> dict[str, Tensor]:
    """The batch of a case, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    shape, lengths = (case.batch, case.padded_tokens), torch.tensor(case.sequence_lengths())
    words = min(30000, MODELS[case.model].vocab_size)
    inputs = {
        "input_ids": torch.randint(5, words, shape, generator=generator),
        "attention_mask": (torch.arange(shape[1]) < lengths[:, None]).long(),
        "labels": torch.randint(2, (case.batch,), generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _prefix_gradient(model: nn.Module, case: Case, device: str) -> Tensor:
    """The gradient of a fixed prefix, with a fixed head and without dropout, float64."""
    step = Step(model, case, device)
    (table,) = (p for name, p in model.named_parameters() if "prefix_encoder" in name)
    head = [p for name, p in model.named_parameters() if "classifier" in name or "pooler" in name]
    with torch.no_grad():
        for parameter in (table, *head):
            # Seeded by size: the models do not hold them in the same order.
            generator = torch.Generator().manual_seed(parameter.numel())
            values = torch.randn(parameter.shape, generator=generator).to(case.torch_dtype)
            parameter.copy_(values * (0.5 if parameter is table else 0.05))
    model.eval()
    step.loss().backward()
    return table.grad.double().cpu()


@functools.cache
def check_gradients(case: Case, device: str) -> None:
    """Refuses to go on unless our prefix gradients equal those of transformers in float64.

    There the prefix enters as past keys and values, which is how PEFT does it. Hook and every
    policy may be twice as far from it as the same in the case's dtype, plus four rounding units of
    the gradient; and all policies give the same bits.
    """
    with torch.device(device):
        plain = original_recipe(case, attention="sdpa")
        double = original_recipe(case, attention="sdpa").double()
    exact = _prefix_gradient(double, case, device)
    yardstick = (_prefix_gradient(plain, case, device) - exact).abs().max()
    budget = 2 * yardstick + 4 * torch.finfo(case.torch_dtype).eps * exact.abs().max()
    frozen = find_family(MODELS[case.model]).describe_block is not None
    ways = {"hook": {"backbone": "hook"}} | {
        policy: {"backbone": "frozen", "recompute": policy} for policy in POLICIES if frozen
    }
    gradients = {}
    for name, options in ways.items():
        with torch.device(device):
            model = ours(case, position_offset="prefix", **options)
        gradients[name] = _prefix_gradient(model, case, device)
        error = (gradients[name] - exact).abs().max()
        if not error <= budget:
            raise SystemExit(
                f"{case}: the prefix gradient of {name} is off by {error:.2e}, allowed {budget:.2e}"
            )
    if frozen and not all(torch.equal(gradients[name], gradients["none"]) for name in POLICIES):
        raise SystemExit(f"{case}: the policies give different bits")


def small_case(case: Case) -> Case:
    """Of the same model, prefix and dtype, quick enough for a check in float64."""
    return replace(case, batch=2, tokens=32, lengths="pad50", dropout=0.0, peak=False)


def kept_bytes_per_layer(method: str, case: Case, device: str) -> int:
    """Counted by hooks: what two more layers keep, halved."""
    kept = []
    for layers in (2, 4):
        step = Step(build(method, case, device, layers), case, device)
        # A first forward may move weights, whose old addresses the count would take for owned.
        step.loss()
        kept.append(kept_bytes(step.loss, step.model))
    return (kept[1] - kept[0]) // 2


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of a step, apart. `above_idle`: the peak over weights and optimizer state."""

    above_idle: int
    weights: int
    gradients: int
    optimizer: int


def _tensor_bytes(tensors: list[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _measured(step: Step, idle: Callable[[], int], peak: Callable[[], int]) -> PeakMemory:
    """Peak of one step after a first one, which pays what is paid once."""
    step()
    gc.collect()
    before = idle()
    step.loss().backward()
    gradients = _tensor_bytes([p.grad for p in step.trained if p.grad is not None])
    step.update()
    above_idle = peak() - before
    states = [
        value for state in step.optimizer.state.values() for value in state.values()
        if isinstance(value, Tensor)
    ]  # fmt: skip
    return PeakMemory(
        above_idle=above_idle,
        weights=_tensor_bytes([*step.model.parameters(), *step.model.buffers()]),
        gradients=gradients,
        optimizer=_tensor_bytes(states),
    )


def peak_of_this_process(method: str, case: Case, device: str) -> PeakMemory:
    """Of tensors on a GPU; on a CPU of all that is resident, which Linux with glibc tells."""
    step = Step(build(method, case, device), case, device)
    if device == "cuda":

        def idle() -> int:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()

        return _measured(step, idle, torch.cuda.max_memory_allocated)
    # Freed tensors go back to the system at once, or the idle process would seem to hold them.
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 16)

    def resident() -> int:
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        return process_memory("VmRSS")

    return _measured(step, resident, lambda: process_memory("VmHWM"))


def peak_memory(method: str, case: Case) -> PeakMemory:
    """Of a process of its own, on a CPU."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_of_this_process, method, case, "cpu").result()
