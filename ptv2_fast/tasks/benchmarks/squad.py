"""Extractive question answering in the format of SQuAD."""

from ptv2_fast.tasks.benchmarks.benchmark import Benchmark

SQUAD: tuple[Benchmark, ...] = ()
