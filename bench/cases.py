"""The cases of the training benchmarks: an encoder, a batch, a dtype and a dropout, by name."""

import csv
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Mean share of real tokens, of sequences whose lengths are spread evenly around it.
DENSITIES = {"full": 1.0, "pad50": 0.5, "pad70": 0.3}
LENGTHS_FILE = Path(__file__).parent / "lengths.csv"


@dataclass(frozen=True)
class Case:
    """What one group of rows measures.

    Args:
        model: a key of models.MODELS.
        batch, tokens, prefix: sequences, tokens of each with its padding, P.
        dtype: a key of DTYPES.
        dropout: of hidden states and attention.
        lengths: a key of DENSITIES, or a data set of lengths.csv: `batch` evenly spaced quantiles
            of its lengths, cut at `tokens` and padded to the longest, as a collator does.
        peak: measure the peak memory of every method too, in a process for each.
    """

    model: str
    batch: int
    tokens: int
    prefix: int
    dtype: str = "fp32"
    dropout: float = 0.1
    lengths: str = "full"
    peak: bool = False

    def __str__(self) -> str:
        size = f"b{self.batch} t{self.tokens} p{self.prefix}"
        return f"{self.model} {size} {self.dtype} d{self.dropout:g} {self.lengths}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def sequence_lengths(self) -> list[int]:
        """Real tokens of each sequence."""
        if self.lengths in DENSITIES:
            return spread_lengths(self.batch, self.tokens, DENSITIES[self.lengths])
        known = _data_set_lengths(self.lengths)
        return [min(self.tokens, known[int(place * len(known))]) for place in _places(self.batch)]

    @property
    def padded_tokens(self) -> int:
        """Of each sequence, padding included."""
        return self.tokens if self.lengths in DENSITIES else max(self.sequence_lengths())


def spread_lengths(batch: int, tokens: int, density: float) -> list[int]:
    """Lengths of at least one token, spread evenly around density * tokens."""
    spread = 2 * min(density, 1 - density)
    parts = [density + spread * (place - 0.5) for place in _places(batch)]
    return [max(1, round(tokens * part)) for part in parts]


def _places(batch: int) -> list[float]:
    """Of each sequence between the shortest, 0, and the longest, 1."""
    return [(index + 0.5) / batch for index in range(batch)]


def _data_set_lengths(name: str) -> list[int]:
    with LENGTHS_FILE.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["data set"] == name]
    return sorted(int(row["tokens"]) for row in rows for _ in range(int(row["sequences"])))


def _acceptance() -> list[Case]:
    return [
        Case("bert-base", 8, 128, prefix, dtype, dropout, lengths)
        for dtype in DTYPES
        for lengths in ("full", "pad50")
        for dropout in (0.1, 0.0)
        for prefix in (20, 100)
    ]


ACCEPTANCE_CASES = _acceptance()
# Each axis is varied with the others at a default, so that a CPU gets through.
CPU_CASES = [
    Case("bert-base", 4, 128, 20, peak=True),
    Case("bert-base", 4, 128, 8),
    Case("bert-base", 4, 128, 100),
    Case("bert-base", 4, 128, 20, dropout=0.0),
    Case("bert-base", 4, 128, 20, lengths="pad50"),
    Case("bert-base", 4, 128, 20, lengths="pad70"),
    Case("bert-base", 4, 128, 20, "bf16", peak=True),
    Case("bert-base", 4, 128, 20, "bf16", 0.0),
    Case("bert-base", 2, 512, 20, "bf16", 0.0),
    Case("bert-base", 8, 128, 20, lengths="conll2003"),
    Case("bert-base", 4, 256, 20, lengths="rte"),
    Case("bert-base", 4, 256, 20, lengths="boolq"),
    Case("minilm-l6", 16, 128, 20, peak=True),
    Case("minilm-l6", 16, 128, 100, "bf16", 0.0),
    Case("bert-large", 2, 128, 20, "bf16"),
]
# Gated networks, rotary positions and, in ModernBERT, windows, with the dropout of their
# configurations: half padding, the lengths of a data set that reach so far, no padding.
FAMILY_CASES = [
    Case(f"{family}-base", batch, tokens, 20, dtype, 0.0, lengths)
    for batch, tokens, every_lengths in (
        (8, 128, ("pad50", "conll2003", "full")),
        (4, 512, ("pad50", "boolq", "full")),
        (2, 2048, ("pad50",)),
        (1, 2048, ("full",)),
    )
    for family in ("modernbert", "nomic_bert")
    for dtype in DTYPES
    for lengths in every_lengths
]
# DeBERTa's: the lengths of the goals, and of longer texts.
DEBERTA_CASES = [
    Case("deberta-v2-base", batch, tokens, 20, dtype, lengths=lengths)
    for batch, tokens in ((8, 128), (4, 256), (2, 512))
    for dtype in DTYPES
    for lengths in ("pad50", "full")
]
# No timing: kept bytes by hooks; peaks of a large model's step.
KEPT_CASES = [Case("bert-base", 4, 512, 128, "bf16", dropout) for dropout in (0.0, 0.1)]
PEAK_CASES = [Case("bert-large", 8, 512, 100, "bf16", dropout) for dropout in (0.0, 0.1)]
PEAK_CASES.append(Case("deberta-xlarge", 1, 128, 20, "bf16"))
PEAK_METHODS = (
    "full fine-tuning, sdpa", "full fine-tuning, eager", "LoRA r8, peft eager", "prefix, peft sdpa",
    "frozen ffn+qkv",
)  # fmt: skip
