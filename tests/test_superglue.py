"""Rows of SuperGLUE's eight data sets against strings written by hand."""

import json

import datasets
import pytest

from ptv2_fast.tasks import DataOptions, make_task
from ptv2_fast.tasks.benchmarks import BENCHMARKS
from ptv2_fast.tasks.sources import Source, file_source, find_sources
from ptv2_fast.tasks.tables import read_rows
from tests import superglue_files
from tests.superglue_files import WRITERS

NAMES = [name for name, benchmark in BENCHMARKS.items() if benchmark.suite == "SuperGLUE"]


def rows_of(name: str, row: dict, template: str | None = None) -> list[dict]:
    benchmark = BENCHMARKS[name]
    assert benchmark.rows is not None
    return list(benchmark.rows(row, template or benchmark.templates[0]))


def test_pairs_and_their_labels():
    assert rows_of("boolq", {"question": "is it", "passage": "It is.", "label": True}) == [
        {"text": "is it", "text_pair": "It is.", "label": "True"}
    ]
    row = {"premise": "It is.", "hypothesis": "It was.", "label": "not_entailment"}
    expected = {"text": "It is.", "text_pair": "It was.", "label": "not_entailment"}
    assert rows_of("rte", row) == [expected]
    assert rows_of("cb", row | {"label": "neutral"}) == [expected | {"label": "neutral"}]


def test_templates_of_wic():
    row = {"word": "key", "sentence1": "A key.", "sentence2": "In key.", "label": False}
    text = "A key. In key. Does key have the same meaning in both sentences?"
    assert rows_of("wic", row) == [{"text": text, "label": "False"}]
    assert rows_of("wic", row, "1") == [
        {"text": "key: A key.", "text_pair": "key: In key.", "label": "False"}
    ]


def test_templates_of_wsc():
    target = {"span1_index": 0, "span1_text": "Ann", "span2_index": 2, "span2_text": "she"}
    row = {"text": "Ann said she sleeps.", "target": target, "label": True}
    assert rows_of("wsc", row) == [
        {"text": "she: Ann said she sleeps.", "text_pair": "Ann", "label": "True"}
    ]
    assert rows_of("wsc", row, "1") == [
        {"text": "Ann said *she* sleeps.", "text_pair": "Ann", "label": "True"}
    ]


@pytest.mark.parametrize(("question", "text"), [("cause", "It broke. because"),
                                                ("effect", "It broke. so")])  # fmt: skip
def test_copa(question, text):
    row = {"premise": "It broke.", "choice1": "A.", "choice2": "B.", "question": question}
    assert rows_of("copa", row | {"label": 1}) == [
        {"text": text, "choices": ["A.", "B."], "label": "1"}
    ]


def test_every_answer_of_multirc_is_a_row():
    questions = [
        {"question": "Who?", "idx": 7, "answers": [
            {"text": "Ann", "label": 1, "idx": 0}, {"text": "Bob", "label": 0, "idx": 1}]},
        {"question": "Where?", "idx": 8, "answers": [{"text": "Here", "label": True, "idx": 2}]},
    ]  # fmt: skip
    rows = rows_of("multirc", {"idx": 3, "passage": {"text": "P.", "questions": questions}})
    assert [tuple(row.values()) for row in rows] == [
        ("P.", "Who? Ann", "1", "3 7"), ("P.", "Who? Bob", "0", "3 7"),
        ("P.", "Where? Here", "1", "3 8"),
    ]  # fmt: skip


