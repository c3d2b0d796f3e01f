"""Labels of chunks: every scheme gives entity F1, odd labels stop, and the figure has a name."""

import pytest
from sklearn.metrics import f1_score

from ptv2_fast import cli
from ptv2_fast.tasks import DataOptions, make_task
from ptv2_fast.tasks.sources import file_source
from tests.tiny_run import save_tiny_model, write_conll

IOB2 = ["B-PER", "I-PER", "B-PER", "O", "B-LOC", "I-LOC", "I-LOC", "O"]
# Two of three chunks are right; of the last one the end is missing.
PREDICTED = ["B-PER", "I-PER", "B-PER", "O", "B-LOC", "I-LOC", "O", "O"]
# The same chunks in other schemes: the truth, and what is put at its second but last word.
SCHEMES = {
    "bmes": ("B-PER E-PER S-PER O B-LOC M-LOC E-LOC O", "O"),
    "bioes": ("B-PER E-PER S-PER O B-LOC I-LOC E-LOC O", "O"),
    "bilou": ("B-PER L-PER U-PER O B-LOC I-LOC L-LOC O", "O"),
    "bmewo": ("B-PER E-PER W-PER O B-LOC M-LOC E-LOC O", "O"),
    "behind": ("PER-B PER-I PER-B O LOC-B LOC-I LOC-I O", "O"),
    "underscores": ("B_PER I_PER B_PER O B_LOC I_LOC I_LOC O", "O"),
    "lower case": ("b-per i-per b-per o b-loc i-loc i-loc o", "o"),
    "bare": ("B I B O B I I O", "O"),
    "bare bmes": ("B E S O B M E O", "O"),
}


def token_task(**options):
    return make_task(DataOptions(task="token-classification", **options))


def write_tags(file, tags: list[str]) -> str:
    file.write_text("".join(f"w{place} {tag}\n" for place, tag in enumerate(tags)))
    return str(file)


@pytest.mark.parametrize("name", SCHEMES)
def test_chunks_are_scored_in_every_scheme(tmp_path, name):
    tags, outside = SCHEMES[name][0].split(), SCHEMES[name][1]
    task = token_task()
    examples = task.read(file_source(write_tags(tmp_path / "data.txt", tags)))
    labels = task.find_labels(examples)
    predicted = [*tags[:6], outside, outside]
    scores = task.metrics([predicted], examples, labels)
    assert scores["precision"] == scores["recall"] == scores["f1"] == pytest.approx(2 / 3)
    assert "whole chunks" in task.titles(labels)["f1"]
    entities = task.describe({"words": [f"w{i}" for i in range(8)]}, tags, labels)["entities"]
    assert [entity["text"] for entity in entities] == ["w0 w1", "w2", "w4 w5 w6"]


@pytest.mark.parametrize("odd", ["0", "o", "PER-B", "B_PER", "b-PER", "OUT", "I-", "NOUN", "B"])
@pytest.mark.parametrize("tags", [IOB2, SCHEMES["bilou"][0].split()])
def test_an_odd_label_among_those_of_chunks_is_named_before_training(tmp_path, odd, tags):
    file = tmp_path / "data.txt"
    file.write_text("".join(f"w {tag}\n" for tag in tags) + f"\nw O\nw {odd}\nw {odd}\n")
    task = token_task()
    examples = task.read(file_source(file))
    with pytest.raises(ValueError, match=rf"data.txt sentence 2: .* got '{odd}' \(2 words\)"):
        task.find_labels(examples)
    words = token_task(tag_scheme="words")
    assert odd in words.find_labels(examples)
    assert "single words" in words.titles(words.find_labels(examples))["f1"]


def test_o_spelt_otherwise_throughout_is_odd_too(tmp_path):
    task = token_task()
    examples = task.read(file_source(write_tags(tmp_path / "data.txt", ["B-PER", "0", "0"])))
    with pytest.raises(ValueError, match=r"got '0' \(2 words\)"):
        task.find_labels(examples)


@pytest.mark.parametrize(
    "labels",
    ["NOUN VERB I-VERB", "N O V S A U E L M P", "0 1 2", "PRP-S WP-S NN", "S-Bahn U-Bahn X"],
)
def test_labels_of_words_stay_words(tmp_path, labels):
    task = token_task()
    examples = task.read(file_source(write_tags(tmp_path / "data.txt", labels.split())))
    assert "single words" in task.titles(task.find_labels(examples))["f1"]
    assert examples.remarks == {}


def test_macro_f1_counts_only_labels_that_occur():
    words = [["NOUN", "VERB"]]
    task = token_task()
    examples = task.from_texts(["a b"])
    table = examples.table.add_column("tags", words)
    examples = type(examples)(examples.source, table)
    labels = ["ADJ", "NOUN", "VERB", "X"]
    assert task.metrics(words, examples, labels)["f1"] == 1
    text = make_task(DataOptions(task="text-classification"))
    table = table.add_column("label", ["good"])
    examples = type(examples)(examples.source, table)
    assert text.metrics([{"label": "good"}], examples, ["bad", "good"])["f1"] == 1
    wrong = text.metrics([{"label": "fair"}], examples, ["bad", "fair", "good"])["f1"]
    assert wrong == f1_score(["good"], ["fair"], average="macro", zero_division=0)


def test_training_says_which_f1_it_is(tmp_path, capsys):
    arguments = [
        "train", "--task", "token-classification", "--model", save_tiny_model(tmp_path / "model"),
        "--train-file", write_conll(tmp_path / "train.txt", 4), "--dry-run",
        "--num-virtual-tokens", "4", "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    assert "metric: f1 = f1 of whole chunks (labels B-X)" in capsys.readouterr().err
    assert cli.main([*arguments, "--tag-scheme", "words"]) == 0
    assert "metric: f1 = macro F1 of single words" in capsys.readouterr().err
