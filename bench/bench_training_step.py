"""What does one training step cost, in time and memory, beside what people run today?

    python -m bench.bench_training_step --device cpu
    python -m bench.bench_training_step --quick --rounds 3
    python -m bench.bench_training_step --only "bert-base b4 t128 p20 fp32 d0.1 full"
    python -m bench.bench_training_step --memory-only

Every method trains the same BERT on the same batch under AdamW, in turn, in one process. Prefix
gradients are checked against PEFT's in float64 first. A case's rows are written once they are
measured, in place of that case's earlier ones. Columns:

    time / frozen none      ratio of medians
    tokens/s                tokens that are no padding
    kept B/token/layer      counted by hooks, per real token and layer; beside it the formula
    peak MiB                of one step above weights and optimizer state; on a CPU the resident
                            memory of a process of its own
    batch in ... GB         largest, computed from the measured bytes: what is there whatever the
                            batch, and the rest of the peak in proportion to the sequences

The default cases take about half an hour on two cores, --quick (the rows that the speed goals are
about) an hour. --memory-only measures no time.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench import cases
from bench.cases import Case
from bench.measure import RESULTS, Timing, machine_columns, merge_csv, time_interleaved
from bench.memory_model import Batch, Encoder, kept_bytes_of_layer, predict_step
from bench.models import METHODS, MODELS
from bench.training_step import (
    Step,
    check_gradients,
    kept_bytes_per_layer,
    peak_memory,
    small_case,
)
from ptv2_fast.training.measure import kept_bytes

OURS = "frozen none"
BUDGETS = (4, 8, 16, 24)  # GB
KEY = ("case", "method")
MEBIBYTE = 2**20
SHOWN = (  # on the console; the file has all
    "step ms", "p20 ms", "p80 ms", f"time / {OURS}", "tokens/s", "kept MiB", "kept B/token/layer",
    "formula B/token/layer", "peak MiB", "predicted peak MiB", "gradients MiB", "optimizer MiB",
    *(f"batch in {budget} GB" for budget in BUDGETS),
)  # fmt: skip
Row = dict[str, object]


def encoder_of(case: Case) -> Encoder:
    config = MODELS[case.model]
    return Encoder(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        intermediate=config.intermediate_size,
    )


def batch_of(case: Case, device: str) -> Batch:
    return Batch(
        sequences=case.batch,
        tokens=case.padded_tokens,
        prefix=case.prefix,
        element_bytes=case.torch_dtype.itemsize,
        real_tokens=sum(case.sequence_lengths()),
        has_dropout=case.dropout > 0,
        device=device,
    )


def time_columns(case: Case, timing: Timing, ours: Timing) -> Row:
    return {
        "step ms": round(timing.median, 1),
        "p20 ms": round(timing.p20, 1),
        "p80 ms": round(timing.p80, 1),
        f"time / {OURS}": round(timing.median / ours.median, 3),
        "tokens/s": round(sum(case.sequence_lengths()) / timing.median * 1e3),
    }


def kept_columns(case: Case, method: str, device: str) -> Row:
    batch = batch_of(case, device)
    formula = kept_bytes_of_layer(method, encoder_of(case), batch)
    return {
        "kept B/token/layer": round(kept_bytes_per_layer(method, case, device) / batch.rows, 1),
        "formula B/token/layer": round(formula / batch.rows, 1),
    }


def peak_columns(case: Case, method: str, device: str, kept: int) -> Row:
    """The parts of a step's peak and what they allow.

    Args:
        case, method, device: measured.
        kept: bytes of the whole step, counted by hooks.
    """
    memory = peak_memory(method, case, device)
    fixed = memory.weights + memory.gradients + memory.optimizer
    growing = max(kept, memory.above_idle - memory.gradients)
    predicted = predict_step(method, encoder_of(case), batch_of(case, device)).above_idle
    return {
        "peak MiB": _mebibytes(memory.above_idle),
        "predicted peak MiB": _mebibytes(predicted),
        "weights MiB": _mebibytes(memory.weights),
        "gradients MiB": _mebibytes(memory.gradients),
        "optimizer MiB": _mebibytes(memory.optimizer),
        **{
            f"batch in {budget} GB": max(0, int((budget * 1e9 - fixed) * case.batch / growing))
            for budget in BUDGETS
        },
    }


def _mebibytes(count: int) -> float:
    return round(count / MEBIBYTE, 1)


def measure_case(case: Case, chosen: list[str], device: str, rounds: int, output: "Output") -> None:
    """Times the methods, then counts their memory; rows are written after each of the two."""
    check_gradients(small_case(case), device)
    methods = [name for name in methods_of(case) if name in chosen]
    steps = {name: Step(METHODS[name](case, None), case, device) for name in methods}
    timings = time_interleaved(steps, torch.device(device), seconds=0, least_rounds=rounds)
    rows = {}
    for name, step in steps.items():
        kept = kept_bytes(step.loss, step.model)
        rows[name] = {
            **time_columns(case, timings[name], timings[OURS]),
            "trainable": sum(p.numel() for p in step.trained),
            "kept MiB": _mebibytes(kept),
            **kept_columns(case, name, device),
        }
    del steps, step
    output.write(case, rows)
    if case.peak:
        for name, row in rows.items():
            row.update(peak_columns(case, name, device, int(row["kept MiB"] * MEBIBYTE)))
            output.write(case, rows)
    output.show(rows, str(case))


def methods_of(case: Case) -> list[str]:
    """All; of a large model those that fit into one process beside each other."""
    if case.model != "bert-large":
        return list(METHODS)
    return [name for name in METHODS if not name.endswith(("eager", "recipe"))]


def measure_memory(device: str, output: "Output") -> None:
    """Kept bytes of every method, then the peaks of a large model's step."""
    for case in cases.KEPT_CASES:
        rows = {}
        for name in METHODS:
            rows[name] = kept_columns(case, name, device)
            output.write(case, rows)
        output.show(rows, str(case))
    for case in cases.PEAK_CASES:
        rows = {}
        for name in cases.PEAK_METHODS:
            predicted = predict_step(name, encoder_of(case), batch_of(case, device)).peak
            free = free_bytes(device)
            if predicted * 1.2 > free:
                message = f"{name} needs about {predicted / 1e9:.1f} GB, {free / 1e9:.1f} are free"
                output.console.print(f"{case}: left out, {message}")
                continue
            rows[name] = peak_columns(case, name, device, kept=1)
            output.write(case, rows)
        if rows:
            output.show(rows, str(case))


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


