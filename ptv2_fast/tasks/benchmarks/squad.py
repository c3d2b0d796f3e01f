"""Extractive question answering in the format of SQuAD (Rajpurkar et al. 2016, 2018)."""

import functools

from ptv2_fast.tasks.benchmarks.benchmark import Benchmark

_squad = functools.partial(
    Benchmark, suite="SQuAD", family="question-answering", metrics=("f1", "em")
)

SQUAD = (
    _squad(
        name="squad",
        title="SQuAD 1.1",
        files={"train": ("train-v1.1.json",), "validation": ("dev-v1.1.json",)},
        hub=("rajpurkar/squad", None),
        options={"max_length": 384, "unanswerable": False},
    ),
    _squad(
        name="squad_v2",
        title="SQuAD 2.0",
        files={"train": ("train-v2.0.json",), "validation": ("dev-v2.0.json",)},
        hub=("rajpurkar/squad_v2", None),
        options={"max_length": 384},
    ),
)
