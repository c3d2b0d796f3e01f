"""Semantic role labelling of given verbs."""

import functools

from ptv2_fast.tasks.benchmarks.benchmark import Benchmark
from ptv2_fast.tasks.benchmarks.ner import bio_labels

# Those that tasks/srl/datasets of THUDM/P-tuning-v2 lists: 106 and 116 labels.
_CONLL2005_LABELS = bio_labels(
    """
    A0 A1 A2 A3 A4 A5 AA AM AM-ADV AM-CAU AM-DIR AM-DIS AM-EXT AM-LOC AM-MNR AM-MOD AM-NEG AM-PNC
    AM-PRD AM-REC AM-TM AM-TMP C-A0 C-A1 C-A2 C-A3 C-A4 C-A5 C-AM-ADV C-AM-CAU C-AM-DIR C-AM-DIS
    C-AM-EXT C-AM-LOC C-AM-MNR C-AM-PNC C-AM-TMP C-V R-A0 R-A1 R-A2 R-A3 R-A4 R-AM-ADV R-AM-DIR
    R-AM-EXT R-AM-LOC R-AM-MNR R-AM-PNC R-AM-TMP V
    """,
    begin_only="C-AM-NEG R-AA R-AM-CAU",
)
_CONLL2012_LABELS = bio_labels(
    """
    ARG0 ARG1 ARG2 ARG3 ARG4 ARG5 ARGA ARGM-ADJ ARGM-ADV ARGM-CAU ARGM-COM ARGM-DIR ARGM-DIS
    ARGM-DSP ARGM-EXT ARGM-GOL ARGM-LOC ARGM-MNR ARGM-MOD ARGM-NEG ARGM-PNC ARGM-PRD ARGM-PRP
    ARGM-REC ARGM-TMP C-ARG0 C-ARG1 C-ARG2 C-ARG3 C-ARG4 C-ARGM-ADV C-ARGM-CAU C-ARGM-DSP
    C-ARGM-EXT C-ARGM-LOC C-ARGM-MNR C-ARGM-MOD C-ARGM-PRP C-ARGM-TMP R-ARG0 R-ARG1 R-ARG2 R-ARG3
    R-ARG4 R-ARGM-ADV R-ARGM-CAU R-ARGM-COM R-ARGM-DIR R-ARGM-EXT R-ARGM-GOL R-ARGM-LOC R-ARGM-MNR
    R-ARGM-PRD R-ARGM-PRP R-ARGM-TMP
    """,
    begin_only="ARGM-LVB ARGM-PRR ARGM-PRX R-ARG5 V",
)
# Of the three splits of UD English-EWT with the spans of propbank-release: 111 labels.
_EWT_LABELS = bio_labels(
    """
    ARG0 ARG1 ARG1-DSP ARG2 ARG3 ARG4 ARG5 ARGM-ADJ ARGM-ADV ARGM-CAU ARGM-COM ARGM-CXN ARGM-DIR
    ARGM-DIS ARGM-EXT ARGM-GOL ARGM-LOC ARGM-MNR ARGM-MOD ARGM-NEG ARGM-PRD ARGM-PRP ARGM-PRR
    ARGM-REC ARGM-TMP C-ARG0 C-ARG1 C-ARG1-DSP C-ARG2 C-ARG3 C-ARG4 C-ARGM-CXN C-ARGM-EXT
    C-ARGM-MNR C-ARGM-TMP R-ARG0 R-ARG1 R-ARG2 R-ARG3 R-ARG4 R-ARGM-ADJ R-ARGM-ADV R-ARGM-CAU
    R-ARGM-COM R-ARGM-DIR R-ARGM-GOL R-ARGM-LOC R-ARGM-MNR R-ARGM-TMP V
    """,
    begin_only="ARGA ARGM-LVB C-ARGM-ADV C-ARGM-COM C-ARGM-DIR C-ARGM-GOL C-ARGM-LOC C-ARGM-PRP "
    "C-ARGM-PRR C-V",
)

_srl = functools.partial(
    Benchmark,
    suite="SRL",
    family="semantic-role-labeling",
    metrics=("f1", "f1_without_v", "precision", "recall"),
)

SRL = (
    # Carreras and Marquez 2005, as lines of the form that He et al. 2017 introduced.
    _srl(
        name="conll2005",
        title="CoNLL05",
        files={
            "train": ("conll05.train.txt", "conll2005.train.txt"),
            "validation": ("conll05.devel.txt", "conll05.dev.txt", "conll2005.devel.txt"),
            "test_wsj": ("conll05.test.wsj.txt", "conll2005.test.wsj.txt"),
            "test_brown": ("conll05.test.brown.txt", "conll2005.test.brown.txt"),
        },
        labels=_CONLL2005_LABELS,
    ),
    # Pradhan et al. 2012, in the same form.
    _srl(
        name="conll2012",
        title="CoNLL12",
        files={
            "train": ("conll2012.train.txt", "conll12.train.txt"),
            "validation": ("conll2012.devel.txt", "conll2012.dev.txt", "conll12.devel.txt"),
            "test": ("conll2012.test.txt", "conll12.test.txt"),
        },
        labels=_CONLL2012_LABELS,
    ),
    # One JSON object a verb: words, pred (its index), tags; other keys are not read.
    _srl(
        name="propbank",
        title="PropBank EWT",
        files={
            "train": ("train.jsonl", "train.jsonl.gz"),
            "validation": ("dev.jsonl", "dev.jsonl.gz"),
            "test": ("test.jsonl", "test.jsonl.gz"),
        },
        labels=_EWT_LABELS,
    ),
)
