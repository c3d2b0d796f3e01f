"""How many texts a second do many adapters on one encoder answer, and in how much memory?

    python -m bench.bench_serving
    python -m bench.bench_serving --quick

On a CPU. A batch of texts with the lengths of real data, each for one of 1, 8 or 64 adapters, by
the bank in one pass and by what people do without it, in turn, in one process. The bank's logits
are checked first. Columns:

    texts/s                 by the median time of a batch
    p50 ms, p99 ms          of a batch; of few rounds the latter is the slowest
    time / bank             ratio of medians
    time / one adapter      the bank's: with one adapter for the same batch
    memory MiB              of a process of its own after a batch, above what it had before; of many
                            fine-tuned models computed from the measured ones
    memory / encoder alone
"""

import argparse
import gc
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.cases import Case
from bench.measure import RESULTS, machine_columns, merge_csv, sample_interleaved
from bench.serving_ways import INSIDE, MOST_MODELS, WAYS, Answer, Requests, bank, switching
from bench.training_step import resident_bytes, return_freed_tensors

CASES = [
    Case("minilm-l6", 64, 128, 20, dropout=0.0, lengths="conll2003"),
    Case("minilm-l6", 64, 256, 20, dropout=0.0, lengths="rte"),
    Case("bert-base", 64, 128, 20, dropout=0.0, lengths="conll2003"),
    Case("bert-base", 64, 256, 20, dropout=0.0, lengths="rte"),
]
ADAPTERS = (1, 8, 64)
OURS, ALONE, MODELS = "bank", "encoder alone", "fine-tuned models, a pass for each"
KEY = ("case", "adapters", "way")
MEBIBYTE = 2**20


@torch.no_grad()
def check(case: Case, adapters: int, **more: Any) -> None:
    """Refuse to go on unless the bank gives what each adapter alone does.

    Against float64 it may be twice as far as these are in float32, plus four rounding units.

    Args:
        case, adapters: what is measured.
        more: fields of the prefix's configuration.
    """
    requests = Requests(case, adapters)
    exact = switching(case, adapters, requests, double=True, **more)().double()
    yardstick = (switching(case, adapters, requests, **more)().double() - exact).abs().max()
    budget = 2 * yardstick + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    error = (bank(case, adapters, requests, **more)().double() - exact).abs().max()
    if not error <= budget:
        raise SystemExit(
            f"{case}, {adapters} adapters: the bank is {error:.2e} off, over {budget:.2e}"
        )


@torch.no_grad()
def milliseconds(
    answers: dict[tuple[int, str], Answer], rounds: int
) -> dict[tuple[int, str], list]:
    """Times of each, in turn, after a warm-up."""
    for answer in answers.values():
        answer()
    return sample_interleaved(answers, torch.device("cpu"), rounds)


@torch.no_grad()
def _memory(way: str, case: Case, adapters: int) -> int:
    """Bytes that this process has more after the batch."""
    torch.set_num_threads(1)
    return_freed_tensors()
    before = resident_bytes()
    answer = WAYS[way](case, adapters, Requests(case, adapters))
    answer()
    gc.collect()
    return resident_bytes() - before


def memory(way: str, case: Case, adapters: int) -> int:
    """Bytes of a way, in a process of its own."""
    held = min(adapters, MOST_MODELS) if way == MODELS else adapters
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        measured = pool.submit(_memory, way, case, held).result()
    return measured * adapters // held


def measure(case: Case, rounds: int, output: Path, console: Console) -> None:
    """Check, time and weigh a case, and write its rows."""
    check(case, ADAPTERS[-1])
    check(case, ADAPTERS[-1], **INSIDE)
    answers = {
        (count, way): make(case, count, Requests(case, count))
        for count in ADAPTERS
        for way, make in WAYS.items()
        if way != ALONE or count == 1
    }
    samples = milliseconds(answers, rounds)
    answers.clear()
    medians = {key: statistics.median(times) for key, times in samples.items()}
    rows = []
    alone = memory(ALONE, case, 1)
    for (count, way), times in samples.items():
        held = alone if way == ALONE else memory(way, case, count)
        row = {
            "case": str(case),
            "adapters": count,
            "way": way,
            "texts/s": round(1e3 * case.batch / medians[count, way], 1),
            "p50 ms": round(medians[count, way], 2),
            "p99 ms": round(statistics.quantiles(times, n=100, method="inclusive")[98], 2),
            f"time / {OURS}": round(medians[count, way] / medians[count, OURS], 3),
            "time / one adapter": round(medians[count, way] / medians[1, OURS], 3)
            if way == OURS
            else None,
            "memory MiB": round(held / MEBIBYTE, 1),
            f"memory / {ALONE}": round(held / alone, 3),
        }
        rows.append(row | {"rounds": rounds} | machine_columns(torch.device("cpu")))
    merge_csv(output, rows, KEY)
    shown = list(rows[0])[1:10]
    table = Table(*shown, title=str(case))
    for row in rows:
        table.add_row(*(str(row[name]) for name in shown))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", help="a case by its name")
    parser.add_argument("--quick", action="store_true", help="the first case, few rounds")
    parser.add_argument("--rounds", type=int, default=20, help="timed batches of each way")
    parser.add_argument("--output", type=Path, default=RESULTS / "serving-cpu.csv")
    arguments = parser.parse_args()
    known = {str(case): case for case in CASES}
    unknown = set(arguments.only or []) - set(known)
    if unknown:
        parser.error(f"--only: expected some of {list(known)}, got {sorted(unknown)}")
    chosen = [known[name] for name in arguments.only or known]
    console = Console(width=200)
    for case in chosen[:1] if arguments.quick else chosen:
        measure(case, 5 if arguments.quick else arguments.rounds, arguments.output, console)
    console.print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
