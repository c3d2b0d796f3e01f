"""What does one training step cost, in time and memory, beside what people run today?

    python -m bench.bench_training_step
    python -m bench.bench_training_step --quick --rounds 3
    python -m bench.bench_training_step --families
    python -m bench.bench_training_step --deberta
    python -m bench.bench_training_step --only "bert-base b4 t128 p20 fp32 d0.1 full"
    python -m bench.bench_training_step --memory-only

On a CPU; `python -m bench.gpu step memory` measures a GPU. Every method trains the same encoder on
the same batch under AdamW, in turn, in one process. Prefix gradients are checked in float64 first.
A case's rows are written once they are measured, in place of that case's earlier ones. Columns:

    time / frozen none      ratio of medians
    tokens/s                tokens that are no padding
    kept B/token/layer      counted by hooks, per real token and layer; beside it the formula, which
                            knows frozen blocks of every kind and else BERT's
    peak MiB                of one step above weights and optimizer state: the resident memory of a
                            process of its own
    batch in ... GB         largest, computed from the measured bytes: what is there whatever the
                            batch, and the rest of the peak in proportion to the sequences

The default cases take about half an hour on two cores, --quick (the rows that the speed goals are
about) an hour, --families (ModernBERT and NomicBERT, to 2,048 tokens) two to three, --deberta one.
--memory-only measures no time.
"""

import argparse
import itertools
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench import cases
from bench.cases import Case
from bench.measure import RESULTS, machine_columns, merge_csv, time_interleaved
from bench.models import EAGER_ONLY, METHODS, MODELS, build, why_left_out
from bench.step_columns import (
    MEBIBYTE,
    Row,
    kept_columns,
    mebibytes,
    peak_columns,
    predicted_step,
    time_columns,
)
from bench.training_step import PeakMemory, Step, check_gradients, peak_memory, small_case
from ptv2_fast.training.measure import kept_bytes

OURS = "frozen none"
DEVICE = "cpu"
BUDGETS = (4, 8, 16, 24)  # GB
KEY = ("case", "method")
SHOWN = (  # on the console; the file has all
    "step ms", "p20 ms", "p80 ms", f"time / {OURS}", "tokens/s", "kept MiB", "kept B/token/layer",
    "formula B/token/layer", "peak MiB", "predicted peak MiB", "gradients MiB", "optimizer MiB",
    *(f"batch in {budget} GB" for budget in BUDGETS),
)  # fmt: skip


def batch_columns(case: Case, memory: PeakMemory, kept: int) -> Row:
    """The largest batches that a step's peak allows; `kept`: bytes of the step, by hooks."""
    fixed = memory.weights + memory.gradients + memory.optimizer
    growing = max(kept, memory.above_idle - memory.gradients)
    return {
        f"batch in {budget} GB": max(0, int((budget * 1e9 - fixed) * case.batch / growing))
        for budget in BUDGETS
    }


def measure_case(case: Case, chosen: list[str], rounds: int, output: "Output") -> None:
    """Times the methods, then counts their memory; rows are written after each of the two."""
    check_gradients(small_case(case), DEVICE)
    methods = methods_of(case, chosen, output.console)
    steps = {name: Step(build(name, case, DEVICE), case, DEVICE) for name in methods}
    timings = time_interleaved(steps, torch.device(DEVICE), seconds=0, least_rounds=rounds)
    rows = {}
    for name, step in steps.items():
        kept = kept_bytes(step.loss, step.model)
        rows[name] = {
            **time_columns(case, timings[name], {OURS: timings[OURS]}),
            "trainable": sum(p.numel() for p in step.trained),
            "kept MiB": mebibytes(kept),
            **kept_columns(case, name, DEVICE),
        }
    del steps, step
    output.write(case, rows)
    if case.peak:
        for name, row in rows.items():
            memory = peak_memory(name, case)
            row.update(peak_columns(case, name, DEVICE, memory))
            row.update(batch_columns(case, memory, int(row["kept MiB"] * MEBIBYTE)))
            output.write(case, rows)
    output.show(rows, str(case))


