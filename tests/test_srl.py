"""Semantic roles: formats, the verb's mark, truncation, scores with and without V, a whole run."""

import gzip
import json

import datasets
import pytest

from ptv2_fast import cli
from ptv2_fast.tasks import DataOptions, make_task
from ptv2_fast.tasks.sources import TYPED, file_source, find_sources
from ptv2_fast.tasks.task import Examples
from ptv2_fast.training.pretrained import load_tokenizer
from tests.conll_files import WRITERS, verbs_with_roles
from tests.models import one_thread  # noqa: F401
from tests.test_ner import byte_level_tokenizer
from tests.tiny_run import save_tiny_model

LABELS = ["B-ARG0", "B-ARGM-LOC", "B-V", "I-ARGM-LOC", "O"]
WORDS = ["Annas", "Bob", "lives", "in", "Berlin", "."]
TAGS = ["O", "B-ARG0", "B-V", "B-ARGM-LOC", "I-ARGM-LOC", "O"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


def role_task(**options):
    return make_task(DataOptions(task="semantic-role-labeling", **options))


def examples_of(words: list[str], predicate: int, tags: list[str]) -> Examples:
    columns = {"words": [words], "predicate": [predicate], "tags": [tags]}
    return Examples(TYPED, datasets.Dataset.from_dict(columns))


def featurize(tokenizer, max_length: int):
    return role_task().featurize(examples_of(WORDS, 2, TAGS), tokenizer, LABELS, max_length)


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("conll2005", ["train", "validation", "test_wsj", "test_brown"]),
        ("conll2012", ["train", "validation", "test"]),
        ("propbank", ["train", "validation", "test"]),
    ],
)
def test_official_files_give_every_verb(tmp_path, name, splits):
    WRITERS[name](tmp_path, 6)
    options = DataOptions(task=name, data_dir=str(tmp_path))
    sources, task = find_sources(options), make_task(options)
    assert list(sources) == splits
    words, predicates, tags = (list(column) for column in zip(*verbs_with_roles(6), strict=True))
    for source in sources.values():
        columns = task.read(source).table.to_dict()
        assert (columns["words"], columns["predicate"]) == (words, predicates)
        if name != "conll2005":  # its roles are called A0, AM-LOC
            assert columns["tags"] == tags
    labels = task.find_labels(task.read(sources["train"]))
    assert len(labels) == {"conll2005": 106, "conll2012": 116, "propbank": 111}[name]


