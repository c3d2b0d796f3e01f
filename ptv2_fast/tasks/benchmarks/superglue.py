"""SuperGLUE (Wang et al. 2019), phrased as the authors of P-Tuning v2 do."""

from collections.abc import Iterator
from typing import Any

from ptv2_fast.tasks.benchmarks.benchmark import Benchmark

_SPLITS = {"train": "train", "validation": "validation"}
_FILES = {"train": ("train.jsonl",), "validation": ("val.jsonl",)}


def entailment(row: dict[str, Any], template: str) -> Iterator[dict[str, Any]]:
    """RTE and CB: (premise, hypothesis)."""
    yield {"text": row["premise"], "text_pair": row["hypothesis"], "label": row["label"]}


SUPERGLUE = (
    Benchmark(
        name="rte",
        title="RTE",
        suite="SuperGLUE",
        family="text-classification",
        metrics=("accuracy",),
        files=_FILES,
        hub=("aps/super_glue", "rte"),
        hub_splits=_SPLITS,
        rows=entailment,
        paper="Table 2",
    ),
)
