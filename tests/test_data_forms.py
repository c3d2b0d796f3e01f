"""Files in forms that people have: read as what they are, or refused with file and row."""

import gzip
import io
import itertools
import json
import subprocess
import sys

import numpy as np
import pandas
import pytest

from ptv2_fast.tasks import DataOptions, make_task
from ptv2_fast.tasks.sources import Source, Stream, file_source

WORDS = [["Anna", "can't", 'say"so'], ["Oslo", "[", "1]"]]
TAGS = [["B-PER", "O", "O"], ["B-LOC", "O", "O"]]


def token_task(**options):
    return make_task(DataOptions(task="token-classification", **options))


def read(file, **options) -> dict[str, list]:
    return token_task(**options).read(file_source(file)).table.to_dict()


LISTS = {
    "python": repr,
    "json": json.dumps,
    "numpy": lambda row: str(np.array(row)),
    "numpy array": lambda row: repr(np.array(row, dtype=object)),
    "numpy 2": lambda row: repr([np.str_(cell) for cell in row]),
    "tuple": lambda row: repr(tuple(row)),
}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("form", LISTS)
def test_lists_written_as_text_are_lists(tmp_path, form, suffix):
    file = tmp_path / f"data{suffix}"
    frame = pandas.DataFrame({"tokens": [*map(LISTS[form], WORDS)],
                              "ner_tags": [*map(LISTS[form], TAGS)]})  # fmt: skip
    if suffix == ".jsonl":
        frame.to_json(file, orient="records", lines=True)
    else:
        frame.to_csv(file, index=False, sep="\t" if suffix == ".tsv" else ",")
    assert read(file) == {"words": WORDS, "tags": TAGS}


