"""The measured tables of README.md and docs/, written into them from the CSV files.

python -m bench.documented

A table stands between `<!-- NAME: made by python -m bench.documented -->` and `<!-- end -->`.
"""

import csv
import re
from collections.abc import Callable, Iterator
from decimal import ROUND_HALF_UP, Decimal
from statistics import median

from bench import experiment_table
from bench.measure import RESULTS

ROOT = RESULTS.parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "experiments.md")
Row = dict[str, str]

NONE, RECOMPUTED, HOOK = "frozen none", "frozen ffn+qkv", "hook"
PEFT, LORA, FULL = "prefix, peft sdpa", "LoRA r8, peft sdpa", "full fine-tuning, sdpa"
BASE = "bert-base b8 t128 p20 fp32 d0.1"
LARGE_GPU = "bert-large b16 t512 p100 bf16 d0.1 full"
SERVING = {
    "`AdapterBank`, one pass": "bank",
    "one attached model, a pass for each adapter": "one attached model, a pass for each adapter",
    "64 fine-tuned models": "fine-tuned models, a pass for each",
    "PEFT's LoRA with `adapter_names`": "LoRA r8, peft adapter_names",
}
SERVED = "minilm-l6 b64 t128 p20 fp32 d0 conll2003"
SERVING_CASES = {
    "MiniLM-L6, sentences of CoNLL-2003": SERVED,
    "MiniLM-L6, pairs of RTE": "minilm-l6 b64 t256 p20 fp32 d0 rte",
    "BERT-base, sentences of CoNLL-2003": "bert-base b64 t128 p20 fp32 d0 conll2003",
}
# Label -> case of training-step-cpu.csv or training-step-families-cpu.csv.
STEPS = {
    "BERT-base, batch 8, T 128, P 20, fp32, dropout 0.1": f"{BASE} full",
    "the same, half padding": f"{BASE} pad50",
    "the same, batch 4, 70 % padding": "bert-base b4 t128 p20 fp32 d0.1 pad70",
    "P 100, no dropout": "bert-base b8 t128 p100 fp32 d0 full",
    "bf16, dropout 0.1": "bert-base b8 t128 p20 bf16 d0.1 full",
    "bf16, P 100": "bert-base b8 t128 p100 bf16 d0.1 full",
    "bf16, half padding": "bert-base b8 t128 p20 bf16 d0.1 pad50",
    "bf16, no dropout": "bert-base b8 t128 p20 bf16 d0 full",
    "CoNLL-2003's lengths, batch 8, fp32": "bert-base b8 t128 p20 fp32 d0.1 conll2003",
    "RTE's lengths, batch 4, fp32": "bert-base b4 t256 p20 fp32 d0.1 rte",
    "BoolQ's lengths to 256, batch 4, fp32": "bert-base b4 t256 p20 fp32 d0.1 boolq",
    "T 512, batch 2, bf16, no dropout": "bert-base b2 t512 p20 bf16 d0 full",
    "BERT-large, batch 2, T 128, bf16": "bert-large b2 t128 p20 bf16 d0.1 full",
    "MiniLM-L6, batch 16, T 128, fp32": "minilm-l6 b16 t128 p20 fp32 d0.1 full",
    "ModernBERT-base, batch 4, T 512, half padding, fp32":
        "modernbert-base b4 t512 p20 fp32 d0 pad50",
    "the same, bf16": "modernbert-base b4 t512 p20 bf16 d0 pad50",
    "the same without padding, fp32": "modernbert-base b4 t512 p20 fp32 d0 full",
    "the same without padding, bf16": "modernbert-base b4 t512 p20 bf16 d0 full",
    "DeBERTa-v3-base, batch 4, T 256, half padding, fp32":
        "deberta-v2-base b4 t256 p20 fp32 d0.1 pad50",
    "the same without padding": "deberta-v2-base b4 t256 p20 fp32 d0.1 full",
}  # fmt: skip
GPU_STEPS = {
    "BERT-base, batch 32, T 128, P 20": "bert-base b32 t128 p20 bf16 d0.1 full",
    "the same, half padding": "bert-base b32 t128 p20 bf16 d0.1 pad50",
    "BERT-base, batch 16, T 512, P 128": "bert-base b16 t512 p128 bf16 d0.1 full",
    "BERT-large, batch 32, T 128, P 100, half padding": "bert-large b32 t128 p100 bf16 d0.1 pad50",
    "BERT-large, batch 16, T 512, P 100": LARGE_GPU,
}


KINDS = (("fp32", "0.0"), ("fp32", "0.1"), ("bf16", "0.0"), ("bf16", "0.1"))


def read(name: str) -> list[Row]:
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_method(*names: str) -> dict[tuple[str, str], Row]:
    """(case, method) -> its last row of these files."""
    return {(row["case"], row["method"]): row for name in names for row in read(name)}


