"""Reading of every format, label handling, word alignment, metrics and their errors."""

import json
import math
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch

from ptv2_fast.tasks import DataOptions, make_task
from ptv2_fast.tasks.sources import TYPED, file_source, find_sources
from ptv2_fast.tasks.task import Examples
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.prepare import read_data
from ptv2_fast.training.pretrained import load_tokenizer
from tests.superglue_files import WRITERS
from tests.tiny_run import save_tiny_model, tagged_sentences, write_conll, write_reviews


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tiny_model(tmp_path_factory.mktemp("model")))


def token_task(**options):
    return make_task(DataOptions(task="token-classification", **options))


def text_task(**options):
    return make_task(DataOptions(task="text-classification", **options))


def write_tagged(path, suffix: str) -> str:
    """The tagged sentences in another format."""
    file = path / f"data{suffix}"
    rows = [
        {"tokens": [word for word, _ in row], "ner_tags": [tag for _, tag in row]}
        for row in tagged_sentences(4)
    ]
    if suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        separator = "\t" if suffix == ".tsv" else ","
        lines = [separator.join(("tokens", "ner_tags"))]
        lines += [separator.join(" ".join(cell) for cell in row.values()) for row in rows]
        file.write_text("\n".join(lines) + "\n")
    return str(file)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv", ".tsv"])
def test_every_format_gives_the_examples_of_the_conll_file(tmp_path, suffix):
    task = token_task()
    conll = task.read(file_source(write_conll(tmp_path / "data.txt", 4)))
    other = task.read(file_source(write_tagged(tmp_path, suffix)))
    assert other.table.to_dict() == conll.table.to_dict()


def test_a_data_set_of_the_hub_form_gives_names_for_class_numbers(tmp_path):
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
        }
    )
    rows = {"text": ["a", "b", "c"], "label": [1, 0, 1]}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "train-00000.parquet")
    options = DataOptions(task="text-classification", dataset=str(tmp_path), validation_split=None)
    (source,) = find_sources(options).values()
    examples = make_task(options).read(source)
    assert examples.table["label"][:] == ["pos", "neg", "pos"]


def test_files_that_are_given_go_before_other_sources(tmp_path):
    own = Path(write_reviews(tmp_path / "own.csv", 4))
    WRITERS["rte"](tmp_path / "RTE", 2)
    hub = DataOptions(task="text-classification", dataset="imdb", validation_file=str(own))
    folder = DataOptions(task="rte", data_dir=str(tmp_path), train_file=str(own))
    sources = find_sources(hub)
    assert (sources["train"].name, sources["validation"].path) == ("imdb[train]", own)
    sources = find_sources(folder)
    assert (sources["train"].path, sources["validation"].path.name) == (own, "val.jsonl")


def test_one_column_may_serve_twice(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("text,label\na,b\n")
    examples = text_task(text_pair_column="text").read(file_source(file))
    assert examples.table[0] == {"text": "a", "label": "b", "text_pair": "a"}


def test_words_without_labels_can_be_predicted_but_not_learnt(tmp_path):
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER"]))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")),
                                  "ner_tags": tags})  # fmt: skip
    rows = {"tokens": [["Oslo"], ["Anna"]], "ner_tags": [[1], [-1]]}
    file = tmp_path / "test.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    examples = token_task().read(file_source(file), labelled=False)
    assert examples.table.to_dict() == {"words": [["Oslo"], ["Anna"]]}
    with pytest.raises(ValueError, match=r"parquet row 2: expected one label for each of 1"):
        token_task().read(file_source(file))


def test_numbers_and_words_that_look_missing_are_labels(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("text,label\nNA,10\nnull,9\nNone,-1\n")
    task = text_task()
    examples = task.read(file_source(file))
    assert examples.table["text"][:] == ["NA", "null", "None"]
    assert task.find_labels(examples) == ["-1", "9", "10"]


def test_cells_of_a_table_are_read_as_they_are_spelt(tmp_path):
    """Also where only rows far down show that a column does not hold numbers."""
    file = tmp_path / "data.csv"
    cells = ["01", "1", *["1"] * 25_000, "true", "TRUE", "1.0"]
    file.write_text("text,label\n" + "".join(f"42,{cell}\n" for cell in cells))
    examples = text_task().read(file_source(file))
    assert examples.table["label"][:] == cells
    assert set(examples.table["text"]) == {"42"}
    file.write_text("tokens,ner_tags\n42,7\n")
    assert token_task().read(file_source(file)).table[0] == {"words": ["42"], "tags": ["7"]}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["10", "01", "1"], ["01", "1", "10"]),
        (["x\u00b2", "\u00b2"], ["x\u00b2", "\u00b2"]),
        (["--1", "2"], ["--1", "2"]),
    ],
)
def test_labels_have_one_order(labels, expected):
    assert text_task().find_labels(examples_of(label=labels)) == expected


