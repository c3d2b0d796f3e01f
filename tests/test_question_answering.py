"""Extractive question answering: reading, windows, spans, scores, and training end to end."""

import gzip
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

from ptv2_fast import cli
from ptv2_fast.tasks import DataOptions, make_task
from ptv2_fast.tasks.answer_spans import Window, allow_no_answer, best_spans, find_answers
from ptv2_fast.tasks.sources import file_source
from ptv2_fast.training.pretrained import load_tokenizer
from tests.models import one_thread  # noqa: F401
from tests.squad_files import WRITERS, question, write_squad
from tests.tiny_run import save_tiny_model

ROW = {
    "id": "x",
    "question": "bob lives in",
    "context": "Anna was good. Bob lives in Oslo. It was Oslo.",
    "answers": ["Oslo"],
    "answer_start": [28],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"), positions=48)


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


def qa_task(name: str = "question-answering", **options):
    return make_task(DataOptions(task=name, **options))


def write_rows(folder, *rows) -> str:
    file = folder / "data.json"
    file.write_text(json.dumps([ROW | row for row in rows]))
    return str(file)


def read(folder, *rows, **options):
    return qa_task(**options).read(file_source(write_rows(folder, *rows)))


def oracle(features) -> list[np.ndarray]:
    """Logits that are one where the targets are, and lower where the window has none."""
    rows = []
    for row in features.table:
        logits = np.zeros((2, len(row["input_ids"])), np.float32)
        height = 1.0 if row["start_positions"] else 0.25
        logits[0, row["start_positions"]] = logits[1, row["end_positions"]] = height
        rows.append(logits)
    return rows


# Reading


def test_all_forms_of_the_same_questions_read_alike(tmp_path):
    paragraphs = [question(number, number != 1) for number in range(3)]
    official = write_squad(tmp_path / "official.json", paragraphs, "v2.0")
    hub = [
        {
            "id": row["id"],
            "title": "t",
            "context": paragraph["context"],
            "question": row["question"],
            "answers": {
                name: [answer[name] for answer in row["answers"]]
                for name in ("text", "answer_start")
            },
        }
        for paragraph in paragraphs
        for row in paragraph["qas"]
    ]
    flat = [row | {"answers": row["answers"]["text"],
                   "answer_start": row["answers"]["answer_start"]} for row in hub]  # fmt: skip
    datasets.Dataset.from_list(hub).to_parquet(tmp_path / "hub.parquet")
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hub))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in hub))
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(json.dumps(flat).encode()))
    expected = qa_task().read(file_source(official)).table.to_dict()
    assert expected["answers"] == [["Berlin"], [], ["Oslo"]]
    for name in ("hub.parquet", "lines.jsonl", "lines.json", "list.json.gz"):
        assert qa_task().read(file_source(tmp_path / name)).table.to_dict() == expected, name


def test_wrong_offsets_move_to_the_nearest_occurrence_and_are_listed(tmp_path):
    examples = read(
        tmp_path,
        {"id": "right"},
        {"id": "near", "answer_start": [38]},
        {"id": "outside", "answer_start": [900]},
        {"id": "absent", "answers": ["Rome"], "answer_start": [0]},
        {"id": "one of two", "answers": ["Rome", "Oslo"], "answer_start": [0, 28]},
    )
    assert examples.table["answer_starts"][:] == [[28], [41], [41], [-1], [-1, 28]]
    assert list(examples.remarks.values()) == [
        {"questions": 2, "ids": ["near", "outside"]},
        {"questions": 2, "ids": ["absent", "one of two"]},
    ]
    task = qa_task()
    kept = task.trainable(examples)
    assert kept.table["id"][:] == ["right", "near", "outside", "one of two"]
    assert kept.remarks["left out of training"] == {"questions": 1, "ids": ["absent"]}
    results = [{"text": "Rome"}] * 5
    assert task.metrics(results, examples, [])["em"] == 2 / 5  # absent ones are still scored


def test_is_impossible_against_the_answers_is_listed(tmp_path):
    none = {"answers": [], "answer_start": []}
    rows = [{"id": "a", "is_impossible": True}, {"id": "b", "is_impossible": False, **none},
            {"id": "c", "is_impossible": False}, {"id": "d", "is_impossible": True, **none},
            {"id": "e", "is_impossible": None}]  # fmt: skip
    remark = {"is_impossible that contradicts the answers (which count)":
              {"questions": 2, "ids": ["a", "b"]}}  # fmt: skip
    assert read(tmp_path, *rows).remarks == remark
    lines = tmp_path / "data.jsonl"
    lines.write_text("".join(json.dumps(ROW | row) + "\n" for row in rows))
    assert qa_task().read(file_source(lines)).remarks == remark
    assert qa_task().read(file_source(lines), labelled=False).remarks == {}


