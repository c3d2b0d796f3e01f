"""GLUE (Wang et al. 2018)."""

from ptv2_fast.tasks.benchmarks.benchmark import Benchmark

GLUE: tuple[Benchmark, ...] = ()
