"""Labels of chunks: every scheme gives entity F1, odd labels stop, the figure has a name, and
decoding keeps to the scheme."""

import itertools
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from sklearn.metrics import f1_score

from ptv2_fast import cli
from ptv2_fast.tasks import DataOptions, make_task
from ptv2_fast.tasks.chunks import find_scheme
from ptv2_fast.tasks.decoding import (
    MOST_LABELS,
    WEIGHT,
    affinities,
    broken,
    count_transitions,
    decode,
    rules_of,
)
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
    scores = task.metrics([{"tags": predicted}], examples, labels)
    assert scores["precision"] == scores["recall"] == scores["f1"] == pytest.approx(2 / 3)
    assert "whole chunks" in task.titles(labels)["f1"]
    result = {"tags": tags, "scores": [None] * 8}
    entities = task.describe({"words": [f"w{i}" for i in range(8)]}, result, labels)["entities"]
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
    assert task.metrics([{"tags": words[0]}], examples, labels)["f1"] == 1
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


def rules_by_hand(parts: set[str], before: str, after: str) -> bool:
    """Whether a label may follow another, "" being the sentence's border, spelt out by cases."""
    part, kind = after[:1], after[2:]
    closed = before[:1] not in ("B", "I") or "E" not in parts
    if part in ("I", "E"):
        return before[:1] in ("B", "I") and before[2:] == kind
    return closed


@pytest.mark.parametrize("name", ["iob", *SCHEMES])
def test_rules_of_a_scheme_forbid_what_no_chunk_has(name):
    known = IOB2 if name == "iob" else SCHEMES[name][0].split()
    scheme = find_scheme(known)
    spelt = {"M": "I", "L": "E", "U": "S", "W": "S"}
    labels = tuple(sorted({*known}))
    plain = [scheme.as_seqeval(label) for label in labels]
    parts = {tag[0] for tag in plain}
    rules = rules_of(scheme, labels)
    assert not parts & {*spelt} and "I" in parts
    for number, tag in enumerate(plain):
        assert rules.first[number] == rules_by_hand(parts, "", tag)
        assert rules.last[number] == rules_by_hand(parts, tag, "")
        for other, after in enumerate(plain):
            assert rules.between[number, other] == rules_by_hand(parts, tag, after), (tag, after)


@pytest.mark.parametrize(
    ("labels", "allowed"),
    [
        (["I-PER", "I-LOC", "O"], ["I-PER I-LOC O I-LOC"]),  # IO
        (["E-PER", "I-PER", "O"], ["E-PER O I-PER E-PER"]),  # IOE
        (["B-PER", "I-PER", "I-LOC", "O"], ["I-LOC B-PER I-LOC"]),  # a type that nothing begins
    ],
)
def test_a_type_that_no_label_begins_may_begin_inside(labels, allowed):
    rules = rules_of(find_scheme(labels), tuple(labels))
    for tags in allowed:
        numbers = torch.tensor([labels.index(tag) for tag in tags.split()])
        assert broken(numbers, torch.tensor([len(numbers)]), rules).tolist() == [0]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("tags", [IOB2, SCHEMES["bioes"][0].split(), ["I-PER", "O", "I-LOC"]])
def test_decoding_finds_the_best_of_all_allowed_sequences(tags, counted):
    """Against every sequence; rows of one to five words, one without any."""
    labels = sorted({*tags})
    rules = rules_of(find_scheme(labels), tuple(labels))
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 5, 3, 0, 4, 2])
    logits = 3 * torch.randn(int(lengths.sum()), len(labels), generator=generator)
    before = logits.clone()
    affinity = 5 * affinities(labels, count_transitions([tags])) if counted else None
    between = 0 * rules.between.double() if affinity is None else WEIGHT * affinity.double()
    found = decode(logits, lengths, rules, affinity)
    assert torch.equal(logits, before)
    for length, scores, path in zip(
        lengths, logits.double().log_softmax(-1).split(lengths.tolist()),
        found.split(lengths.tolist()), strict=True,
    ):  # fmt: skip
        every = torch.tensor([*itertools.product(range(len(labels)), repeat=int(length))])
        if length == 0:
            continue
        allowed = every[broken(every.flatten(), length.expand(len(every)), rules) == 0]
        sums = scores.gather(1, allowed.T).sum(0) + between[allowed[:, :-1], allowed[:, 1:]].sum(1)
        assert path.tolist() == allowed[sums.argmax()].tolist()


def test_allowed_best_labels_stay_and_others_change_only_their_sentence():
    labels = ["B-PER", "I-PER", "O"]
    rules = rules_of(find_scheme(labels), tuple(labels))
    best = torch.tensor([0, 1, 2, 2, 1, 1, 0])
    logits = torch.eye(3)[best] + torch.tensor([0.5, 0.0, 0.0])
    logits[3, 0] = 0.75
    found = decode(logits.bfloat16(), torch.tensor([3, 3, 1]), rules)
    assert found.tolist() == [0, 1, 2, 0, 1, 1, 0]
    for affinity in (None, torch.zeros(3, 3)):
        assert decode(logits[:0], torch.tensor([0, 0]), rules, affinity).tolist() == []