BAD_ROWS = {
    "no context": ({"context": None}, r"data.json question 'x': expected text in context"),
    "blank question": ({"question": " "}, "question 'x': expected text in question"),
    "no start": ({"answer_start": []}, "question 'x': expected answers with a text and"),
    "no answers": ({"answers": None}, "question 'x': expected answers with a text and"),
    "empty answer": ({"answers": [""]}, "question 'x': expected answers with a text and"),
    "start is text": ({"answer_start": ["28"]}, "question 'x': expected answers with a text"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_malformed_questions_are_named(tmp_path, case):
    row, message = BAD_ROWS[case]
    with pytest.raises(ValueError, match=message):
        read(tmp_path, row)


def test_other_bad_files_are_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="expected unique ids, got 'x' twice"):
        read(tmp_path, {}, {})
    nowhere = {"answers": ["Rome"]}
    with pytest.raises(ValueError, match="answers that occur in their contexts"):
        qa_task().trainable(read(tmp_path, nowhere))
    for name, content, message in (
        ("a.json", '{"data": [{"title": "t"}]}', "as in SQuAD's files"),
        ("b.json", '{"data": []}', "empty data set"),
        ("c.json", '{"data": ', "cannot be read as json: line 1: broken JSON"),
        ("d.json.gz", "no gzip", "cannot be read"),
        ("e.json", "", "empty data set"),
        ("f.json", "[1]", "row 1: expected an object"),
        ("g.jsonl", '{"question": "a"}\n', "context_column: expected a column of"),
        ("h.txt", "a", "expected .csv, .tsv, .json, .jsonl or .parquet"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message) as raised:
            qa_task().read(file_source(tmp_path / name))
        assert name in str(raised.value)


def test_only_squad_1_insists_on_answers(tmp_path):
    file = file_source(write_squad(tmp_path / "a.json", [question(0), question(1, False)]))
    assert qa_task("squad_v2").read(file).table["answers"][1] == []
    for task in (qa_task("squad"), qa_task(unanswerable=False)):
        with pytest.raises(ValueError, match="question 'q1': expected an answer, got none"):
            task.read(file)
    assert qa_task("squad").read(file, labelled=False).table["answers"][:] == [[], []]


# Windows


def test_windows_cover_the_context_and_targets_are_the_answer_where_it_is_whole(
    tmp_path, tokenizer
):
    context = " ".join(["anna", "lives", "in", "oslo"] * 6)  # one token a word
    start = len(" ".join(["anna", "lives", "in", "oslo"] * 3)) + 1
    row = {"context": context, "answers": ["anna lives in"], "answer_start": [start]}
    task = qa_task(doc_stride=4)
    features = task.featurize(read(tmp_path, row), tokenizer, ["start", "end"], max_length=16)
    # [CLS] bob lives in [SEP] + 10 tokens + [SEP]; each window begins 6 tokens after the last.
    table = features.table.to_dict()
    assert table["first_context_token"] == [5, 5, 5, 5]
    words = [[context[s:e] for s, e in zip(starts, ends, strict=True)]
             for starts, ends in zip(table["character_starts"], table["character_ends"],
                                     strict=True)]  # fmt: skip
    everything = context.split()
    assert words == [everything[i : i + 10] for i in (0, 6, 12, 18)]
    # The answer is words 12 to 14: whole in the second and third window only.
    assert table["start_positions"] == [0, 11, 5, 0]
    assert table["end_positions"] == [0, 13, 7, 0]
    assert table["example"] == [0, 0, 0, 0]
    assert features.truncated == 0


@pytest.mark.parametrize("max_length", [14, 48])
def test_oracle_logits_give_the_published_answers(tmp_path, tokenizer, max_length):
    paragraphs = [question(number, number % 4 != 3) for number in range(12)]
    # Upper case, accents that the tokenizer drops, two code units in UTF-16, blanks in the answer.
    strange = "\U0001f600 \u00c9t\u00e9  (ANNA) lives in Berlin\u2013Oslo !"
    for number, text in enumerate(["Berlin\u2013Oslo", " in ", "(ANNA)"]):
        answers = [{"text": text, "answer_start": strange.index(text)}]
        qas = [{"id": f"strange {number}", "question": "anna", "answers": answers}]
        paragraphs.append({"context": strange, "qas": qas})
    task = qa_task(doc_stride=3)
    examples = task.read(file_source(write_squad(tmp_path / "a.json", paragraphs, "v2.0")))
    features = task.featurize(examples, tokenizer, ["start", "end"], max_length)
    assert len(features) > len(examples) or max_length == 48
    results = task.results(oracle(features), features, ["start", "end"])
    assert [result["id"] for result in results] == examples.table["id"][:]
    assert [result["text"] for result in results] == [
        answers[0].strip() if answers else "" for answers in examples.table["answers"]
    ]
    scores = task.metrics(results, examples, [])
    assert scores["f1"] == scores["em"] == scores["no_answer_accuracy"] == 1.0
    some = features.take([13, 0, 7])
    chosen = task.results(oracle(some), some, ["start", "end"])
    assert chosen == [results[index] for index in (13, 0, 7)]


def test_a_question_without_room_for_a_window_is_cut_and_counted(tmp_path, tokenizer):
    long = "  " + "bob lives in " * 10
    examples = read(tmp_path, {"id": "a"}, {"id": "b", "question": long})
    task = qa_task(doc_stride=4)
    features = task.featurize(examples, tokenizer, ["start", "end"], max_length=20)
    assert features.truncated == 1
    # 20 tokens less 3 special ones, and 4 + 2 for the context.
    firsts = {row["example"]: row["first_context_token"] for row in features.table}
    assert firsts == {0: 5, 1: 13}
    strict = qa_task(doc_stride=4, long_input="error")
    with pytest.raises(ValueError, match=r"data.json question 2: expected at most 20 tokens"):
        strict.featurize(examples, tokenizer, ["start", "end"], max_length=20)


def test_the_largest_doc_stride_works_and_one_more_is_an_error(tmp_path, tokenizer):
    examples = read(tmp_path, {"question": "bob"})
    with pytest.raises(ValueError, match=r"doc_stride: expected at most 10 with inputs of 20 "):
        qa_task().featurize(examples, tokenizer, ["start", "end"], max_length=20)
    for stride in (10, 11):
        task = qa_task(doc_stride=stride)
        if stride == 10:
            assert len(task.featurize(examples, tokenizer, ["start", "end"], max_length=20)) == 1
        else:
            with pytest.raises(ValueError, match="doc_stride"):
                task.featurize(examples, tokenizer, ["start", "end"], max_length=20)


# Spans


def test_spans_end_behind_their_start_and_within_the_answer_length():
    logits = np.array([[0, 5, 0, 3], [9, 0, 2, 4]], np.float32)
    first, last, scores = best_spans(logits, n_best=4, max_answer_length=2)
    # All pairs of at most two tokens, by hand: (0,0) 9, (3,3) 7, (1,2) 7, (1,1) 5, ...
    assert list(zip(first, last, scores, strict=True)) == [(0, 0, 9), (1, 2, 7), (3, 3, 7),
                                                           (1, 1, 5)]  # fmt: skip
    first, last, scores = best_spans(logits, n_best=4, max_answer_length=3)
    assert (first[1], last[1], scores[1]) == (1, 3, 9)
    # Only the best two starts (1, 3) and ends (0, 3) are combined.
    first, last, _ = best_spans(logits, n_best=2, max_answer_length=3)
    assert list(zip(first, last, strict=True)) == [(1, 3), (3, 3)]


def window(null: float, start: list[float], end: list[float], words: range) -> Window:
    """A window over words of one letter; a question token beside [CLS] must not count."""
    starts = np.array([2 * word for word in words])
    logits = np.array([[null, 90, *start], [0, 90, *end]], np.float32)
    return Window(logits, 2, starts, starts + 1)


WINDOWS = [
    window(5, [1, 4], [0, 3], range(0, 2)),
    window(2, [6, 1], [2, 0], range(1, 3)),
]


def test_windows_are_merged_and_the_smallest_null_score_counts():
    found = find_answers(WINDOWS, "a b c", n_best=3, max_answer_length=30)
    # b stands in both windows, 7 and 8; b c 6, a b 4, a 1, c 1.
    assert found["n_best"] == [
        {"text": "b", "score": 8.0}, {"text": "b c", "score": 6.0}, {"text": "a b", "score": 4.0},
    ]  # fmt: skip
    assert (found["text"], found["score"], found["null_score"]) == ("b", 8.0, 2.0)


def test_blanks_that_are_tokens_are_no_answer_and_no_part_of_one():
    starts = np.array([0, 1, 2])
    logits = np.array([[0, 0, 9, 1], [0, 0, 9, 1]], np.float32)
    # " " has 18, " b" 10, "a " 9. RoBERTa's tokenizer leaves the blank out of the token's place.
    for ends in ([1, 2, 3], [1, 1, 3]):
        window = Window(logits, 1, starts, np.array(ends))
        found = find_answers([window], "a b", 3, max_answer_length=2)
        assert found["n_best"] == [{"text": "b", "score": 10.0}, {"text": "a", "score": 9.0}]


def test_no_answer_needs_a_margin_above_the_threshold():
    found = find_answers(WINDOWS, "a b c", n_best=3, max_answer_length=30)
    for threshold, text in ((-7.0, ""), (-6.0, "b"), (0.0, "b")):  # 2 - 8 = -6 is not above -6
        chosen = allow_no_answer(found, 3, threshold)
        assert chosen["text"] == text
        assert [answer["text"] for answer in chosen["n_best"]] == ["b", "b c", "a b"]
    kept = allow_no_answer(found, 5, 0.0)["n_best"]
    assert [answer["text"] for answer in kept] == ["b", "b c", "a b", ""]


def test_squad_1_never_answers_with_nothing(tmp_path, tokenizer):
    examples = read(tmp_path, {})
    for name, text, n_best in (("squad", "Anna", 1), ("squad_v2", "", 2)):
        task = qa_task(name, doc_stride=4, n_best=2)
        features = task.featurize(examples, tokenizer, ["start", "end"], max_length=48)
        logits = np.zeros((2, len(features.table[0]["input_ids"])), np.float32)
        logits[:, 0], logits[:, 5] = 3, 1
        (result,) = task.results([logits], features, ["start", "end"])
        assert (result["text"], result["null_score"], result["score"]) == (text, 6.0, 2.0)
        assert sum(answer["probability"] for answer in result["n_best"]) == pytest.approx(1)
        assert result["n_best"][n_best - 1]["text"] == "Anna"


def test_predictions_keep_the_logits_of_tokens_alone():
    logits = torch.arange(6.0).view(2, 3)
    outputs = SimpleNamespace(start_logits=logits, end_logits=-logits)
    batch = {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    whole, short = qa_task().predictions(outputs, batch, [])
    assert whole.tolist() == [[0, 1, 2], [0, -1, -2]]
    assert short.tolist() == [[3, 4], [-3, -4]] and short.dtype == np.float32


# Scores


def test_scores_against_hand_counts(tmp_path):
    no_answer = {"answers": [], "answer_start": []}
    examples = read(
        tmp_path,
        {"id": "a"},
        {"id": "b", "answers": ["lives in Oslo", "Oslo"], "answer_start": [19, 28]},
        {"id": "c"} | no_answer,
        {"id": "d"} | no_answer,
        {"id": "e"},
    )
    texts = ["the Oslo!", "in Oslo", "", "Oslo", ""]
    # Word F1: 1; the better of 2*2/(2+3) and 2*1/(2+1); 1; 0; 0.
    scores = qa_task().metrics([{"text": text} for text in texts], examples, [])
    assert scores == pytest.approx(
        {
            "f1": (1 + 4 / 5 + 1 + 0 + 0) / 5,
            "em": 2 / 5,
            "has_answer_f1": (1 + 4 / 5 + 0) / 3,
            "has_answer_em": 1 / 3,
            "no_answer_accuracy": 1 / 2,
        }
    )
    answered = examples.select([0, 1])
    scores = qa_task("squad").metrics([{"text": text} for text in texts[:2]], answered, [])
    assert scores == pytest.approx({"f1": 9 / 10, "em": 1 / 2})


# Training


@pytest.mark.parametrize(
    ("benchmark", "method"),
    [("squad", "p-tuning-v2"), ("squad_v2", "prompt-tuning"), ("squad_v2", "linear-probe"),
     ("squad_v2", "fine-tuning")],
)  # fmt: skip
def test_training_end_to_end(benchmark, method, model, tmp_path, capsys):
    WRITERS[benchmark](tmp_path, 16)
    output = tmp_path / "run"
    rate = {"fine-tuning": "0.01", "prompt-tuning": "0.05"}.get(method, "0.03")
    arguments = [
        "train", "--task", benchmark, "--data-dir", str(tmp_path), "--model", model, "--method",
        method, "--output", str(output), "--doc-stride", "8", "--num-virtual-tokens", "4",
        "--learning-rate", rate, "--max-steps", "60", "--batch-size", "8", "--dropout", "0",
        "--eval-steps", "30", "--no-progress",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    capsys.readouterr()
    report = json.loads((output / "report.json").read_text())
    scores = report["metrics"]["validation"]
    assert ("no_answer_accuracy" in scores) == (benchmark == "squad_v2")
    if method in ("p-tuning-v2", "fine-tuning"):
        assert scores["f1"] > 0.9
    version = "1.1" if benchmark == "squad" else "2.0"
    file = tmp_path / f"dev-v{version}.json"
    assert cli.main(["eval", "--run", str(output), "--data", str(file)]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again.pop("baseline", {"answer": "no answer"})["answer"] == "no answer"
    assert again == scores | {"examples": 16, "truncated_examples": 0}
    typed = "anna lives in\tAnna lives in Berlin. Bob sleeps and was good."
    assert cli.main(["predict", "--run", str(output), "--text", typed]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["question"] == "anna lives in" and len(line["n_best"]) == 5
    if method in ("p-tuning-v2", "fine-tuning"):
        assert line["answer"] == "Berlin"
    assert cli.main(["predict", "--run", str(output), "--text", "no tab"]) == cli.BAD_INPUT
    assert "expected a question and its context" in capsys.readouterr().err