def test_every_entity_of_record_is_a_row_once():
    text = "Bob met Ann. Bob left.\n@highlight\nBoth left\n@highlight\nAt noon"
    spans = [{"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 13, "end": 15}]
    answers = [{"start": 0, "end": 2, "text": "Bob"}, {"start": 13, "end": 15, "text": "Bob"}]
    questions = [{"query": "@placeholder left Ann", "answers": answers, "idx": 5}]
    row = {"idx": 2, "passage": {"text": text, "entities": spans}, "qas": questions}
    common = {
        "text": "Bob met Ann. Bob left.\n- Both left\n- At noon", "group": "2 5", "answers": ["Bob"]
    }  # fmt: skip
    assert rows_of("record", row) == [
        {"text_pair": "Ann left Ann", "label": "0", "entity": "Ann", **common},
        {"text_pair": "Bob left Ann", "label": "1", "entity": "Bob", **common},
    ]
    # The test set has no answers.
    del questions[0]["answers"]
    assert [row["label"] for row in rows_of("record", row)] == [None, None]


def hub_rows(name: str, count: int) -> list[dict]:
    """The made-up examples as the hub's table of that data set has them."""
    rows = []
    for number in range(count):
        row = getattr(superglue_files, name)(number)
        if name == "multirc":
            passage = row["passage"]
            for question in passage["questions"]:
                for answer in question["answers"]:
                    place = {"paragraph": number, "question": question["idx"]}
                    rows.append({
                        "paragraph": passage["text"], "question": question["question"],
                        "answer": answer["text"], "label": answer["label"],
                        "idx": place | {"answer": answer["idx"]},
                    })  # fmt: skip
        elif name == "record":
            text, (question,) = row["passage"]["text"], row["qas"]
            spans = row["passage"]["entities"]
            rows.append({
                "passage": text,
                "query": question["query"],
                "entities": [text[span["start"] : span["end"] + 1] for span in spans],
                "answers": [answer["text"] for answer in question["answers"]],
                "idx": {"passage": number, "query": question["idx"]},
            })  # fmt: skip
        else:
            rows.append(row | row.pop("target", {}))
    return rows


HUB_LABELS = {
    "rte": ["entailment", "not_entailment"],
    "cb": ["entailment", "contradiction", "neutral"],
    "copa": ["choice1", "choice2"],
    "record": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_official_files_and_hub_tables_give_the_same_rows(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    WRITERS[name](tmp_path / "official", 6)
    rows, labels = hub_rows(name, 6), HUB_LABELS.get(name, ["False", "True"])
    table = datasets.Dataset.from_list(rows)
    if labels is not None:
        numbers = [
            labels.index(row["label"]) if isinstance(row["label"], str) else int(row["label"])
            for row in rows
        ]
        table = table.remove_columns("label").add_column("label", numbers)
        table = table.cast_column("label", datasets.ClassLabel(names=labels))
    (tmp_path / "hub").mkdir()
    table.to_parquet(tmp_path / "hub" / "train-00000.parquet")
    benchmark = BENCHMARKS[name]
    official = file_source(tmp_path / "official" / "train.jsonl")
    hub = Source("hub", hub=(str(tmp_path / "hub"), None, "train"))
    for template in benchmark.templates:
        ours = read_rows(official, benchmark, template).to_list()
        assert ours == read_rows(hub, benchmark, template).to_list()
        assert ("text_pair" in ours[0]) == (template in benchmark.pairs)


def test_a_folder_of_the_whole_suite_is_searched_by_the_official_names(tmp_path):
    WRITERS["multirc"](tmp_path / "MultiRC", 2)
    sources = find_sources(DataOptions(task="multirc", data_dir=str(tmp_path)))
    assert {name: source.path.name for name, source in sources.items()} == {
        "train": "train.jsonl", "validation": "val.jsonl",
    }  # fmt: skip
    (tmp_path / "MultiRC" / "val.jsonl").unlink()
    with pytest.raises(ValueError, match=r"data_dir: expected val.jsonl of MultiRC for the valid"):
        find_sources(DataOptions(task="multirc", data_dir=str(tmp_path)))


def test_answers_to_a_question_are_drawn_together(tmp_path):
    """Else the best of its entities, or all of its answers, would be those that were drawn."""
    WRITERS["multirc"](tmp_path, 10)  # twenty questions of two or three answers
    task = make_task(DataOptions(task="multirc"))
    examples = task.read(file_source(tmp_path / "train.jsonl"))
    drawn = examples.select(examples.draw(12, seed=0)).table["group"][:]
    groups = examples.table["group"][:]
    assert 12 <= len(drawn) <= 14
    assert all(drawn.count(group) == groups.count(group) for group in drawn)
    assert examples.draw(12, seed=0) != examples.draw(12, seed=1)


def test_typed_text_of_a_pair_is_cut_at_the_tab():
    task = make_task(DataOptions(task="rte"))
    assert list(task.from_texts(["It is.\tIt was."]).table) == [
        {"text": "It is.", "text_pair": "It was."}
    ]
    with pytest.raises(ValueError, match="typed text 1: expected two texts with a tab"):
        task.from_texts(["It is."])
    one = make_task(DataOptions(task="wic"))
    assert list(one.from_texts(["A key."]).table) == [{"text": "A key."}]


def test_a_file_without_labels_can_be_predicted_but_not_learnt(tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text('{"premise": "a", "hypothesis": "b", "idx": 0}\n')
    task = make_task(DataOptions(task="rte"))
    assert len(task.read(file_source(file), labelled=False)) == 1
    with pytest.raises(ValueError, match=r"test.jsonl row 1: expected a label .* got None"):
        task.find_labels(task.read(file_source(file)))


BAD_ROWS = {
    "another set": ("rte", {"question": "a", "passage": "b"}, "row of RTE.*KeyError: 'premise"),
    "no text": ("boolq", {"question": None, "passage": "b"}, "question is None, not text"),
    "no pronoun": ("wsc", {"text": "a b", "target": {"span1_text": "a", "span2_index": 5,
                                                     "span2_text": "b"}}, "row of WSC"),
    "no question": ("copa", {"premise": "a", "choice1": "b", "choice2": "c", "question": "why"},
                    "row of COPA"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_wrong_rows_are_one_clear_error(tmp_path, case):
    name, row, message = BAD_ROWS[case]
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(row) + "\n")
    task = make_task(DataOptions(task=name, template="1" if name == "wsc" else None))
    with pytest.raises(ValueError, match=message) as raised:
        task.read(file_source(file))
    assert "train.jsonl row 1" in str(raised.value)


def test_unknown_templates_are_refused():
    with pytest.raises(ValueError, match=r"template: expected one of \('0', '1'\), got '2'"):
        DataOptions(task="wic", template="2")