def test_only_the_first_sub_word_carries_the_label(tmp_path, tokenizer):
    file = tmp_path / "data.txt"
    file.write_text("Annas B-PER\nsleeps O\nberlin B-LOC\n")
    task = token_task()
    features = task.featurize(
        task.read(file_source(file)), tokenizer, ["B-LOC", "B-PER", "O"], max_length=24
    )
    row = features.table[0]
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert tokens == ["[CLS]", "anna", "##s", "sleeps", "berlin", "[SEP]"]
    assert row["labels"] == [-100, 1, -100, 2, 0, -100]
    assert row["word_indices"] == [0, 1, 2]
    assert row["example"] == 0


def test_collators_pad_to_the_longest_example_of_the_batch(tmp_path, tokenizer):
    task = token_task()
    examples = task.read(file_source(write_conll(tmp_path / "data.txt", 3)))
    features = task.featurize(examples, tokenizer, task.find_labels(examples), max_length=24)
    batch = task.collator(tokenizer)(list(features.model_inputs(tokenizer, task.label_columns)))
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 11)
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_truncation_is_counted_or_refused(tmp_path, tokenizer):
    file = write_conll(tmp_path / "data.txt", 3)
    task = token_task()
    labels = ["B-LOC", "B-PER", "O"]
    features = task.featurize(task.read(file_source(file)), tokenizer, labels, max_length=9)
    assert features.truncated == 1
    assert max(map(len, features.table["input_ids"])) == 9
    strict = token_task(long_input="error")
    with pytest.raises(ValueError, match=r"data.txt sentence 3: expected at most 9 tokens"):
        strict.featurize(strict.read(file_source(file)), tokenizer, labels, max_length=9)


def test_a_pair_of_texts_becomes_one_input_with_types(tmp_path, tokenizer):
    file = tmp_path / "data.jsonl"
    file.write_text('{"premise": "anna sleeps", "claim": "it was bad", "gold": "no"}\n')
    task = text_task(text_column="premise", text_pair_column="claim", label_column="gold")
    features = task.featurize(task.read(file_source(file)), tokenizer, ["no", "yes"], 24)
    row = features.table[0]
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert row["labels"] == 0


def examples_of(**columns) -> Examples:
    return Examples(TYPED, datasets.Dataset.from_dict(columns))


