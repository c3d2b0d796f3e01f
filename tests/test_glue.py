"""Rows of GLUE's nine data sets, and numbers as labels from the file to the prediction."""

import json

import datasets
import pytest

from ptv2_fast import cli
from ptv2_fast.tasks import DataOptions, make_task
from ptv2_fast.tasks.benchmarks import BENCHMARKS
from ptv2_fast.tasks.sources import Source, file_source, find_sources
from ptv2_fast.tasks.tables import read_rows
from tests.models import one_thread  # noqa: F401
from tests.superglue_files import WRITERS
from tests.tiny_run import save_tiny_model

NAMES = [name for name, benchmark in BENCHMARKS.items() if benchmark.suite == "GLUE"]

FIRST, SECOND = "Anna lives in Berlin .", '"Anna sleeps'
# The first row of the made-up files: quotation marks are text.
OFFICIAL = {
    "cola": {"text": '"A film sleeps', "label": "0"},
    "mnli": {"text": FIRST, "text_pair": SECOND, "label": "contradiction"},
    "mrpc": {"text": FIRST, "text_pair": SECOND, "label": "0"},
    "qnli": {"text": FIRST, "text_pair": SECOND, "label": "entailment"},
    "qqp": {"text": FIRST, "text_pair": SECOND, "label": "0"},
    "glue-rte": {"text": FIRST, "text_pair": SECOND, "label": "entailment"},
    "sst2": {"text": "a bad film", "label": "0"},
    "stsb": {"text": FIRST, "text_pair": SECOND, "label": 0.25},
    "wnli": {"text": FIRST, "text_pair": SECOND, "label": "0"},
}
# On the hub: the columns of the texts, and what the labels are called.
HUB = {
    "cola": (("sentence",), ["unacceptable", "acceptable"]),
    "mnli": (("premise", "hypothesis"), ["entailment", "neutral", "contradiction"]),
    "mrpc": (("sentence1", "sentence2"), ["not_equivalent", "equivalent"]),
    "qnli": (("question", "sentence"), ["entailment", "not_entailment"]),
    "qqp": (("question1", "question2"), ["not_duplicate", "duplicate"]),
    "glue-rte": (("sentence1", "sentence2"), ["entailment", "not_entailment"]),
    "sst2": (("sentence",), ["negative", "positive"]),
    "stsb": (("sentence1", "sentence2"), None),
    "wnli": (("sentence1", "sentence2"), ["not_entailment", "entailment"]),
}


