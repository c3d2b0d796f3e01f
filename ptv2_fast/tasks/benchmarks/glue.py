"""GLUE (Wang et al. 2018).

Rows are those of the official tab-separated files or of the hub's tables; both give the same, with
labels as the official files spell them.
"""

import csv
from collections.abc import Iterator
from typing import Any

from ptv2_fast.tasks.benchmarks.benchmark import Benchmark, Rows
from ptv2_fast.tasks.benchmarks.fields import class_label, text


def sentences(*forms: tuple[str, ...], classes: tuple[str, ...] = ()) -> Rows:
    """Rows of one or two texts and a label.

    Args:
        forms: the columns of the texts and, last, of the label: in the official files and, where
            they differ, on the hub.
        classes: how the hub calls labels that are numbers in the official files.
    """

    def rows(row: dict[str, Any], template: str) -> Iterator[dict[str, Any]]:
        columns = next((form for form in forms if form[0] in row), forms[0])[:-1]
        label = next((row[form[-1]] for form in forms if form[-1] in row), None)
        # zip is not strict: some have one text.
        texts = zip(("text", "text_pair"), columns, strict=False)
        yield {
            **{name: text(row, column) for name, column in texts},
            "label": class_label(label, classes),
        }

    return rows


def similarity(row: dict[str, Any], template: str) -> Iterator[dict[str, Any]]:
    """STS-B: two sentences and how similar they are, 0 to 5."""
    score = row.get("score", row.get("label"))
    label = None if score is None else float(score)
    yield {"text": text(row, "sentence1"), "text_pair": text(row, "sentence2"), "label": label}


def _benchmark(name: str, title: str, rows: Rows, **more: Any) -> Benchmark:
    """What all nine have in common."""
    values: dict[str, Any] = {
        "metrics": ("accuracy",),
        "pairs": ("default",),
        "files": {"train": ("train.tsv",), "validation": ("dev.tsv",)},
        "hub": ("nyu-mll/glue", name),
        "hub_splits": {"train": "train", "validation": "validation"},
        # Quotation marks are characters of the text.
        "table": {"sep": "\t", "quoting": csv.QUOTE_NONE, **more.pop("table", {})},
        **more,
    }
    return Benchmark(
        name=name, title=title, suite="GLUE", family="text-classification", rows=rows, **values
    )


GLUE = (
    _benchmark(
        "cola", "CoLA",
        sentences(("sentence", "label"), classes=("unacceptable", "acceptable")),
        metrics=("matthews_correlation",), pairs=(),
        table={"header": None, "names": ["source", "label", "star", "sentence"]},
    ),
    _benchmark(
        "mnli", "MNLI",
        sentences(("sentence1", "sentence2", "gold_label"), ("premise", "hypothesis", "label")),
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
        table={"usecols": {"sentence1", "sentence2", "gold_label"}.__contains__},
    ),
    _benchmark(
        "mrpc", "MRPC",
        sentences(
            ("#1 String", "#2 String", "Quality"), ("sentence1", "sentence2", "label"),
            classes=("not_equivalent", "equivalent"),
        ),
        metrics=("accuracy", "f1"),
        # GLUE's dev.tsv is part of Microsoft's training file; where that was not cut, Microsoft's
        # test file is what is left to validate on.
        files={
            "train": ("train.tsv", "msr_paraphrase_train.txt"),
            "validation": ("dev.tsv", "msr_paraphrase_test.txt"),
        },
    ),
    _benchmark("qnli", "QNLI", sentences(("question", "sentence", "label"))),
    _benchmark(
        "qqp", "QQP",
        sentences(
            ("question1", "question2", "is_duplicate"), ("question1", "question2", "label"),
            classes=("not_duplicate", "duplicate"),
        ),
        metrics=("accuracy", "f1"),
        torn_rows=True,
    ),
    _benchmark(
        "glue-rte", "RTE", sentences(("sentence1", "sentence2", "label")),
        hub=("nyu-mll/glue", "rte"),
    ),
    _benchmark(
        "sst2", "SST-2", sentences(("sentence", "label"), classes=("negative", "positive")),
        pairs=(),
    ),
    _benchmark(
        "stsb", "STS-B", similarity, metrics=("pearson", "spearmanr"), options={"regression": True}
    ),
    _benchmark(
        "wnli", "WNLI",
        sentences(("sentence1", "sentence2", "label"), classes=("not_entailment", "entailment")),
    ),
)  # fmt: skip