def test_metrics_against_hand_counts():
    labels = ["B-LOC", "B-PER", "I-PER", "O"]
    examples = examples_of(tags=[["B-PER", "I-PER", "O", "B-LOC"]])
    # One chunk of two is right; the other chunk is cut short.
    scores = token_task().metrics([{"tags": ["B-PER", "O", "O", "B-LOC"]}], examples, labels)
    assert scores == {"accuracy": 0.75, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    examples = examples_of(tags=[["NOUN", "VERB", "NOUN"]])
    results = [{"tags": ["NOUN", "VERB", "VERB"]}]
    scores = token_task().metrics(results, examples, ["NOUN", "VERB"])
    assert scores["f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    results = [{"label": label} for label in ("no", "no", "yes")]
    examples = examples_of(label=["no", "yes", "yes"])
    scores = text_task().metrics(results, examples, ["no", "yes"])
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["f1"] == pytest.approx(2 / 3)


def test_some_of_the_examples_keep_their_results(tmp_path, tokenizer):
    file = tmp_path / "data.csv"
    file.write_text("text,label\nanna,a\nbob,b\noslo,c\n")
    task, labels = text_task(), ["a", "b", "c"]
    features = task.featurize(task.read(file_source(file)), tokenizer, labels, max_length=8)
    some = features.take([2, 0])
    right = [[float(place == label) for place in range(3)] for label in some.table["labels"]]
    results = task.results(right, some, labels)
    assert [result["label"] for result in results] == ["c", "a"]
    assert task.metrics(results, some.examples, labels)["accuracy"] == 1


def test_words_that_were_cut_off_belong_to_no_entity_and_count_as_missed(tmp_path, tokenizer):
    file, labels = write_conll(tmp_path / "data.txt", 1), ["B-LOC", "B-PER", "O"]
    task = token_task()
    features = task.featurize(task.read(file_source(file)), tokenizer, labels, max_length=5)
    (result,) = task.results([[(1, 0.75), (2, 0.5), (2, 0.25)]], features, labels)
    assert result["tags"] == ["B-PER", "O", "O", "O", "O"]
    assert task.metrics([result], features.examples, labels)["recall"] == 0.5
    described = task.describe(features.examples.table[0], result, labels)
    assert described["scores"] == [0.75, 0.5, 0.25, None, None]
    place = {"first": 0, "last": 0, "start": 0, "end": 4}
    assert described["entities"] == [{"type": "PER", "text": "Anna", **place, "score": 0.75}]


def test_tokenized_examples_are_kept_in_a_folder(tmp_path, tokenizer):
    file, labels = write_conll(tmp_path / "data.txt", 30), ["B-LOC", "B-PER", "O"]
    tables = []
    for max_length, workers in ((24, 1), (24, 1), (9, 2)):
        task = token_task(feature_cache=str(tmp_path / "cache"), preprocessing_num_workers=workers)
        features = task.featurize(task.read(file_source(file)), tokenizer, labels, max_length)
        tables.append(features.table)
    assert tables[0].to_dict() == tables[1].to_dict() != tables[2].to_dict()
    assert [row["example"] for row in tables[2]] == list(range(30))
    names = [{Path(file["filename"]).name for file in table.cache_files} for table in tables]
    assert names[0] == names[1] and len(names[2]) == 2 and not names[0] & names[2]


TYPED_WORDS = {
    "english": "Anna's U.N visit ( to Oslo ) ended .",
    "hindi": "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902 \u0964",
    "bengali": "\u09ac\u09be\u0982\u09b2\u09be \u09ad\u09be\u09b7\u09be !",
    "tamil": "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd\u0ba8\u0bbe\u0b9f\u0bc1 .",
    "thai": "\u0e17\u0e35\u0e48 \u0e19\u0e49\u0e33 ?",
    "arabic": "\u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f\u064c \u0648\u0644 \u060c",
    "hebrew": "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd .",
    "persian": "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u061f",
    "sinhala": "\u0dc1\u0dca\u200d\u0dbb\u0dd3 .",
    "decomposed": "cafe\u0301 e\u0301te\u0301 .",
    "apostrophes": "l\u2019homme d\u2019Oslo \u201c a \u201d",
    "emoji": "good \U0001f469\u200d\U0001f4bb \u2764\ufe0f \U0001f44d\U0001f3fd !",
    "flags": "\U0001f1e9\U0001f1ea \U0001f1f3\U0001f1f4 !",
    "numbers": "x\u00b2 10\u2010fach CO\u2082 $ 3.5 %",
}


@pytest.mark.parametrize("name", TYPED_WORDS)
def test_typed_text_is_cut_into_words_and_punctuation(name):
    """The parts stand with blanks between; without those around punctuation it is the same."""
    words = TYPED_WORDS[name].split(" ")
    joined = re.sub(r" (?=[.!?)\u060c\u061f\u0964\u201d%])|(?<=[(\u201c$]) ", "", TYPED_WORDS[name])
    for text in (TYPED_WORDS[name], joined):
        assert token_task().from_texts([text]).table[0]["words"] == words


def test_zero_width_spaces_part_words_and_unspaced_scripts_are_warned_of():
    """Such a sentence stays a word, where no one said where its words end."""
    chinese, thai = (
        "\u6211\u4f4f\u5728\u5317\u4eac\u5e02",
        "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22",
    )
    with pytest.warns(UserWarning, match="typed text 2, 3: words are cut at blanks"):
        examples = token_task().from_texts(["Anna", chinese, f"{thai}{thai} x"])
    assert examples.table["words"][1] == [chinese]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parted = token_task().from_texts(
            [f"\ufeff{thai}\u200b{thai}", "\u6211 \u4f4f \u5728 \u5317\u4eac"]
        )
    assert parted.table["words"][0] == [thai, thai]


def test_predictions_pick_the_labelled_positions():
    logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]])
    outputs, batch = SimpleNamespace(logits=logits), {"labels": torch.tensor([[-100, 0, 0]])}
    task = token_task()
    (row,) = task.predictions(outputs, batch, ["O", "B-X"])
    assert [number for number, _ in row] == [0, 1]
    sure = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-3))]
    assert [score for _, score in row] == pytest.approx(sure)