@pytest.mark.parametrize("name", NAMES)
def test_official_files_and_hub_tables_give_the_same_rows(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    benchmark = BENCHMARKS[name]
    WRITERS[name](tmp_path / "official", 6)
    sources = find_sources(DataOptions(task=name, data_dir=str(tmp_path / "official")))
    rows = read_rows(sources["train"], benchmark, "default").to_list()
    assert len(rows) == 6
    assert rows[0] == OFFICIAL[name]
    assert ("text_pair" in rows[0]) == ("default" in benchmark.pairs)

    columns, labels = HUB[name]
    table = {
        column: [row[ours] for row in rows]
        for ours, column in zip(("text", "text_pair"), columns, strict=False)
    }
    table["label"] = [row["label"] for row in rows]
    if labels is not None:  # 0 and 1 in the files are the first and the second name
        table["label"] = [
            int(label) if label.isdigit() else labels.index(label) for label in table["label"]
        ]
    hub = datasets.Dataset.from_dict(table)
    if labels is not None:
        hub = hub.cast_column("label", datasets.ClassLabel(names=labels))
    (tmp_path / "hub").mkdir()
    hub.to_parquet(tmp_path / "hub" / "train-00000.parquet")
    source = Source("hub", hub=(str(tmp_path / "hub"), None, "train"))
    assert read_rows(source, benchmark, "default").to_list() == rows


def test_mnli_is_validated_on_both_parts(tmp_path):
    WRITERS["mnli"](tmp_path / "MNLI", 3)
    sources = find_sources(DataOptions(task="mnli", data_dir=str(tmp_path)))
    assert {name: source.path.name for name, source in sources.items()} == {
        "train": "train.tsv", "validation": "dev_matched.tsv",
        "validation_mismatched": "dev_mismatched.tsv",
    }  # fmt: skip


def test_the_test_file_of_mnli_has_no_labels(tmp_path):
    (tmp_path / "test.tsv").write_text("index\tsentence1\tsentence2\n0\ta film\tthe film\n")
    task = make_task(DataOptions(task="mnli"))
    examples = task.read(file_source(tmp_path / "test.tsv"), labelled=False)
    assert examples.table[0] == {"text": "a film", "text_pair": "the film", "label": None}


def test_mrpc_as_microsoft_ships_it(tmp_path):
    """With a byte order mark in front."""
    lines = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tHe said \"no.\tIt's it.\r\n"
    for part in ("train", "test"):
        (tmp_path / f"msr_paraphrase_{part}.txt").write_text(lines, encoding="utf-8-sig")
    options = DataOptions(task="mrpc", data_dir=str(tmp_path))
    examples = make_task(options).read(find_sources(options)["validation"])
    assert examples.table.to_list() == [
        {"text": 'He said "no.', "text_pair": "It's it.", "label": "1"}
    ]


def test_rows_of_qqp_that_a_line_break_tore_are_left_out_and_listed(tmp_path):
    """As in the official train.tsv; a question may be empty."""
    lines = [
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "1\t2\t3\tWho?\t\t0",
        '4\t5\t6\t"Was it real?',
        '"\tDid it happen?\t0',
        "7\t8\t9\tWhy?\tHow?\t1",
    ]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    task = make_task(DataOptions(task="qqp"))
    examples = task.read(file_source(tmp_path / "train.tsv"))
    assert examples.table.to_list() == [
        {"text": "Who?", "text_pair": "", "label": "0"},
        {"text": "Why?", "text_pair": "How?", "label": "1"},
    ]
    assert examples.remarks == {"torn rows left out": {"rows": 2, "numbers": [2, 3]}}
    # A prediction for each line of the file; and a file without labels is an error, not empty.
    assert len(task.read(file_source(tmp_path / "train.tsv"), labelled=False)) == 4
    (tmp_path / "none.tsv").write_text("\n".join(lines[:1] + lines[2:4]) + "\n")
    with pytest.raises(ValueError, match="row 1: expected a label"):
        task.find_labels(task.read(file_source(tmp_path / "none.tsv")))


def test_a_number_is_learnt_and_predicted(tmp_path, capsys):
    """The made-up pairs of 0.25 and 4.25 differ in their second sentence."""
    WRITERS["stsb"](tmp_path / "STS-B", 24)
    run = str(tmp_path / "run")
    command = [
        "train", "--task", "stsb", "--data-dir", str(tmp_path), "--output", run, "--no-progress",
        "--model", save_tiny_model(tmp_path / "model"), "--method", "p-tuning-v2",
        "--num-virtual-tokens", "4",
        "--learning-rate", "0.03", "--batch-size", "5", "--num-train-epochs", "12",
        "--dropout", "0",
    ]  # fmt: skip
    assert cli.main(command) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["metrics"]["validation"]["pearson"] > 0.9
    capsys.readouterr()
    for text in (f"{FIRST}\t{SECOND}", f"{FIRST}\tit was a bad film"):
        assert cli.main(["predict", "--run", run, "--text", text]) == 0
    near, far = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert near["text_pair"] == SECOND
    assert near["score"] < 2.25 < far["score"]
    assert set(near) == {"text", "text_pair", "score"}
    dev = str(tmp_path / "STS-B" / "dev.tsv")
    assert cli.main(["eval", "--run", run, "--data", dev]) == 0
    assert json.loads(capsys.readouterr().out)["pearson"] == pytest.approx(
        report["metrics"]["validation"]["pearson"]
    )


def test_numbers_of_a_users_own_file(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("text,label\na,1\nb,-2.5\n")
    task = make_task(DataOptions(task="text-classification", regression=True))
    examples = task.read(file_source(file))
    assert task.find_labels(examples) == ["score"]
    assert task.metric == "pearson"


@pytest.mark.parametrize("label", ["good", "", "nan", "inf"])
def test_a_label_that_is_no_number_names_its_row(tmp_path, label):
    file = tmp_path / "data.csv"
    file.write_text(f"text,label\na,1.5\nb,{label}\n")
    task = make_task(DataOptions(task="text-classification", regression=True))
    with pytest.raises(ValueError, match=r"data.csv row 2: expected a number as label, got"):
        task.find_labels(task.read(file_source(file)))


@pytest.mark.parametrize("task", ["multiple-choice", "cola"])
def test_only_text_classification_takes_numbers(task):
    with pytest.raises(ValueError, match=f"regression: expected False for the task {task}"):
        DataOptions(task=task, regression=True)