def test_numbers_in_lists_are_labels(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("tokens,ner_tags\n\"['Anna', 'x']\",[1 0]\n\"['Oslo', 'x']\",[2 0]\n")
    assert read(file)["tags"] == [["1", "0"], ["2", "0"]]


@pytest.mark.parametrize(
    "cell", ["[B-PER, O]", "['B-PER' ... 'O']", "['B-PER', open('x')]", "[['B-PER'], 'O']", "[" * 9]
)
def test_what_looks_like_a_list_and_is_none_is_refused(tmp_path, cell):
    file = tmp_path / "data.csv"
    pandas.DataFrame({"tokens": ["Anna sleeps"], "ner_tags": [cell]}).to_csv(file, index=False)
    with pytest.raises(ValueError, match=r"data.csv row 1: expected (a list|one label)"):
        read(file)


def test_a_list_among_texts_is_refused_and_brackets_are_words(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("tokens,ner_tags\n[ see Anna ],O O B-PER O\nOslo x,B-LOC O\n")
    assert read(file)["words"][0] == ["[", "see", "Anna", "]"]
    file.write_text("tokens,ner_tags\nOslo x,B-LOC O\n\"['a', 'b']\",O O\n")
    with pytest.raises(ValueError, match=r"data.csv row 2: expected words with blanks between"):
        read(file)


@pytest.mark.parametrize("sign", [", ", "; ", "| "])
def test_labels_with_signs_between_are_refused(tmp_path, sign):
    file = tmp_path / "data.jsonl"
    row = {"tokens": "Anna , sleeps", "ner_tags": sign.join(["B-PER", "O", "O"])}
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"data.jsonl row 1: expected labels with blanks between"):
        read(file)


def test_choices_written_as_text_are_lists(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text('text,choices,label\nq,"[\'a b\', \'c\']",1\nq,"[""d"", ""e""]",0\n')
    task = make_task(DataOptions(task="multiple-choice"))
    assert task.read(file_source(file)).table["choices"][:] == [["a b", "c"], ["d", "e"]]


ONE_WORD = [("Sentence: 1", "Anna", "B-PER"), ("", "sleeps", "O"), ("Sentence: 2", "Oslo", "B-LOC")]


@pytest.mark.parametrize(
    "name", ["Sentence #", "sentence_id", "sent_id", "sentence", "sentence_idx"]
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_one_word_a_row_is_gathered_by_the_sentence_column(tmp_path, name, suffix):
    """With the number at each word, and as Kaggle's files have it, at the first alone."""
    file = tmp_path / f"data{suffix}"
    for full in (True, False):
        frame = pandas.DataFrame(ONE_WORD, columns=[name, "Word", "Tag"])
        frame["POS"] = "X"
        if full:
            frame[name] = [1, 1, 2]
        if suffix == ".parquet":
            frame.to_parquet(file)
        elif suffix == ".jsonl":
            frame.to_json(file, orient="records", lines=True)
        else:
            frame.to_csv(file, index=False, sep="\t" if suffix == ".tsv" else ",")
        task = token_task(words_column="Word", tags_column="Tag")
        examples = task.read(file_source(file))
        assert examples.table.to_dict() == {
            "words": [["Anna", "sleeps"], ["Oslo"]], "tags": [["B-PER", "O"], ["B-LOC"]],
        }  # fmt: skip
        assert examples.remarks == {f"one word a row, gathered by the column {name!r}": 3}
        assert examples.where(1).endswith("sentence 2")
        words = task.read(file_source(file), labelled=False)
        assert words.table["words"][:] == [["Anna", "sleeps"], ["Oslo"]]


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl"])
def test_one_word_a_row_without_sentences_is_refused_with_the_remedy(tmp_path, name):
    file = tmp_path / name
    frame = pandas.DataFrame(ONE_WORD, columns=["group", "tokens", "ner_tags"])
    if name.endswith("csv"):
        frame.to_csv(file, index=False)
    else:
        frame.to_json(file, orient="records", lines=True)
    with pytest.raises(
        ValueError, match=rf"{name}: expected lists .* in each of 3 rows; .*'group'"
    ):
        read(file)
    assert read(file, sentence_column="group")["words"] == [["Anna", "sleeps"], ["Oslo"]]


def test_words_of_torn_sentences_are_refused(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("sentence,tokens,ner_tags\n1,a,O\n2,b,O\n1,c,O\n")
    with pytest.raises(ValueError, match=r"data.csv row 3: .* got sentence '1' again"):
        read(file)
    file.write_text("sentence,tokens,ner_tags\n,a,O\n2,b,O\n")
    with pytest.raises(ValueError, match=r"data.csv row 1: expected a sentence's number"):
        read(file)
    file.write_text("sentence,tokens,ner_tags\n1,a,O\n1,,O\n")
    with pytest.raises(ValueError, match=r"data.csv row 2: expected one of words, got ''"):
        read(file)


@pytest.mark.parametrize("form", ["lines", "list", "indented", "compressed"])
def test_dates_in_json_stay_text(tmp_path, form):
    rows = [{"text": f"2020-01-0{day}", "label": f"2021-0{day}-01T00:00:00Z"} for day in (1, 2)]
    file = tmp_path / ("data.jsonl.gz" if form == "compressed" else "data.json")
    texts = {
        "list": json.dumps(rows),
        "indented": "\n".join(json.dumps(row, indent=2) for row in rows),
    }
    content = texts.get(form, "\ufeff" + "\n\n".join(map(json.dumps, rows))).encode()
    file.write_bytes(gzip.compress(content) if form == "compressed" else content)
    table = make_task(DataOptions(task="text-classification")).read(file_source(file)).table
    assert table.to_list() == rows
    file = tmp_path / "words.jsonl"
    file.write_text(json.dumps({"tokens": ["2020-01-01"] * 2, "ner_tags": ["O", "O"]}))
    assert read(file)["words"] == [["2020-01-01"] * 2]


BAD_JSON = {
    "label": (['{"text": "a", "label": "x"}', '{"text": "b", "label": 1}'], "row 2: .*label"),
    "text": (['{"text": "a", "label": "x"}'] * 3 + ['{"text": ["b"]}'], "row 4: expected text"),
    "inner": (['{"text": "a", "m": [1]}', '{"text": "a", "m": ["b"]}'], "row 2: expected m"),
    "deep": (['{"text": "a"}', "[" * 100_000], "line 2: nested too deeply"),
    "deep value": (['{"text": "a", "m": ' + "[" * 500 + "]" * 500 + "}"], "row 1"),
    "number": (['{"text": "a", "label": 1}', '{"text": "a", "label": ' + "9" * 30 + "}"], "row 2"),
    "surrogate": (['{"text": "\\ud83d", "label": "x"}'], "row 1: expected text"),
    "no object": (['{"text": "a"}', '"text"'], 'line 2: expected an object, got "text"'),
    "broken": (['{"text": "a"}', '{"text": "a"'], "line 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_is_one_short_error_with_file_and_row(tmp_path, case):
    lines, message = BAD_JSON[case]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=rf"data\.jsonl: .*{message}") as raised:
        make_task(DataOptions(task="text-classification")).read(file_source(file))
    assert len(str(raised.value)) < 400 and "\n" not in str(raised.value)


def test_deep_nesting_does_not_kill_the_process(tmp_path):
    """One process for all: it costs seconds to begin."""
    names, commands = ("data.jsonl", "data.json"), []
    for task, name in itertools.product(("text-classification", "question-answering"), names):
        file = tmp_path / name
        file.write_text("[" * 100_000)
        commands.append(["train", "--task", task, "--method", "p-tuning-v2", "--model", "unread",
                         "--train-file", str(file),
                         "--output", str(tmp_path / "run")])  # fmt: skip
    code = f"from ptv2_fast import cli; print(*map(cli.main, {commands}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2 2 2 2\n")
    loading, *lines = done.stderr.splitlines()
    assert loading.startswith("loading ")
    for name, line in zip(names * 2, lines, strict=True):
        assert f"{name}: cannot be read" in line and "nested too deeply" in line


PLAIN = "Anna\tB-PER\nsleeps\tO\n\nOslo\tB-LOC\n.\tO\n"
SENTENCES = {"words": [["Anna", "sleeps"], ["Oslo", "."]], "tags": [["B-PER", "O"], ["B-LOC", "O"]]}
CONLL_U = (
    "# newdoc id = a\n# sent_id = 5\n# text = Anna dorme\n"
    "1\tAnna\t_\tPROPN\t_\t_\t0\troot\t_\t_\n2-3\tdel\t_\t_\t_\t_\t_\t_\t_\t_\n"
    "2\tde\t_\tADP\t_\t_\t0\troot\t_\t_\n3.1\tx\t_\t_\t_\t_\t_\t_\t_\t_\n\n"
    "# sent_id = 6\n1\t#\t_\tSYM\t_\t_\t0\troot\t_\t_\n"
)
GERMEVAL = "#\thttp://de.wikipedia.org/x\t[2009-10-17]\n1\tAnna\tB-PER\tO\n2\tx\tO\tB-PER\n"
SKIPPED = {
    "sent_id": ("# sent_id = 5\n" + PLAIN, 1),
    "licence": ("# Copyright 2020 by us\n# all rights kept\n\n" + PLAIN, 2),
    "as many columns": ("# 5\n" + PLAIN.replace("\n\n", "\n\n# 6\n"), 2),
    "text": (PLAIN.replace("\n\n", "\n\n#text = Oslo .\n"), 1),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_comments_before_sentences_are_left_out(tmp_path, case):
    text, count = SKIPPED[case]
    file = tmp_path / "data.txt"
    file.write_text(text)
    examples = token_task().read(file_source(file))
    assert examples.table.to_dict() == SENTENCES
    assert examples.remarks == {"comments left out": count}
    file.write_text(text.replace("\tB-PER", "").replace("\tB-LOC", "").replace("\tO", ""))
    if case != "as many columns":
        words = token_task().read(file_source(file), labelled=False).table["words"][:]
        assert words == SENTENCES["words"]
    file.write_text(text)
    with pytest.raises(ValueError, match=r"line \d: expected|expected labels B-X and O"):
        task = token_task(conll_comments=False)
        task.find_labels(task.read(file_source(file)))


def test_the_files_of_conll_u_and_germeval(tmp_path):
    file = tmp_path / "data.conllu"
    file.write_text(CONLL_U)
    assert read(file, conll_word_column=1, conll_tag_column=3) == {
        "words": [["Anna", "de"], ["#"]], "tags": [["PROPN", "ADP"], ["SYM"]],
    }  # fmt: skip
    file.write_text(GERMEVAL + "\n" + GERMEVAL)
    both = read(file, conll_word_column=1, conll_tag_column=2)
    assert both == {"words": [["Anna", "x"]] * 2, "tags": [["B-PER", "O"]] * 2}


def test_words_that_begin_with_a_hash_stay(tmp_path):
    file = tmp_path / "data.txt"
    file.write_text("# O\n1 O\n\n#Oslo B-LOC\nis O\n# O\n\n# B-PER\n")
    assert read(file)["words"] == [["#", "1"], ["#Oslo", "is", "#"]]
    file.write_text("#Oslo B-LOC\nis O\n\n# O\n")
    assert read(file)["words"] == [["#Oslo", "is"], ["#"]]


@pytest.mark.parametrize("header", ["token\tlabel", "Word\tTag", "tokens\tner_tags", "text\tNER"])
def test_a_header_is_left_out_and_reported(tmp_path, header):
    file = tmp_path / "data.txt"
    for text in (f"{header}\n{PLAIN}", f"{header}\n\n{PLAIN}"):
        file.write_text(text)
        examples = token_task().read(file_source(file))
        assert examples.table.to_dict() == SENTENCES
        assert examples.remarks == {"header left out": header.split("\t")}
    assert token_task().read(file_source(file), labelled=False).table["words"][0] == [
        "Anna",
        "sleeps",
    ]
    file.write_text("word\tNOUN\ntoken\tNOUN\n")
    assert read(file)["words"] == [["word", "token"]]


@pytest.mark.parametrize("line", ["=== page 3", "-----", "--- 3", "*** page\t***", "page 3 of 5"])
@pytest.mark.parametrize("blank", ["", "\n"])
def test_lines_between_pages_are_refused(tmp_path, line, blank):
    file = tmp_path / "data.txt"
    file.write_text(PLAIN + f"\n{line}\n{blank}" + PLAIN.replace("\t", " "))
    with pytest.raises(ValueError, match=r"data.txt line 7: expected"):
        read(file)


@pytest.mark.parametrize("end", ["\r\n", "\r", "\r\r\n"])
@pytest.mark.parametrize(
    "name", ["data.txt", "data.tsv", "data.txt.gz", "data.conll.gz", "data.tsv.gz"]
)
def test_columns_are_read_whatever_the_suffix_and_the_ends_of_lines(tmp_path, name, end):
    file = tmp_path / name
    for header in ("", "tokens\tner_tags\n", "# sent_id = 1\n"):
        content = ("\ufeff" + header + PLAIN).replace("\n", end).encode()
        file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        assert read(file) == SENTENCES


def test_a_carriage_return_ends_a_line(tmp_path):
    file = tmp_path / "data.txt"
    file.write_bytes(b"Anna B-PER\rsleeps O\n\nOslo B-LOC\r\n. O\r")
    assert read(file) == SENTENCES


@pytest.mark.parametrize("name", ["data.txt.gz", "data.jsonl.gz", "data.csv.gz", "data.json.gz"])
def test_a_damaged_archive_is_one_clear_error(tmp_path, name):
    file = tmp_path / name
    packed = gzip.compress(PLAIN.encode())
    task = "question-answering" if name == "data.json.gz" else "token-classification"
    for content in (packed[:-9], packed[:10] + b"\xff\xff" + packed[12:], packed[10:]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            make_task(DataOptions(task=task)).read(file_source(file))


def test_tables_with_empty_lines_stay_tables(tmp_path):
    file = tmp_path / "data.tsv"
    file.write_text("tokens\tner_tags\nAnna sleeps\tB-PER O\n\nOslo .\tB-LOC O\n")
    assert read(file) == SENTENCES


class Counted(io.TextIOBase):
    """Lines that are counted as they are read."""

    def __init__(self, lines):
        self.lines, self.count = iter(lines), 0

    def readline(self, size=-1):
        self.count += 1
        return next(self.lines, "")


def parts_of(task, source):
    return [(part.table.to_dict(), part.where(0)) for part in task.read_parts(source)]


def test_long_tables_come_in_parts_and_no_more_is_held(tmp_path, monkeypatch):
    task = token_task()
    monkeypatch.setattr(task, "part_rows", 2)
    # A part of one word a row is as long as others.
    rows = [["Anna", "lives"], ["in"], ["Oslo"], ["."], ["Bob", "sleeps"]]
    lines = [json.dumps({"tokens": words}) + "\n" for words in rows]
    file = Counted(lines * 100)
    parts = task.read_parts(Source("stdin", stream=Stream(file, "json")))
    for number in range(250):
        part = next(parts)
        first = 2 * number
        assert part.table["words"][:] == [rows[first % 5], rows[(first + 1) % 5]]
        assert part.where(1) == f"stdin row {first + 2}"
        assert file.count <= first + 4
    assert next(parts, None) is None
    table = tmp_path / "data.csv"
    table.write_text("tokens\n" + "".join(f"{' '.join(words)}\n" for words in rows))
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(gzip.compress(("\ufeff" + "".join(lines)).encode()))
    for source in (file_source(table), file_source(packed)):
        found = parts_of(task, source)
        assert [words for part, _ in found for words in part["words"]] == rows
        assert [where for _, where in found] == [f"{source.name} row {n}" for n in (1, 3, 5)]


def test_what_cannot_be_cut_into_parts_comes_whole(tmp_path, monkeypatch):
    sentences, one_word = tmp_path / "lists.json", tmp_path / "words.csv"
    columns, questions = tmp_path / "columns.tsv", tmp_path / "squad.json"
    sentences.write_text(json.dumps([{"tokens": words} for words in WORDS * 2], indent=1))
    one_word.write_text("tokens,sentence\nAnna,1\nsleeps,1\nBob,2\nworks,2\nnow,2\n")
    columns.write_text("Anna\tO\nsleeps\tO\n\nBob\tO\nworks\tO\n\n")
    question = {"id": "1", "question": "Who?", "answers": []}
    paragraph = {"context": "Anna.", "qas": [question, question | {"id": "2"}]}
    questions.write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}) + "\n\n")
    tokens, answers = token_task(), make_task(DataOptions(task="question-answering"))
    for task, file in ((tokens, sentences), (tokens, one_word), (tokens, columns),
                       (answers, questions)):  # fmt: skip
        monkeypatch.setattr(task, "part_rows", 1)
        whole = task.read(file_source(file), labelled=False)
        assert len(whole) > 1 and parts_of(task, file_source(file)) == [
            (whole.table.to_dict(), whole.where(0))
        ]
    # As does a stream, of which nothing can be read twice.
    stream = Source("stdin", stream=Stream(io.BytesIO(one_word.read_bytes()), "csv"))
    ((found, _),) = parts_of(tokens, stream)
    assert found["words"] == [["Anna", "sleeps"], ["Bob", "works", "now"]]


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("data.jsonl", '{"text": "x"', "line 4: broken JSON"),
        ("data.jsonl", '["x"]', "line 4: expected an object"),
        ("data.jsonl", '{"text": 3}', "row 4: expected text in text, got 3"),
        ("data.csv", "a,b", "line 5"),
        ("data.csv", '" "', "row 4: expected text in text"),
    ],
)
def test_a_bad_row_is_named_by_its_number_when_it_comes(tmp_path, monkeypatch, name, row, words):
    """What was read before it is there already."""
    task = make_task(DataOptions(task="text-classification"))
    monkeypatch.setattr(task, "part_rows", 1)
    is_csv = name.endswith("csv")
    good = "good" if is_csv else '{"text": "good"}'
    file = tmp_path / name
    file.write_text("\n".join([*(["text"] if is_csv else []), good, good, good, row, good]) + "\n")
    parts = task.read_parts(file_source(file))
    assert [len(next(parts)) for _ in range(3)] == [1, 1, 1]
    with pytest.raises(ValueError, match=words):
        next(parts)