class Output:
    """The CSV file and the console of a run."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.console = path, Console(width=220)
        self.machine = machine_columns(torch.device(device))

    def write(self, case: Case, rows: dict[str, Row]) -> None:
        """Put rows of a case into the file, in place of earlier ones."""
        fixed = {"dtype": case.dtype, "dropout": case.dropout, "lengths": case.lengths}
        full = [
            {"case": str(case), "method": name, **fixed, **row, **self.machine}
            for name, row in rows.items()
        ]
        merge_csv(self.path, full, KEY)

    def show(self, rows: dict[str, Row], title: str) -> None:
        measured = {column for row in rows.values() for column in row}
        columns = [column for column in SHOWN if column in measured]
        table = Table("method", *columns, title=title)
        table.columns[0].no_wrap = True
        for name, row in rows.items():
            table.add_row(name, *(str(row.get(column, "")) for column in columns))
        self.console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", action="append", help="a case of any list, by its name")
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="the rows of the speed goals")
    parser.add_argument("--memory-only", action="store_true", help="no timing")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each method")
    parser.add_argument("--output", type=Path, help="CSV file (default: bench/results/...)")
    arguments = parser.parse_args()
    device = arguments.device
    chosen = cases.CPU_CASES if device == "cpu" else cases.GPU_CASES
    if arguments.quick:
        chosen = cases.ACCEPTANCE_CASES
    if arguments.only:
        every = (*chosen, *cases.CPU_CASES, *cases.GPU_CASES, *cases.ACCEPTANCE_CASES)
        known = {str(case): case for case in reversed(every)}
        unknown = [name for name in arguments.only if name not in known]
        if unknown:
            parser.error(f"--only: expected some of {list(known)}, got {unknown}")
        chosen = [known[name] for name in arguments.only]
    subject = "memory" if arguments.memory_only else "training-step"
    output = Output(arguments.output or RESULTS / f"{subject}-{device}.csv", device)
    if arguments.memory_only:
        measure_memory(device, output)
    else:
        methods = [OURS, *(arguments.method or METHODS)]
        for case in chosen:
            measure_case(case, methods, device, arguments.rounds, output)
    output.console.print(f"{output.machine}\nwritten to {output.path}")


if __name__ == "__main__":
    main()
