"""Named entities: official files, labels as they are, sub-words and truncation, chunk scores."""

import json
import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ptv2_fast.tasks import DataOptions, make_task
from ptv2_fast.tasks.sources import file_source, find_sources
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.prepare import read_data
from tests.conll_files import WRITERS
from tests.tiny_run import tagged_sentences

KINDS = {
    "conll2003": {},
    "conll2004": {"B-PER": "B-Peop", "B-LOC": "B-Loc"},
    "ontonotes": {"B-PER": "B-PERSON", "B-LOC": "B-GPE"},
}


def token_task(task="token-classification", **options):
    return make_task(DataOptions(task=task, **options))


def write_tagged(file, sentence: list[tuple[str, str]]) -> str:
    file.write_text("".join(f"{word} {tag}\n" for word, tag in sentence), encoding="utf-8")
    return str(file)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """RoBERTa's form without merges: a word of n letters is n + 1 tokens."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", pad_token="<pad>",
        unk_token="<unk>", mask_token="<mask>", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_official_files_give_every_sentence(tmp_path, name):
    WRITERS[name](tmp_path, 5)
    options = DataOptions(task=name, data_dir=str(tmp_path))
    sources = find_sources(options)
    assert list(sources) == ["train", "validation", "test"]
    for source in sources.values():
        columns = make_task(options).read(source).table.to_dict()
        sentences = tagged_sentences(5)
        assert columns["words"] == [[word for word, _ in row] for row in sentences]
        assert columns["tags"] == [
            [KINDS[name].get(tag, tag) for _, tag in row] for row in sentences
        ]


@pytest.mark.parametrize("folder", ["CoNLL04", "conll2004"])
def test_the_files_may_lie_in_a_folder_of_their_name(tmp_path, folder):
    WRITERS["conll2004"](tmp_path / folder, 2)
    sources = find_sources(DataOptions(task="conll2004", data_dir=str(tmp_path)))
    assert sources["validation"].path == tmp_path / folder / "dev.txt"


def test_column_options_go_before_those_of_the_published_data_set(tmp_path):
    file = tmp_path / "plain.txt"
    file.write_text("Anna\nsleeps\n")
    examples = token_task("conll2004", conll_word_column=0).read(file_source(file), labelled=False)
    assert examples.table["words"][:] == [["Anna", "sleeps"]]


def test_columns_are_cut_at_tabs_where_there_are_any(tmp_path):
    file = tmp_path / "data.txt"
    file.write_text("New York\tB-LOC\n\xa0\tO\n#doc O\n\n#doc 7\n-DOCSTART-\nOslo B-LOC\n")
    columns = token_task().read(file_source(file)).table.to_dict()
    assert columns["words"] == [["New York", "", "#doc"], ["Oslo"]]
    assert columns["tags"] == [["B-LOC", "O", "O"], ["B-LOC"]]


def test_a_no_break_space_cuts_no_column(tmp_path):
    file = tmp_path / "data.txt"
    file.write_text("10\xa0000 B-QTY\n\xa0 O\n")
    columns = token_task().read(file_source(file)).table.to_dict()
    assert columns == {"words": [["10\xa0000", ""]], "tags": [["B-QTY", "O"]]}
    table = tmp_path / "data.csv"
    table.write_text("tokens,ner_tags\n10\xa0000 km,B-QTY O\n")
    assert token_task().read(file_source(table)).table[0]["words"] == ["10\xa0000", "km"]


@pytest.mark.parametrize("line", ["sleeps", "sleeps\t"])
def test_a_line_without_a_label_is_an_error_when_labels_are_wanted(tmp_path, line):
    file = tmp_path / "data.txt"
    file.write_text(f"Anna B-PER\n{line}\n")
    with pytest.raises(
        ValueError, match=r"data.txt line 2: expected conll_word_column 0 and conll_tag_"
    ):
        token_task().read(file_source(file))
    words = token_task().read(file_source(file), labelled=False).table["words"][0]
    assert words == ["Anna", "sleeps"]


@pytest.mark.parametrize("lines", ["in IN B-NP O\nEU NNP B-ORG\n", "in O\nEU NNP B-NP B-ORG\n"])
def test_all_lines_of_a_sentence_have_as_many_columns(tmp_path, lines):
    """Or the last column of a line is another one, or of a comment."""
    file = tmp_path / "data.txt"
    file.write_text(f"Oslo B-LOC\n\n{lines}")
    with pytest.raises(ValueError, match=r"data.txt line 4: expected .* columns as the sentence"):
        token_task().read(file_source(file))


def test_other_columns_may_be_empty(tmp_path):
    file = tmp_path / "data.txt"
    file.write_text("Oslo\tB-LOC\tQ585\nsleeps\tO\t\n")
    with pytest.raises(ValueError, match=r"line 2: expected .*conll_tag_column -1"):
        token_task().read(file_source(file))
    file.write_text("Oslo\tB-LOC\tQ585\nsleeps\tO\t\n\nhere O \n")
    examples = token_task(conll_tag_column=1).read(file_source(file))
    assert examples.table["tags"][:] == [["B-LOC", "O"], ["O"]]


def test_labels_that_are_numbers_become_text(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"tokens": ["Anna", "sleeps"], "ner_tags": [1, 0]}) + "\n")
    task = token_task()
    examples = task.read(file_source(file))
    assert task.find_labels(examples) == ["0", "1"]
    assert task.metrics([{"tags": ["1", "0"]}], examples, ["0", "1"])["f1"] == 1


def test_chunks_that_begin_with_inside_are_kept_counted_and_scored(tmp_path):
    """IOB1: B- only between two chunks of one type."""
    sentence = [("Anna", "I-PER"), ("Berg", "I-PER"), ("Bob", "B-PER"), ("in", "O"),
                ("Oslo", "I-LOC"), ("Anna", "I-PER")]  # fmt: skip
    task = token_task()
    examples = task.read(file_source(write_tagged(tmp_path / "eng.train", sentence)))
    assert examples.table["tags"][0] == [tag for _, tag in sentence]
    assert list(examples.remarks.values()) == [3]
    assert "begin with I-, as in IOB1" in next(iter(examples.remarks))
    as_iob2 = ["B-PER", "I-PER", "B-PER", "O", "B-LOC", "B-PER"]
    scores = task.metrics([{"tags": as_iob2}], examples, task.find_labels(examples))
    assert scores["precision"] == scores["recall"] == scores["f1"] == 1
    assert scores["accuracy"] == pytest.approx(3 / 6)


def test_labels_of_another_kind_have_no_chunks_to_remark_on(tmp_path):
    file = write_tagged(tmp_path / "data.txt", [("Anna", "PROPN"), ("sleeps", "I-VERB")])
    assert token_task().read(file_source(file)).remarks == {}


def test_chunk_scores_are_those_that_seqeval_publishes(tmp_path):
    """The example of seqeval's README: F1 0.50, accuracy 0.80."""
    task = token_task()
    true = "O O O B-MISC I-MISC I-MISC O\n\nB-PER I-PER O\n"
    file = tmp_path / "data.txt"
    file.write_text("".join(f"a {tag}\n" if tag else "\n" for tag in re.split("[ \n]", true)))
    predicted = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    results = [{"tags": tags} for tags in predicted]
    scores = task.metrics(results, task.read(file_source(file)), ["B-PER", "O"])
    assert scores == {"accuracy": 0.8, "precision": 0.5, "recall": 0.5, "f1": 0.5}


