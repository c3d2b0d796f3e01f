"""GLUE (Wang et al. 2018).

Rows are those of the official tab-separated files or of the hub's tables; both give the same, with
labels as the official files spell them.
"""

import csv
import functools
from collections.abc import Iterator
from typing import Any

from ptv2_fast.tasks.benchmarks.benchmark import Benchmark
from ptv2_fast.tasks.benchmarks.rows import sentences, text


def similarity(row: dict[str, Any], template: str) -> Iterator[dict[str, Any]]:
    """STS-B: two sentences and how similar they are, 0 to 5."""
    score = row.get("score", row.get("label"))
    label = None if score is None else float(score)
    yield {"text": text(row, "sentence1"), "text_pair": text(row, "sentence2"), "label": label}


_HUB = "nyu-mll/glue"
# Quotation marks are characters of the text.
_CSV = {"sep": "\t", "quoting": csv.QUOTE_NONE}
# What most of the nine have in common.
_glue = functools.partial(
    Benchmark,
    suite="GLUE",
    family="text-classification",
    metrics=("accuracy",),
    files={"train": ("train.tsv",), "validation": ("dev.tsv",)},
    pairs=("default",),
    csv_options=_CSV,
)

GLUE = (
    _glue(
        "cola", "CoLA", hub=(_HUB, "cola"), metrics=("matthews_correlation",), pairs=(),
        rows=sentences(("sentence", "label"), classes=("unacceptable", "acceptable")),
        csv_options=_CSV | {"header": None, "names": ["source", "label", "star", "sentence"]},
    ),
    _glue(
        "mnli", "MNLI", hub=(_HUB, "mnli"),
        rows=sentences(
            ("sentence1", "sentence2", "gold_label"), ("premise", "hypothesis", "label")
        ),
        files={
            "train": ("train.tsv",),
            "validation": ("dev_matched.tsv",),
            "validation_mismatched": ("dev_mismatched.tsv",),
        },
        hub_splits={
            "train": "train",
            "validation": "validation_matched",
            "validation_mismatched": "validation_mismatched",
        },
        # Without the parse trees, most of the file. A test file has no labels.
        csv_options=_CSV | {"usecols": {"sentence1", "sentence2", "gold_label"}.__contains__},
    ),
    _glue(
        "mrpc", "MRPC", hub=(_HUB, "mrpc"), metrics=("accuracy", "f1"),
        rows=sentences(
            ("#1 String", "#2 String", "Quality"), ("sentence1", "sentence2", "label"),
            classes=("not_equivalent", "equivalent"),
        ),
        # GLUE's dev.tsv is part of Microsoft's training file; where that was not cut, Microsoft's
        # test file is what is left to validate on.
        files={
            "train": ("train.tsv", "msr_paraphrase_train.txt"),
            "validation": ("dev.tsv", "msr_paraphrase_test.txt"),
        },
    ),
    _glue("qnli", "QNLI", hub=(_HUB, "qnli"), rows=sentences(("question", "sentence", "label"))),
    _glue(
        "qqp", "QQP", hub=(_HUB, "qqp"), metrics=("accuracy", "f1"), torn_rows=True,
        rows=sentences(
            ("question1", "question2", "is_duplicate"), ("question1", "question2", "label"),
            classes=("not_duplicate", "duplicate"),
        ),
    ),
    _glue(
        "glue-rte", "RTE", hub=(_HUB, "rte"), rows=sentences(("sentence1", "sentence2", "label"))
    ),
    _glue(
        "sst2", "SST-2", hub=(_HUB, "sst2"), pairs=(),
        rows=sentences(("sentence", "label"), classes=("negative", "positive")),
    ),
    _glue(
        "stsb", "STS-B", hub=(_HUB, "stsb"), rows=similarity, metrics=("pearson", "spearmanr"),
        options={"regression": True},
    ),
    _glue(
        "wnli", "WNLI", hub=(_HUB, "wnli"),
        rows=sentences(
            ("sentence1", "sentence2", "label"), classes=("not_entailment", "entailment")
        ),
    ),
)  # fmt: skip