def test_a_verbs_index_in_a_table_is_a_number(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("words,pred,tags\nI ran,1,B-ARG0 B-V\n")
    assert role_task().read(file_source(file)).table["predicate"][:] == [1]
    file.write_text("words,pred,tags\nI ran,ran,B-ARG0 B-V\n")
    with pytest.raises(ValueError, match=r"row 1: expected the index of a verb .* got 'ran'"):
        role_task().read(file_source(file))


def test_compressed_json_lines_are_read(tmp_path):
    WRITERS["propbank"](tmp_path, 3)
    plain = tmp_path / "train.jsonl"
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    tables = [role_task().read(file_source(file)).table.to_dict() for file in (plain, packed)]
    assert tables[0] == tables[1]


def test_bert_gets_the_verb_after_a_separator_in_the_first_segment(tokenizer):
    row = featurize(tokenizer, 24).table[0]
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert tokens == ["[CLS]", "anna", "##s", "bob", "lives", "in", "berlin", ".", "[SEP]",
                      "lives", "[SEP]"]  # fmt: skip
    assert row["token_type_ids"] == [0] * 11
    assert row["labels"] == [-100, 4, -100, 0, 2, 1, 3, 4, -100, -100, -100]
    # The authors append the separator and the verb to the words.
    appended = tokenizer([*WORDS, "[SEP]", "lives"], is_split_into_words=True)
    assert row["input_ids"] == appended["input_ids"]
    assert row["token_type_ids"] == appended["token_type_ids"]


def test_roberta_gets_its_own_separator():
    tokenizer = byte_level_tokenizer()
    row = role_task().featurize(
        examples_of(["He", "is"], 1, ["O", "B-V"]), tokenizer, LABELS, 24
    ).table[0]  # fmt: skip
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert tokens == ["<s>", "Ġ", "H", "e", "Ġ", "i", "s", "</s>", "</s>", "Ġ", "i", "s", "</s>"]
    assert row["labels"] == [-100, 4, -100, -100, 2, *[-100] * 8]


def test_truncation_cuts_the_sentence_and_leaves_the_verb(tokenizer):
    features = featurize(tokenizer, 7)
    row = features.table[0]
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert tokens == ["[CLS]", "anna", "##s", "bob", "[SEP]", "lives", "[SEP]"]
    assert row["labels"] == [-100, 4, -100, 0, -100, -100, -100]
    assert features.truncated == 1
    task = role_task()
    (result,) = task.results([[(4, 0.5), (0, 0.5)]], features, LABELS)
    assert result["tags"] == ["O", "B-ARG0", "O", "O", "O", "O"]
    scores = task.metrics([result], features.examples, LABELS)
    assert scores["precision"] == 1
    assert scores["recall"] == pytest.approx(1 / 3)
    assert scores["recall_without_v"] == 1 / 2
    with pytest.raises(ValueError, match=r"max_length: expected room for a word and .* 'Annas'"):
        long_verb = examples_of(WORDS, 0, TAGS)
        task.featurize(long_verb, tokenizer, LABELS, max_length=4)


def test_scores_with_and_without_the_verb_against_hand_counts():
    """Spans: 4 true, 4 predicted, 2 right; without V and C-V 2, 3 and 1."""
    true = ["B-ARG0", "B-V", "B-ARGM-LOC", "I-ARGM-LOC", "O", "B-C-V"]
    predicted = ["B-ARG0", "B-V", "B-ARGM-LOC", "O", "O", "B-ARG1"]
    task = role_task()
    examples = examples_of(list("abcdef"), 1, true)
    assert task.metrics([{"tags": predicted}], examples, LABELS) == {
        "accuracy": pytest.approx(4 / 6),
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
        "precision_without_v": pytest.approx(1 / 3),
        "recall_without_v": 0.5,
        "f1_without_v": pytest.approx(0.4),
    }
    assert task.metric == "f1"


BAD_FILES = {
    "no index": ("data.txt", "Anna sleeps ||| O O\n", "line 1: expected the index of a verb"),
    "tags": ("data.txt", "0 a b ||| B-V O\n\n0 a b ||| B-V\n", "line 3: expected one label for ea"),
    "no tags": ("data.txt", "0 Anna sleeps\n", "line 1: expected one label for each of 2 words"),
    "index": ("data.txt", "2 a b ||| B-V O\n", "sentence 1: expected the index of a verb among 2"),
    "negative": (
        "data.jsonl", '{"words": ["a"], "pred": -1, "tags": ["B-V"]}\n', "row 1: expected the index"
    ),
    "kind": (
        "data.jsonl", '{"words": ["a"], "pred": 0, "tags": ["V"]}\n', "expected the labels O, B-R"
    ),
    "column": ("data.jsonl", '{"words": ["a"], "tags": ["B-V"]}\n', "predicate_column: expected"),
    "empty": ("data.txt", "\n", "empty data set"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_one_clear_error(tmp_path, case):
    name, content, message = BAD_FILES[case]
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        role_task().read(file_source(file))
    assert name in str(raised.value)


def test_a_typed_sentence_names_its_verb_or_the_index():
    task = role_task()
    texts = ["Bob lives in Oslo.\tlives", "Bob had had 3.\t1", "Bob had had 3.\t2"]
    table = task.from_texts(texts).table
    assert table["predicate"][:] == [1, 1, 2]
    assert table["words"][0] == ["Bob", "lives", "in", "Oslo", "."]
    for text, count in (("Bob lives", 0), ("Bob had had it\thad", 2), ("Bob lives\t9", 0)):
        with pytest.raises(ValueError, match=rf"a tab, and its verb.* there {count} times"):
            task.from_texts([text])


def test_a_run_learns_roles_scores_both_test_sets_and_predicts(model, tmp_path, capsys):
    WRITERS["conll2005"](tmp_path / "data", 24)
    output = tmp_path / "run"
    command = [
        "train", "--task", "conll2005", "--data-dir", str(tmp_path / "data"), "--model", model,
        "--output", str(output), "--method", "fine-tuning", "--learning-rate", "0.01",
        "--batch-size", "4", "--dropout", "0", "--num-train-epochs", "10", "--no-progress",
    ]  # fmt: skip
    assert cli.main(command) == 0
    report = json.loads((output / "report.json").read_text())
    assert list(report["metrics"]) == ["validation", "test_wsj", "test_brown"]
    assert report["metrics"]["test_brown"]["f1_without_v"] > 0.9
    odd = tmp_path / "odd.txt"
    odd.write_text("1 Anna sleeps ||| I-A0 B-V\n")
    capsys.readouterr()
    assert cli.main(["eval", "--run", str(output), "--data", str(odd)]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["examples"] == 1
    assert list(scores["remarks"].values()) == [1]
    text = "Anna lives in Oslo . and sleeps"
    assert cli.main(["predict", "--run", str(output), "--text", f"{text}\tlives"]) == 0
    predicted = json.loads(capsys.readouterr().out)
    assert predicted["words"] == text.split()
    assert predicted["predicate"] == 1
    sure = predicted["scores"]
    mean = pytest.approx((sure[2] + sure[3]) / 2)
    assert predicted["arguments"] == [
        {"role": "A0", "text": "Anna", "first": 0, "last": 0, "start": 0, "end": 4,
         "score": sure[0]},
        {"role": "AM-LOC", "text": "in Oslo", "first": 2, "last": 3, "start": 11, "end": 18,
         "score": mean},
    ]  # fmt: skip
    file = tmp_path / "plain.txt"
    file.write_text(f"6 {text}\n")
    assert cli.main(["predict", "--run", str(output), "--data", str(file)]) == 0
    (argument,) = json.loads(capsys.readouterr().out)["arguments"]
    assert argument.items() >= {"role": "A0", "text": "Anna", "first": 0, "last": 0}.items()
