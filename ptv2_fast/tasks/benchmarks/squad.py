"""Extractive question answering in the format of SQuAD (Rajpurkar et al. 2016, 2018)."""

from ptv2_fast.tasks.benchmarks.benchmark import Benchmark

_SPLITS = {"train": "train", "validation": "validation"}

SQUAD = (
    Benchmark(
        name="squad",
        title="SQuAD 1.1",
        suite="SQuAD",
        family="question-answering",
        metrics=("f1", "em"),
        files={"train": ("train-v1.1.json",), "validation": ("dev-v1.1.json",)},
        hub=("rajpurkar/squad", None),
        hub_splits=_SPLITS,
        options={"max_length": 384, "unanswerable": False},
    ),
    Benchmark(
        name="squad_v2",
        title="SQuAD 2.0",
        suite="SQuAD",
        family="question-answering",
        metrics=("f1", "em"),
        files={"train": ("train-v2.0.json",), "validation": ("dev-v2.0.json",)},
        hub=("rajpurkar/squad_v2", None),
        hub_splits=_SPLITS,
        options={"max_length": 384},
    ),
)
