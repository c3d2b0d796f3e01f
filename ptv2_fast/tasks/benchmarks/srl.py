"""Semantic role labelling."""

from ptv2_fast.tasks.benchmarks.benchmark import Benchmark

SRL: tuple[Benchmark, ...] = ()
