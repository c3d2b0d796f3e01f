"""Published data sets by name, one file a suite; nothing heavy is imported."""

from ptv2_fast.tasks.benchmarks.benchmark import Benchmark
from ptv2_fast.tasks.benchmarks.glue import GLUE
from ptv2_fast.tasks.benchmarks.ner import NER
from ptv2_fast.tasks.benchmarks.squad import SQUAD
from ptv2_fast.tasks.benchmarks.srl import SRL
from ptv2_fast.tasks.benchmarks.superglue import SUPERGLUE

__all__ = ["BENCHMARKS", "Benchmark"]

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (*SUPERGLUE, *GLUE, *NER, *SRL, *SQUAD)
}
