"""Folders of the form that data sets have on the hub: tables as files, classes as a card says."""

import json

import pytest

from ptv2_fast.tasks import DataOptions, make_task
from ptv2_fast.tasks.sources import find_sources

CARD = "---\ndataset_info:\n  features:\n  - {name: text, dtype: string}\n"
TEXTS = CARD + "  - {name: label, dtype: string}\n---\n"
CLASSES = CARD + "  - name: label\n    dtype: {class_label: {names: {'0': bad, '1': good}}}\n---\n"


@pytest.mark.parametrize("card", [None, TEXTS], ids=["plain", "declared"])
def test_tables_in_a_folder_of_the_hubs_form_are_read_as_files_are(tmp_path, card):
    """Neither a date nor "NA" nor "01" becomes something else, whatever a card declares."""
    rows = [{"text": "2020-01-01", "label": "01"}, {"text": "NA", "label": "1"}]
    written = {
        "csv": "text,label\n2020-01-01,01\nNA,1\n",
        "tsv": "text\tlabel\n2020-01-01\t01\nNA\t1\n",
        "jsonl": "\n".join(map(json.dumps, rows)),
    }
    for name, content in written.items():
        folder = tmp_path / name
        folder.mkdir()
        if card:
            (folder / "README.md").write_text(card)
        (folder / f"train.{name}").write_text(content)
        options = DataOptions(task="text-classification", dataset=str(folder))
        table = make_task(options).read(find_sources(options)["train"]).table
        assert table.to_list() == rows, name


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([0, 1], ["bad", "good"]),
        (["bad", "good"], ["bad", "good"]),
        ([0, 7], "train.*label 7"),
        (["bad", "nice"], "nice"),
        ([0.5, 1], "train.*"),
        (["x", 1], "row 2: expected label to be of one type"),
    ],
)
def test_classes_that_a_card_declares_are_those_of_the_rows(tmp_path, rows, found):
    (tmp_path / "README.md").write_text(CLASSES)
    lines = [json.dumps({"text": "a", "label": label}) for label in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    options = DataOptions(task="text-classification", dataset=str(tmp_path))
    task, source = make_task(options), find_sources(options)["train"]
    if isinstance(found, list):
        assert task.read(source).table["label"][:] == found
        return
    with pytest.raises(ValueError, match=found) as raised:
        task.read(source)
    assert len(str(raised.value)) < 400


def test_json_in_a_folder_of_the_hubs_form_is_read_alike(tmp_path):
    rows = [{"text": "2020-01-01", "label": "a"}, {"text": "2020-01-02", "label": "b"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.jsonl").write_text("[" * 100_000)
    options = DataOptions(task="text-classification", dataset=str(tmp_path),
                          validation_split=None, test_split="test")  # fmt: skip
    sources, task = find_sources(options), make_task(options)
    assert task.read(sources["train"]).table.to_list() == rows
    with pytest.raises(ValueError, match="nested too deeply"):
        task.read(sources["test"])