def methods_of(case: Case, chosen: Iterable[str], console: Console) -> list[str]:
    """Those of `chosen` that run here; the console is told why each other one does not.

    Of a large model or text those that fit into one process beside each other.
    """
    here, is_large = [], case.model == "bert-large" or case.tokens > 512
    for name in METHODS:
        if name not in chosen:
            continue
        reason = why_left_out(name, case, DEVICE)
        is_eager = (
            name.endswith(("eager", "recipe")) and MODELS[case.model].model_type not in EAGER_ONLY
        )
        if reason is None and is_large and is_eager:
            reason = "so large it does not fit beside the others"
        if reason is None:
            here.append(name)
        else:
            console.print(f"{case}: {name} left out, {reason}")
    return here


def measure_memory(output: "Output", chosen: list[Case]) -> None:
    """Kept bytes of every method, then the peaks of a large model's step."""
    for case in [case for case in cases.KEPT_CASES if case in chosen]:
        rows = {}
        for name in methods_of(case, METHODS, output.console):
            rows[name] = kept_columns(case, name, DEVICE)
            output.write(case, rows)
        output.show(rows, str(case))
    for case in [case for case in cases.PEAK_CASES if case in chosen]:
        rows = {}
        for name in methods_of(case, cases.PEAK_METHODS, output.console):
            predicted, free = predicted_step(case, name, DEVICE), free_bytes()
            if predicted is not None and predicted.peak * 1.2 > free:
                needed = f"needs about {predicted.peak / 1e9:.1f} GB"
                message = f"{name} {needed}, {free / 1e9:.1f} are free"
                output.console.print(f"{case}: left out, {message}")
                continue
            memory = peak_memory(name, case)
            rows[name] = peak_columns(case, name, DEVICE, memory)
            rows[name].update(batch_columns(case, memory, kept=1))
            output.write(case, rows)
        if rows:
            output.show(rows, str(case))


def free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


class Output:
    """The CSV file and the console of a run."""

    def __init__(self, path: Path) -> None:
        self.path, self.console = path, Console(width=220)
        self.machine = machine_columns(torch.device(DEVICE))

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
    parser.add_argument("--only", action="append", help="a case of any list, by its name")
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="the rows of the speed goals")
    parser.add_argument("--families", action="store_true", help="blocks of other kinds than BERT's")
    parser.add_argument("--deberta", action="store_true", help="DeBERTa v3's, of three lengths")
    parser.add_argument("--memory-only", action="store_true", help="no timing")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each method")
    parser.add_argument("--output", type=Path, help="CSV file (default: bench/results/...)")
    arguments = parser.parse_args()
    chosen = cases.CPU_CASES
    if arguments.quick:
        chosen = cases.ACCEPTANCE_CASES
    if arguments.families:
        chosen = cases.FAMILY_CASES
    if arguments.deberta:
        chosen = cases.DEBERTA_CASES
    if arguments.memory_only:
        chosen = [*cases.KEPT_CASES, *cases.PEAK_CASES]
    chosen = [case for case in chosen if case.model in MODELS]
    if arguments.only:
        lists = (cases.CPU_CASES, cases.ACCEPTANCE_CASES, cases.FAMILY_CASES, cases.DEBERTA_CASES)
        if arguments.memory_only:
            lists = (cases.KEPT_CASES, cases.PEAK_CASES)
        every = (*chosen, *itertools.chain(*lists))
        known = {str(case): case for case in reversed(every) if case.model in MODELS}
        unknown = [name for name in arguments.only if name not in known]
        if unknown:
            parser.error(f"--only: expected some of {list(known)}, got {unknown}")
        chosen = [known[name] for name in arguments.only]
    subject = "memory" if arguments.memory_only else "training-step"
    output = Output(arguments.output or RESULTS / f"{subject}-{DEVICE}.csv")
    if arguments.memory_only:
        measure_memory(output, chosen)
    else:
        methods = [OURS, *(arguments.method or METHODS)]
        for case in chosen:
            measure_case(case, methods, arguments.rounds, output)
    output.console.print(f"{output.machine}\nwritten to {output.path}")


if __name__ == "__main__":
    main()