def test_last_and_only_words_of_chunks_end_them(tmp_path):
    """BILOU: two people one behind the other, of which the second is missed."""
    sentence = [("Anna", "B-PER"), ("Berg", "L-PER"), ("Bob", "U-PER"), ("Kay", "U-PER")]
    task = token_task()
    examples = task.read(file_source(write_tagged(tmp_path / "data.txt", sentence)))
    predicted = ["B-PER", "L-PER", "O", "U-PER"]
    scores = task.metrics([{"tags": predicted}], examples, ["B-PER", "L-PER", "O", "U-PER"])
    assert (scores["precision"], scores["recall"]) == (1, pytest.approx(2 / 3))
    result = {"tags": examples.table[0]["tags"], "scores": [None] * 4}
    entities = task.describe(examples.table[0], result)["entities"]
    assert [entity["text"] for entity in entities] == ["Anna Berg", "Bob", "Kay"]


def test_the_head_has_all_published_labels_and_no_other_is_accepted(tmp_path):
    WRITERS["conll2003"](tmp_path, 2)
    task = token_task("conll2003")
    examples = task.read(file_source(tmp_path / "train.txt"))
    labels = task.find_labels(examples)
    assert labels == ["B-LOC", "B-MISC", "B-ORG", "B-PER", "I-LOC", "I-MISC", "I-ORG", "I-PER", "O"]
    assert token_task().find_labels(examples) == ["B-LOC", "B-PER", "O"]
    test = (tmp_path / "test.txt").read_text().replace("B-LOC", "B-MISC", 1)
    (tmp_path / "test.txt").write_text(test)
    task.check_labels(task.read(file_source(tmp_path / "test.txt")), labels)
    (tmp_path / "test.txt").write_text(test.replace("B-MISC", "B-CITY"))
    with pytest.raises(ValueError, match=r"test\.txt sentence 1: unknown label 'B-CITY'"):
        task.check_labels(task.read(file_source(tmp_path / "test.txt")), labels)


def test_drawn_training_examples_keep_the_labels_of_the_others(tmp_path):
    file = tmp_path / "train.txt"
    file.write_text("Oslo B-LOC\n\nAnna B-PER\n\nsleeps O\n")
    config = RunConfig.from_dict(
        {
            "task": "token-classification", "model": "unread", "train_file": str(file),
            "validation_file": str(file), "max_train_examples": 1,
        }
    )  # fmt: skip
    _, examples, labels = read_data(config)
    assert len(examples["train"]) == 1
    assert labels == ["B-LOC", "B-PER", "O"]


def test_truncation_inside_a_long_word_shifts_no_label(tmp_path):
    """Three words of 4, 31 and 3 tokens; 20 are left, so the second is cut and the third gone."""
    tokenizer, task = byte_level_tokenizer(), token_task()
    sentence = [("Bob", "B-PER"), ("a" * 30, "O"), ("Os", "B-LOC")]
    examples = task.read(file_source(write_tagged(tmp_path / "data.txt", sentence)))
    labels = ["B-LOC", "B-PER", "O"]
    whole = task.featurize(examples, tokenizer, labels, max_length=64).table[0]
    assert [label for label in whole["labels"] if label != -100] == [1, 2, 0]
    assert [index for index, label in enumerate(whole["labels"]) if label != -100] == [1, 5, 36]
    features = task.featurize(examples, tokenizer, labels, max_length=20)
    row = features.table[0]
    assert features.truncated == 1
    assert len(row["labels"]) == len(row["input_ids"]) == 20
    assert row["labels"] == [-100, 1, -100, -100, -100, 2, *[-100] * 14]
    (result,) = task.results([[(1, 0.5), (2, 0.5)]], features, labels)
    assert result == {"tags": ["B-PER", "O", "O"], "scores": [0.5, 0.5, None]}
    assert task.metrics([result], examples, labels)["recall"] == 0.5
