"""Named entity recognition."""

import functools

from ptv2_fast.tasks.benchmarks.benchmark import Benchmark


def bio_labels(kinds: str, begin_only: str = "") -> tuple[str, ...]:
    """O, B-X and I-X of the types in a text, and B-X of those with no further words."""
    begin = [f"B-{kind}" for kind in (*kinds.split(), *begin_only.split())]
    return ("O", *begin, *(f"I-{kind}" for kind in kinds.split()))


_ner = functools.partial(
    Benchmark, suite="NER", family="token-classification", metrics=("f1", "precision", "recall")
)

NER = (
    # Tjong Kim Sang and De Meulder 2003.
    _ner(
        name="conll2003",
        title="CoNLL03",
        files={
            "train": ("train.txt", "eng.train"),
            "validation": ("valid.txt", "dev.txt", "eng.testa"),
            "test": ("test.txt", "eng.testb"),
        },
        hub=("lhoestq/conll2003", None),
        hub_splits={"train": "train", "validation": "validation", "test": "test"},
        labels=bio_labels("LOC MISC ORG PER"),
    ),
    # Roth and Yih 2004, in the files of Bekoulis et al. 2018, which also hold relations.
    _ner(
        name="conll2004",
        title="CoNLL04",
        files={
            "train": ("train.txt",),
            "validation": ("dev.txt", "valid.txt"),
            "test": ("test.txt",),
        },
        options={"conll_word_column": 1, "conll_tag_column": 2},
        labels=bio_labels("Loc Org Other Peop"),
    ),
    # Pradhan et al. 2013.
    _ner(
        name="ontonotes",
        title="OntoNotes 5.0",
        files={
            "train": ("train.sd.conllx",),
            "validation": ("dev.sd.conllx",),
            "test": ("test.sd.conllx",),
        },
        options={"conll_word_column": 1},
        labels=bio_labels(
            "CARDINAL DATE EVENT FAC GPE LANGUAGE LAW LOC MONEY NORP ORDINAL ORG PERCENT PERSON "
            "PRODUCT QUANTITY TIME WORK_OF_ART"
        ),
    ),
)