def rounded(value: str | float, digits: int = 0) -> str:
    """Halves go up, as on paper; "" stays."""
    if value == "":
        return ""
    return str(Decimal(str(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def lines(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def headlines() -> Iterator[str]:
    """README's figures: ptv2-fast, PEFT's prefix tuning, LoRA and fine-tuning."""
    steps, memory = by_method("training-step-cpu.csv"), by_method("memory-cpu.csv")
    gpu, gpu_memory = by_method("gpu-h100/step.csv"), by_method("gpu-h100/memory.csv")
    texts = [rounded(row["texts/s"]) for row in of_64_adapters(SERVED)]
    conll = [row for row in read("experiments.csv") if row["experiment"] == "conll2003"]
    scores = {
        variant: experiment_table.score(runs).split()[0]
        for variant, runs in experiment_table.chosen(conll).items()
    }
    means = score_means()
    scored = [means["conll2003", recipe] for recipe in ("preset", "lora", "fine-tuning")]
    ours, *others = (rounded(100 * float(row["test"]), 1) for row in scored)
    our_time, *times = (rounded(row["to 95 % / fine-tuning's"], 2) for row in scored)
    columns = (NONE, PEFT, LORA, FULL)

    def row(label: str, table: dict, case: str, column: str, methods: tuple, digits: int = 0):
        found = (table.get((case, method), {}).get(column, "") for method in methods)
        return label, *(rounded(value, digits) for value in found)

    recomputed = (RECOMPUTED, PEFT, LORA, FULL)
    kept = row("", steps, f"{BASE} full", "kept MiB", (RECOMPUTED,))[1]
    rows = (
        row("BERT-base, a training step, no padding, ms", steps, f"{BASE} full", "step ms",
            columns),
        row("BERT-base, a training step, half padding, ms", steps, f"{BASE} pad50", "step ms",
            columns),
        row("BERT-base, kept for the backward pass, MiB", steps, f"{BASE} full", "kept MiB",
            columns),
        ('the same, `recompute="ffn+qkv"`', kept, "", "", ""),
        row("BERT-large, 512 tokens, bf16, peak above weights and optimizer, MiB", memory,
            "bert-large b8 t512 p100 bf16 d0 full", "peak MiB", recomputed),
        ("64 adapters of MiniLM-L6 in one batch, texts a second", texts[0], "", texts[3], texts[2]),
        ("CoNLL-2003 with MiniLM-L6, bf16, test F1, per cent", scores["p-tuning-v2"], "",
         scores["lora"], scores["fine-tuning"]),
        ("the same in fp32, ours with the preset", ours, "", *others),
        ("its time to 95 % of fine-tuning's score there (= 1)", our_time, "", *times),
        row("H100: BERT-large, batch 16, 512 tokens, bf16, a step, ms", gpu, LARGE_GPU, "step ms",
            columns, 1),
        row('H100: the same, largest batch in 24 GB (`"ffn+qkv"`)', gpu_memory, LARGE_GPU,
            "batch in 24 GB", recomputed),
    )  # fmt: skip
    header = ("", "ptv2-fast", "PEFT prefix tuning", "PEFT LoRA", "full fine-tuning")
    return lines(header, iter(rows))


def operator_rows(
    dtype: str, dropout: str, positions: bool, density: str | None = None
) -> list[Row]:
    """Of forward and backward together, with DeBERTa's position terms or without."""
    chosen = (dtype, dropout, "forward+backward", positions)
    return [
        row
        for row in read("attention-cpu.csv")
        if (row["dtype"], row["dropout"], row["pass"], "positions" in row["shape"]) == chosen
        and row["density"] == (density or row["density"])
    ]


def speed_up(rows: list[Row], way: str) -> str:
    """Median (least to most)."""
    ratios = [float(row[f"speed-up over {way}"]) for row in rows]
    return f"{rounded(median(ratios), 1)} ({rounded(min(ratios), 1)} to {rounded(max(ratios), 1)})"


def with_dropout(dtype: str, dropout: str) -> str:
    return dtype if dropout == "0.0" else f"{dtype}, dropout {dropout}"


def operator() -> Iterator[str]:
    """Speed-up of forward and backward: median, and the range over all shapes and densities."""

    def row(dtype: str, dropout: str) -> tuple[str, ...]:
        found = operator_rows(dtype, dropout, False)
        cells = [speed_up(found, way) for way in ("concat+sdpa", "concat+eager", "best")]
        share = median(float(each["share of GEMM"]) for each in found)
        return with_dropout(dtype, dropout), *cells, f"{rounded(100 * share)} %"

    header = ("", "against concat + SDPA", "against concat + eager", "against the better one",
              "share of GEMM")  # fmt: skip
    return lines(header, (row(*each) for each in KINDS))


def positions() -> Iterator[str]:
    """Likewise with DeBERTa's position terms, against transformers' arithmetic."""

    def row(dtype: str, dropout: str) -> tuple[str, ...]:
        densities = (operator_rows(dtype, dropout, True, density) for density in ("1.0", "0.5"))
        return with_dropout(dtype, dropout), *(speed_up(rows, "concat+eager") for rows in densities)

    return lines(("", "without padding", "half padding"), (row(*each) for each in KINDS))


def steps() -> Iterator[str]:
    """Training steps on a CPU, divided by the first column."""
    found = by_method("training-step-cpu.csv", "training-step-families-cpu.csv")

    def row(label: str, case: str) -> tuple[str, ...]:
        base = float(found[case, NONE]["step ms"])

        def ratio(method: str) -> str:
            eager = method.replace("sdpa", "eager")
            for name, suffix in ((method, ""), (eager, ", eager")):
                if (case, name) in found:
                    return f"{rounded(float(found[case, name]['step ms']) / base, 2)} x{suffix}"
            return "raises" if method == PEFT else ""

        return label, f"{rounded(base)} ms", *map(ratio, (RECOMPUTED, HOOK, PEFT, LORA, FULL))

    header = ("", "ptv2-fast", '`"ffn+qkv"`', "attention hook", "PEFT prefix, sdpa",
              "LoRA r8, sdpa", "full, sdpa")  # fmt: skip
    return lines(header, (row(*each) for each in STEPS.items()))


def gpu_steps() -> Iterator[str]:
    """Training steps on an H100."""
    found, methods = by_method("gpu-h100/step.csv"), (NONE, HOOK, FULL, LORA, PEFT)
    header = ("bf16, dropout 0.1, ms a step", "ptv2-fast", "hook", "full, sdpa", "LoRA r8, sdpa",
              "PEFT prefix, sdpa")  # fmt: skip
    return lines(
        header,
        (
            (label, *(rounded(found[case, method]["step ms"], 1) for method in methods))
            for label, case in GPU_STEPS.items()
        ),
    )


def of_64_adapters(case: str) -> list[Row]:
    """The rows of serving-cpu.csv with 64 adapters, in the order of SERVING."""
    found = {(row["case"], row["adapters"], row["way"]): row for row in read("serving-cpu.csv")}
    return [found[case, "64", way] for way in SERVING.values()]


def serving() -> Iterator[str]:
    """64 adapters in one batch: texts a second, and the time as a ratio to the bank's."""
    measured = zip(*map(of_64_adapters, SERVING_CASES.values()), strict=True)
    rows = (
        (label, *(f"{rounded(row['texts/s'])} ({rounded(row['time / bank'], 1)})" for row in own))
        for label, own in zip(SERVING, measured, strict=True)
    )
    return lines(("texts a second (time, `AdapterBank` = 1)", *SERVING_CASES), rows)


def score_means() -> dict[tuple[str, str], Row]:
    """The means over seeds of time-to-score.csv, by task and recipe."""
    rows = read("time-to-score.csv")
    return {(row["task"], row["recipe"]): row for row in rows if row["seed"] == "mean"}


def sooner() -> Iterator[str]:
    """Scores of the presets and how soon they come; means of the seeds."""

    def row(each: Row) -> tuple[str, ...]:
        def cell(column: str, digits: int = 2) -> str:
            return rounded(each[column], digits)

        score = "" if each["test"] == "" else rounded(100 * float(each["test"]), 1)
        return (
            each["task"] + (" (held out)" if each["held out"] == "True" else ""), each["recipe"],
            score, cell("test / fine-tuning", 3), cell("seconds / fine-tuning's whole"),
            cell("to 95 % / fine-tuning's"), cell("to 95 % / fine-tuning's whole"),
        )  # fmt: skip

    header = (
        "", "", "test", "of fine-tuning's", "whole time, of fine-tuning's",
        "time to 95 % of its validation score, of its own to there", "of its whole time",
    )  # fmt: skip
    return lines(header, map(row, score_means().values()))


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "headlines": headlines,
    "operator": operator,
    "positions": positions,
    "steps": steps,
    "gpu-steps": gpu_steps,
    "serving": serving,
    "sooner": sooner,
}


def with_tables(page: str) -> str:
    """The page with the tables that the CSV files give."""

    def replaced(match: re.Match[str]) -> str:
        return "\n".join((match[1], *TABLES[match[2]](), match[3]))

    mark = r"(<!-- ([a-z-]+): made by python -m bench\.documented -->)\n[^<]*?(<!-- end -->)"
    return re.sub(mark, replaced, page)


def main() -> None:
    for path in PAGES:
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