def test_no_allowed_sequence_leaves_the_one_that_breaks_least():
    """One word, and neither O nor a chunk of one word among the labels."""
    labels = ["B-PER", "E-PER"]
    rules = rules_of(find_scheme(labels), tuple(labels))
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.5]])
    assert decode(logits, torch.tensor([1, 2]), rules).tolist() == [1, 0, 1]


IOB1 = ["I-PER", "I-PER", "B-PER", "O", "I-LOC", "I-LOC", "O", "O"]


@pytest.mark.parametrize(
    ("tags", "keeps"),
    [
        (IOB2, True),
        ([*IOB2, "I-LOC"], True),  # an odd label
        (SCHEMES["bilou"][0].split(), True),
        (["I-PER", "O", "I-LOC", "I-LOC"], False),  # IO, of which nothing is forbidden
        (IOB1, False),
        (["NOUN", "VERB"], False),
    ],
)
def test_labels_that_keep_to_a_scheme_are_decoded_by_it(tmp_path, tags, keeps):
    examples = token_task().read(file_source(write_tags(tmp_path / "data.txt", tags)))
    for decoding, learns in ((None, keeps), ("argmax", False), ("viterbi", "NOUN" not in tags)):
        task = token_task(decoding=decoding)
        labels = task.find_labels(examples)
        with warnings.catch_warnings(record=True) as caught:
            task.learn(examples, labels)
        unread = decoding == "viterbi" and not learns
        assert ["decoding: no effect" in str(each.message) for each in caught] == [True] * unread
        assert task.learnt == ({"transitions": count_transitions([tags])} if learns else {})
        again = token_task(decoding=decoding)
        again.remember({"labels": labels, **task.learnt})
        assert (again.affinity is None) == (task.affinity is None) == (not learns)
    many = token_task()
    many.learn(examples, [*labels, *(f"B-{number}" for number in range(MOST_LABELS))])
    assert many.learnt == {}


def test_affinities_say_how_much_likelier_a_label_is_after_another():
    transitions = count_transitions([["O", "B", "I", "O", "O"], ["B"], []])
    assert transitions == {"B": {"I": 1}, "I": {"O": 1}, "O": {"B": 1, "O": 1}}
    found = affinities(["B", "I", "O", "never"], transitions)
    # B is followed by I once of once, though a quarter of what follows is I.
    assert found[0, 1] == pytest.approx(math.log((1 / (1 / 4) + 1) / (1 + 1)))
    assert found[0, 2] == pytest.approx(math.log(1 / 2))
    assert found[2, 2] == pytest.approx(math.log((1 / (2 / 4) + 1) / (2 + 1)))
    assert not found[3].any() and not affinities(["B", "O"], count_transitions([["B"]])).any()
    for wrong in ([], {"B": 1}, {"B": {"X": 1}}, {"B": {"I": "1"}}, {"B": {"I": -1}},
                  {"B": {"I": float("nan")}}):  # fmt: skip
        with pytest.raises(ValueError, match="transitions: expected counts"):
            affinities(["B", "I", "O"], wrong)


def test_predictions_keep_to_the_scheme_where_that_is_asked_for():
    """The words of two padded rows; the second sub-word and the ends carry no label."""
    labels = ["B-PER", "I-PER", "O"]
    batch = {"labels": torch.tensor([[-100, 0, -100, 0, -100], [-100, 0, -100, -100, -100]])}
    logits = torch.tensor([0.0, 0.9, 1.0]).repeat(2, 5, 1)
    logits[0, 3] = torch.tensor([0.0, 5.0, 0.0])  # I-PER after O
    outputs = SimpleNamespace(logits=logits)
    task = token_task(decoding="viterbi")

    def numbers(task, labels=labels):
        return [[number for number, _ in row] for row in task.predictions(outputs, batch, labels)]

    assert numbers(task) == [[0, 1], [2]]
    sure = [score for _, score in task.predictions(outputs, batch, labels)[0]]
    assert sure == [logits[0, 1].softmax(0)[0], logits[0, 3].softmax(0)[1]]
    counted = token_task()
    counted.remember({"labels": labels, "transitions": {"B-PER": {"I-PER": 1}}})
    assert numbers(counted) == [[0, 1], [2]]
    argmax = token_task(decoding="argmax")
    argmax.affinity = counted.affinity
    for plain in (token_task(), argmax, token_task(decoding="viterbi", tag_scheme="words")):
        assert numbers(plain) == [[2, 1], [2]]
    assert numbers(task, ["ADJ", "NOUN", "VERB"]) == [[2, 1], [2]]
