"""What does one training step cost, in time and memory, beside what people run today?

    python -m bench.bench_training_step --device cpu
    python -m bench.bench_training_step --device cpu --only "minilm-l6 b16 t128 p20"

Every method trains the same BERT with the same inputs and dropout 0.1 under AdamW, in turn. Peak
memory is measured in a process of its own per method, above what the idle process holds.
"""

import argparse
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bench.measure import RESULTS, machine_columns, time_interleaved, write_csv
from bench.models import METHODS, ptv2_fast_like_peft
from ptv2_fast.training.measure import kept_bytes, process_memory


@dataclass(frozen=True)
class Case:
    model: str
    batch: int
    tokens: int
    prefix: int

    def __str__(self) -> str:
        return f"{self.model} b{self.batch} t{self.tokens} p{self.prefix}"


CPU_CASES = [
    Case("minilm-l6", 16, 128, 20),
    Case("minilm-l6", 16, 128, 100),
    Case("bert-base", 4, 128, 20),
    Case("bert-base", 2, 128, 128),
]
GPU_CASES = [
    Case("bert-base", 32, 128, 20),
    Case("bert-base", 16, 512, 128),
    Case("bert-large", 16, 512, 128),
]
OURS = "ptv2-fast"
PREFIX_TABLE = re.compile("prefix_encoder|prompt_encoder")


class Step:
    """A model, its optimizer and a fixed half-padded batch; calling it takes one training step."""

    def __init__(self, make: Callable[[str, int], nn.Module], case: Case, device: str) -> None:
        self.model = make(case.model, case.prefix).to(device).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        generator = torch.Generator().manual_seed(0)
        shape = (case.batch, case.tokens)
        lengths = torch.linspace(case.tokens // 4, case.tokens, case.batch).long()
        inputs = {
            "input_ids": torch.randint(5, 30000, shape, generator=generator),
            "attention_mask": (torch.arange(case.tokens) < lengths[:, None]).long(),
            "labels": torch.randint(2, (case.batch,), generator=generator),
        }
        self.inputs = {name: tensor.to(device) for name, tensor in inputs.items()}

    def loss(self) -> torch.Tensor:
        return self.model(**self.inputs).loss

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _prefix_gradient(step: Step) -> torch.Tensor:
    """The gradient of a fixed prefix, with a fixed head and without dropout, float64."""
    (table,) = (p for name, p in step.model.named_parameters() if PREFIX_TABLE.search(name))
    head = [p for name, p in step.model.named_parameters() if "classifier" in name]
    with torch.no_grad():
        for parameter in (table, *head):
            # Seeded by size: PEFT holds the head twice.
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    step.model.eval()
    step.loss().backward()
    return table.grad.double()


def check_gradients(case: Case, device: str) -> None:
    """Refuses to go on unless our prefix gradient equals PEFT's.

    The difference may be twice that of PEFT's two attention implementations from each other, plus
    four rounding units of the gradient.
    """
    makers = [METHODS["prefix, peft sdpa"], METHODS["prefix, peft eager"], ptv2_fast_like_peft]
    sdpa, eager, ours = (_prefix_gradient(Step(make, case, device)) for make in makers)
    epsilon = torch.finfo(torch.float32).eps
    budget = 2 * (sdpa - eager).abs().max() + 4 * epsilon * eager.abs().max()
    error = (ours - eager).abs().max()
    if not error <= budget:
        raise SystemExit(f"{case}: prefix gradients differ by {error:.2e}, allowed {budget:.2e}")


def _peak_of_this_process(method: str, case: Case) -> int:
    step = Step(METHODS[method], case, "cpu")
    idle = process_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    for _ in range(2):
        step()
    return process_memory("VmHWM") - idle


def peak_bytes(method: str, case: Case, device: str) -> int:
    """Peak memory of two steps above the weights: activations, gradients, optimizer states.

    On a CPU it is the resident memory of a process of its own, which Linux tells.
    """
    if device == "cuda":
        step = Step(METHODS[method], case, device)
        torch.cuda.reset_peak_memory_stats()
        idle = torch.cuda.memory_allocated()
        for _ in range(2):
            step()
        return torch.cuda.max_memory_allocated() - idle
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_of_this_process, method, case).result()


def measure_case(case: Case, device: str, rounds: int) -> list[dict[str, object]]:
    check_gradients(case, device)
    steps = {name: Step(make, case, device) for name, make in METHODS.items()}
    timings = time_interleaved(steps, torch.device(device), seconds=0, least_rounds=rounds)
    slowest_of_ours = timings[OURS].median
    rows = []
    for name, step in steps.items():
        timing = timings[name]
        rows.append(
            {
                "case": str(case),
                "method": name,
                "step ms": round(timing.median, 1),
                "p20 ms": round(timing.p20, 1),
                "p80 ms": round(timing.p80, 1),
                "time / ours": round(timing.median / slowest_of_ours, 2),
                "tokens/s": round(case.batch * case.tokens / timing.median * 1e3),
                "trainable": sum(p.numel() for p in step.trained),
                "kept MiB": round(kept_bytes(step.loss, step.model) / 2**20, 1),
                "peak MiB": round(peak_bytes(name, case, device) / 2**20, 1),
            }
        )
    return rows


def print_table(rows: list[dict[str, object]], console: Console) -> None:
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", action="append", help='a case, as "minilm-l6 b16 t128 p20"')
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each method")
    parser.add_argument("--output", type=Path, help="CSV file (default: bench/results/...)")
    arguments = parser.parse_args()
    cases = CPU_CASES if arguments.device == "cpu" else GPU_CASES
    if arguments.only:
        known = {str(case): case for case in cases}
        unknown = [name for name in arguments.only if name not in known]
        if unknown:
            parser.error(f"--only: expected some of {list(known)}, got {unknown}")
        cases = [known[name] for name in arguments.only]
    console = Console(width=180)
    rows = []
    for case in cases:
        rows += measure_case(case, arguments.device, arguments.rounds)
        print_table(rows[-len(METHODS) :], console)
    columns = machine_columns(torch.device(arguments.device))
    output = arguments.output or RESULTS / f"training-step-{arguments.device}.csv"
    write_csv(output, [{**row, **columns} for row in rows])
    console.print(f"{columns}\nwritten to {output}")


if __name__ == "__main__":
    main()
