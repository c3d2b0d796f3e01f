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
from bench.models import MODELS, build, classifier, ours
from ptv2_fast.encoders.families import find_family
from ptv2_fast.frozen.spec import POLICIES
from ptv2_fast.training.measure import kept_bytes, process_memory
from tests.concatenation import concatenating_attention

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


def _prefix_gradient(model: nn.Module, table: Tensor, case: Case, device: str) -> Tensor:
    """The gradient of the prefix that a model reads from a table, without dropout, float64."""
    step = Step(model, case, device)
    for parameter in _outside(model):  # ours holds them in float32
        parameter.data.copy_(parameter.to(case.torch_dtype))
    model.eval()
    (gradient,) = torch.autograd.grad(step.loss(), table)
    return gradient.double().cpu()


def _prefix_values(columns: int, case: Case) -> Tensor:
    """A table as PrefixEncoder lays it out, [P, columns], the same in every call."""
    generator = torch.Generator().manual_seed(0)
    values = 0.5 * torch.randn(case.prefix, columns, generator=generator)
    return values.to(case.torch_dtype)


def _outside(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that P-Tuning v2 trains beside the prefix: head and pooler."""
    family = find_family(model.config)
    inside = tuple(f"{model.base_model_prefix}.{part}." for part in family.frozen)
    named = model.named_parameters()
    return [p for name, p in named if not name.startswith((*inside, "prefix_encoder."))]


def _concatenated_gradient(model: nn.Module, case: Case, device: str) -> Tensor:
    """`_prefix_gradient` of a stock model whose attention concatenates every row's own copy."""
    config = model.config
    heads, width = find_family(config).key_shape(config)
    layers = config.num_hidden_layers
    values = _prefix_values(layers * 2 * heads * width, case)
    table = values.to(device, next(model.parameters()).dtype).requires_grad_()
    rows = table.view(case.prefix, layers, 2, heads, width)
    prefixes = rows.permute(1, 2, 3, 0, 4)  # [L, 2, heads, P, D]
    with concatenating_attention(model, dict(enumerate(prefixes))):
        return _prefix_gradient(model, table, case, device)


@functools.cache
def check_gradients(case: Case, device: str) -> None:
    """Refuses to go on unless our prefix gradients equal those of a concatenation in float64.

    It is that of the tests, within transformers' own layers. Hook and every policy may be twice as
    far from it as the same in the case's dtype, plus four rounding units of the gradient; and all
    policies give the same bits.
    """
    with torch.device(device):
        plain, double = (classifier(case, "eager") for _ in range(2))
    exact = _concatenated_gradient(double.to(case.torch_dtype).double(), case, device)
    plain_gradient = _concatenated_gradient(plain.to(case.torch_dtype), case, device)
    yardstick = (plain_gradient - exact).abs().max()
    budget = 2 * yardstick + 4 * torch.finfo(case.torch_dtype).eps * exact.abs().max()
    frozen = find_family(MODELS[case.model]).describe_block is not None
    ways = {"hook": {"backbone": "hook"}} | {
        policy: {"backbone": "frozen", "recompute": policy} for policy in POLICIES if frozen
    }
    gradients = {}
    for name, options in ways.items():
        with torch.device(device):
            model = ours(case, **options)
        table = model.prefix_encoder.embedding.weight
        table.data.copy_(_prefix_values(table.shape[1], case))
        gradients[name] = _prefix_gradient(model, table, case, device)
        error = (gradients[name] - exact).abs().max()
        if not error <= budget:
            raise SystemExit(
                f"{case}: the prefix gradient of {name} is off by {error:.2e}, allowed {budget:.2e}"
            )
    if frozen and not all(torch.equal(gradients[name], gradients["none"]) for name in POLICIES):
        raise SystemExit(f"{case}: the policies give different bits")


def small_case(case: Case) -> Case:
    """Of the same model, prefix and dtype, quick enough for a check in float64.

    Its longest sequence has tokens that a window hides.
    """
    tokens = 32 + 2 * (getattr(MODELS[case.model], "sliding_window", None) or 0)
    return replace(case, batch=2, tokens=tokens, lengths="pad50", dropout=0.0, peak=False)


def kept_bytes_per_layer(method: str, case: Case, device: str) -> int:
    """Counted by hooks: what two more layers keep, or three of those of two kinds, in the mean."""
    kept, more = [], 3 if hasattr(MODELS[case.model], "layer_types") else 2
    for layers in (more, 2 * more):
        step = Step(build(method, case, device, layers), case, device)
        # A first forward may move weights, whose old addresses the count would take for owned.
        step.loss()
        kept.append(kept_bytes(step.loss, step.model))
    return (kept[1] - kept[0]) // more


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
    return_freed_tensors()
    return _measured(step, resident_bytes, lambda: process_memory("VmHWM"))


def return_freed_tensors() -> None:
    """Freed tensors go back to the system at once, or an idle process would seem to hold them."""
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 16)


def resident_bytes() -> int:
    """What this process holds now; its peak starts again from here. Linux with glibc tells."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return process_memory("VmRSS")


def peak_memory(method: str, case: Case) -> PeakMemory:
    """Of a process of its own, on a CPU."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_of_this_process, method, case, "cpu").result()
