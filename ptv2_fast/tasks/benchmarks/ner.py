"""Named entity recognition."""

from ptv2_fast.tasks.benchmarks.benchmark import Benchmark

NER = (
    Benchmark(
        name="conll2003",
        title="CoNLL03",
        suite="NER",
        family="token-classification",
        metrics=("f1", "precision", "recall"),
        files={
            "train": ("train.txt", "eng.train"),
            "validation": ("valid.txt", "dev.txt", "eng.testa"),
            "test": ("test.txt", "eng.testb"),
        },
        hub=("eriktks/conll2003", None),
        hub_splits={"train": "train", "validation": "validation", "test": "test"},
        paper="Table 3",
    ),
)