BAD_FILES = {
    "empty": ("data.csv", "", "empty data set"),
    "long rows": (
        "data.csv",
        "text,label\na, b,x\nc, d,y\n",
        "expected rows of 2 cells, .* got more",
    ),
    "quotes": (
        "data.tsv",
        'text\tlabel\n"a\tx\nb" c\ty\n',
        "expected no tab inside a cell, got one",
    ),
    "header only": ("data.csv", "text,label\n", "empty data set"),
    "no column": ("data.csv", "sentence,label\na,b\n", "text_column: expected a column of"),
    "no label": ("data.csv", "text,label\na,x\nb,\n", "row 2: expected a label"),
    "broken": ("data.jsonl", '{"text": "a"', "cannot be read as json"),
    "not text": ("data.jsonl", '{"text": 3, "label": "x"}\n', "row 1: expected text in text"),
    "no text": ("data.csv", "text,label\na,x\n ,x\n", "row 2: expected text in text, got ' '"),
    "suffix": ("data.xml", "<a/>", "expected .csv, .tsv, .json, .jsonl or .parquet"),
    "one label": ("data.csv", "text,label\na,x\nb,x\n", r"at least two labels, got \['x'\]"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_text_files_are_one_clear_error(tmp_path, case):
    name, content, message = BAD_FILES[case]
    file = tmp_path / name
    file.write_text(content)
    task = text_task()
    with pytest.raises(ValueError, match=message) as raised:
        task.find_labels(task.read(file_source(file)))
    assert name in str(raised.value)


def test_a_conll_file_without_a_sentence_is_empty(tmp_path):
    file = tmp_path / "data.txt"
    file.write_text("\n\n-DOCSTART- O\n")
    with pytest.raises(ValueError, match="empty data set"):
        token_task().read(file_source(file))


def test_unknown_labels_name_the_label_the_file_and_the_row(tmp_path):
    file = write_reviews(tmp_path / "dev.csv", 4)
    task = text_task()
    with pytest.raises(ValueError, match=r"dev.csv row 2: unknown label 'bad'"):
        task.check_labels(task.read(file_source(file)), ["good", "fair"])


def test_an_unknown_label_is_told_with_a_few_of_the_known_and_those_like_it(tmp_path):
    file = tmp_path / "dev.csv"
    file.write_text(f"text,label\na,class 999 \nb,{'y' * 5000}\n")
    task = text_task()
    labels = [f"class {number}" for number in range(3000)]
    with pytest.raises(ValueError, match=r"dev.csv row 1: unknown label 'class 999 '") as raised:
        task.check_labels(task.read(file_source(file)), labels)
    assert "'class 999', " in str(raised.value) and "and 2995 others" in str(raised.value)
    with pytest.raises(ValueError, match=r"row 2: unknown label 'yyy") as raised:
        task.check_labels(task.read(file_source(file)), [*labels, "class 999 "])
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("other", ["good ", "Good", "go od", "\uff47ood"])
def test_labels_that_look_the_same_are_remarked_on(tmp_path, other):
    file = tmp_path / "train.csv"
    file.write_text(f"text,label\na,good\nb,{other}\nc,bad\n", encoding="utf-8")
    options = {"task": "text-classification", "model": "unread", "train_file": str(file)}
    _, examples, labels = read_data(RunConfig.from_dict(options))
    assert set(labels) == {"good", other, "bad"}
    (remark,) = examples["train"].remarks.items()
    assert "labels that differ in blanks" in remark[0] and remark[1] == [sorted(["good", other])]


def test_words_and_tags_of_unequal_number_name_the_row(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("tokens,ner_tags\nAnna sleeps,B-PER O\nOslo,B-LOC O\n")
    with pytest.raises(ValueError, match=r"data.csv row 2: expected one label for each of 1 words"):
        token_task().read(file_source(file))


def test_typed_texts_and_sentences_without_words_are_errors(tmp_path):
    with pytest.raises(ValueError, match="typed text 2: expected text in text, got ''"):
        text_task().from_texts(["a", ""])
    with pytest.raises(ValueError, match="typed text 1: expected text in text_pair, got ''"):
        text_task(text_pair_column="other").from_texts(["a\t"])
    file = tmp_path / "data.csv"
    file.write_text("tokens,ner_tags\nAnna,B-PER\n,\n")
    with pytest.raises(ValueError, match=r"row 2: expected a list of words, got \[\]"):
        token_task().read(file_source(file))


@pytest.mark.parametrize("tags", [None, [None], [1.5], [["O"]]])
def test_labels_that_are_no_text_name_the_row(tmp_path, tags):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"tokens": ["Anna"], "ner_tags": tags}) + "\n")
    with pytest.raises(ValueError, match=r"data.jsonl row 1: expected one label for each of 1"):
        token_task().read(file_source(file))


def test_missing_files_and_contradictory_options_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"expected an existing file, got '/nowhere\.csv'"):
        file_source("/nowhere.csv")
    with pytest.raises(ValueError, match="train_file: expected a file"):
        find_sources(DataOptions(task="text-classification"))
    with pytest.raises(ValueError, match="dataset: expected None beside train_file"):
        DataOptions(task="text-classification", dataset="rte", train_file="a.csv")
    with pytest.raises(
        ValueError, match="max_length: expected None or an integer >= 1, got 'long'"
    ):
        DataOptions(task="text-classification", max_length="long")
