"""Rows of the paper's tables on 32 real examples with a tiny model; run by hand.

PTV2_SOURCE is the folder that bench.experiment_data reads; PTV2_ALLENNLP the unpacked package
allennlp 0.9.0, whose fixtures hold a document of OntoNotes with its roles.
"""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.experiment_data import WRITERS
from ptv2_fast import cli
from ptv2_fast.recipes.published import published_scores
from ptv2_fast.tasks.benchmarks import BENCHMARKS
from tests.tiny_run import save_tiny_model

COUNT = 32


def superglue(name: str) -> Callable[[Path, Path], None]:
    """Training examples and 32 more, which for most sets is all that is at hand."""

    def write(source: Path, folder: Path) -> None:
        for split, file in (("train", "train"), ("val", "dev32")):
            shutil.copyfile(
                source / "superglue" / name / f"{file}.jsonl", folder / f"{split}.jsonl"
            )

    return write


def ontonotes(source: Path, folder: Path) -> None:
    """Sentences of CoNLL-2003 in the columns of OntoNotes; LOC, ORG and O have the same names."""
    WRITERS["conll2003"](source, folder)
    for split, name in (("train", "train"), ("valid", "dev"), ("test", "test")):
        blocks = (folder / f"{split}.txt").read_text().split("\n\n")[1 : 1 + COUNT]
        lines = []
        for block in blocks:
            rows = [line.split() for line in block.splitlines()]
            for number, (word, *_, tag) in enumerate(rows, 1):
                tag = "O" if tag.endswith("MISC") else tag.replace("-PER", "-PERSON")
                lines.append(f"{number}\t{word}\t_\t_\t{tag}")
            lines.append("")
        (folder / f"{name}.sd.conllx").write_text("\n".join(lines))


def conll2005(source: Path, folder: Path) -> None:
    """Verbs of English-EWT with the roles called as in 2005."""
    with gzip.open(source / "srl_ewt" / "train.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(600), strict=False)]
    known = set(BENCHMARKS["conll2005"].labels)
    lines = []
    for row in rows:
        tags = [tag.replace("ARGM", "AM").replace("ARG", "A") for tag in row["tags"]]
        if known.issuperset(tags):
            lines.append(f"{row['pred']} {' '.join(row['words'])} ||| {' '.join(tags)}\n")
    for number, split in enumerate(("train", "devel", "test.wsj", "test.brown")):
        part = lines[number * COUNT : (number + 1) * COUNT]
        assert len(part) == COUNT
        (folder / f"conll05.{split}.txt").write_text("".join(part))


def conll2012(source: Path, folder: Path) -> None:
    """A document of OntoNotes: brackets of the roles' columns as B and I."""
    file = "allennlp/tests/fixtures/data/srl/nt_6401.gold_conll"
    blocks = (Path(os.environ["PTV2_ALLENNLP"]) / file).read_text().split("\n\n")
    lines = []
    for block in blocks:
        rows = [line.split() for line in block.splitlines() if line and not line.startswith("#")]
        verbs = [index for index, row in enumerate(rows) if row[7] != "-"]
        for column, verb in enumerate(verbs):
            words, tags, role, first = [row[3] for row in rows], [], None, False
            for row in rows:
                cell = row[11 + column]
                if "(" in cell:
                    role, first = cell.strip("()*"), True
                tags.append("O" if role is None else f"{'B' if first else 'I'}-{role}")
                first = False
                if ")" in cell:
                    role = None
            lines.append(f"{verb} {' '.join(words)} ||| {' '.join(tags)}\n")
    assert len(lines) >= 2 * COUNT
    (folder / "conll2012.train.txt").write_text("".join(lines[:COUNT]))
    (folder / "conll2012.devel.txt").write_text("".join(lines[COUNT : 2 * COUNT]))


def squad(source: Path, folder: Path) -> None:
    """XQuAD, its first half to train on."""
    articles = json.loads((source / "qa" / "xquad.en.json").read_text())["data"]
    half = len(articles) // 2
    for name, part in (("train", articles[:half]), ("dev", articles[half:])):
        (folder / f"{name}-v1.1.json").write_text(json.dumps({"version": "1.1", "data": part}))


def squad_v2(source: Path, folder: Path) -> None:
    """Disfl-QA."""
    WRITERS["disfl_qa"](source, folder)
    for ours, theirs in (("train", "train"), ("val", "dev")):
        (folder / f"{ours}.json").rename(folder / f"{theirs}-v2.0.json")


ROWS: dict[str, Callable[[Path, Path], None]] = {
    **{name: WRITERS[name] for name in ("rte", "wsc", "cb", "boolq", "multirc")},
    **{name: WRITERS[name] for name in ("conll2003", "conll2004", "propbank")},
    "copa": superglue("COPA"),
    "wic": superglue("WiC"),
    "record": superglue("ReCoRD"),
    "ontonotes": ontonotes,
    "conll2005": conll2005,
    "conll2012": conll2012,
    "squad": squad,
    "squad_v2": squad_v2,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", positions=384)


def test_every_row_of_tables_2_and_3_is_here():
    assert {f.task for f in published_scores() if f.source in ("Table 2", "Table 3")} <= set(ROWS)


# Table 4, but for SST-2, which is not at hand: the language model's head.
WORDS_OF = {
    "rte": "entailment=good,not_entailment=bad",
    "cb": "entailment=good,contradiction=bad,neutral=was",
    "boolq": "True=good,False=bad",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "head"),
    [*((name, ()) for name in ROWS), *((n, ("lm", w)) for n, w in WORDS_OF.items())],
)
def test_a_row_of_the_tables_on_real_examples(name, head, tiny, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    ROWS[name](Path(os.environ["PTV2_SOURCE"]), data)
    command = [
        "train", "--task", name, "--data-dir", str(data), "--model", tiny, "--output", str(run),
        "--num-virtual-tokens", "4", "--max-length", "128", "--doc-stride", "32",
        "--max-train-examples", str(COUNT), "--max-eval-examples", str(COUNT),
        "--num-train-epochs", "2", "--batch-size", "8", "--no-progress",
    ]  # fmt: skip
    if head:
        command += ["--head", head[0], "--verbalizer", head[1]]
    assert cli.main(command) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["examples"]["train"] == COUNT
    assert set(BENCHMARKS[name].metrics) <= set(report["metrics"]["validation"])
