"""Texts with several choices: reading, batches, training by every method, bad input."""

import json
import math

import pytest
import torch

from ptv2_fast import cli
from ptv2_fast.tasks import DataOptions, make_task
from ptv2_fast.tasks.sources import file_source
from ptv2_fast.training.pretrained import load_tokenizer
from tests.models import one_thread, tiny_model  # noqa: F401
from tests.superglue_files import WRITERS
from tests.tiny_run import save_tiny_model

TASK = "multiple-choice"
ROWS = [
    {"text": "Anna loves it.", "choices": ["It was good.", "It was bad."], "label": 0},
    {"text": "Bob sleeps.", "choices": ["bad", "The film was a good film."], "label": 1},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def write_lines(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_choices_in_a_list_or_in_columns_are_the_same(tmp_path):
    task = make_task(DataOptions(task=TASK))
    listed = task.read(file_source(write_lines(tmp_path / "a.jsonl", ROWS)))
    table = ["label,choice2,text,choice1"]
    table += [f"{r['label']},{r['choices'][1]},{r['text']},{r['choices'][0]}" for r in ROWS]
    (tmp_path / "b.csv").write_text("\n".join(table) + "\n")
    numbered = task.read(file_source(tmp_path / "b.csv"))
    assert listed.table.to_list() == ROWS
    assert numbered.table.to_list() == [{**row, "label": str(row["label"])} for row in ROWS]
    assert task.find_labels(listed.select([0])) == ["0", "1"]


def test_batches_hold_every_choice_padded_to_the_longest(tmp_path, model):
    tokenizer = load_tokenizer(model)
    task = make_task(DataOptions(task=TASK))
    examples = task.read(file_source(write_lines(tmp_path / "a.jsonl", ROWS)))
    features = task.featurize(examples, tokenizer, ["0", "1"], max_length=12)
    # [CLS] bob sleeps . [SEP] the film was a good film . [SEP], cut to 12.
    assert features.lengths == [11, 12] and features.token_counts == [22, 19]
    assert features.truncated == 1
    rows = features.model_inputs(tokenizer, task.label_columns)
    batch = task.collator(tokenizer)(list(rows))
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == (2, 2, 12)
    assert batch["labels"].tolist() == [0, 1]
    assert batch["attention_mask"].sum(-1).tolist() == [[11, 11], [7, 12]]
    assert batch["input_ids"][1, 0, 7:].eq(tokenizer.pad_token_id).all()
    outputs = type("Outputs", (), {"logits": torch.tensor([[1.0, 2.0], [4.0, 3.0]])})
    results = task.results(task.predictions(outputs, batch, ["0", "1"]), features, ["0", "1"])
    assert [result["label"] for result in results] == ["1", "0"]
    assert task.metrics(results, examples, ["0", "1"]) == {"accuracy": 0.0}
    described = task.describe(examples.table[0], results[0])
    sure = pytest.approx(1 / (1 + math.exp(-1)))
    assert described == {**ROWS[0], "label": "1", "choice": "It was bad.", "score": sure}


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("p-tuning-v2", ["--init", "tokens", "--backbone", "frozen"]),
        ("p-tuning-v2", ["--init", "tokens", "--backbone", "hook"]),
        (
            "prompt-tuning",
            [
                "--init",
                "tokens",
                "--batch-tokens",
                "120",
                "--ema-decay",
                "0.5",
                "--label-smoothing-factor",
                "0.05",
            ],
        ),
        ("linear-probe", []),
        ("fine-tuning", ["--learning-rate", "0.01"]),
    ],
)
def test_every_method_learns_to_choose(tmp_path, model, capsys, method, more):
    WRITERS["copa"](tmp_path / "COPA", 16)
    run = str(tmp_path / "run")
    command = [
        "train", "--task", "copa", "--data-dir", str(tmp_path), "--output", run, "--model", model,
        "--method", method, "--num-virtual-tokens", "3", "--learning-rate", "0.05",
        "--num-train-epochs", "6", "--dropout", "0", "--no-progress",
    ]  # fmt: skip
    command += [] if "--batch-tokens" in more else ["--batch-size", "6"]
    assert cli.main(command + more) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["metrics"]["validation"] == {"accuracy": 1.0}
    capsys.readouterr()
    # Of another number of choices than in training.
    text = "Anna loves the film. because\tThe film was bad.\tThe film was good.\tThe film was bad."
    assert cli.main(["predict", "--run", run, "--text", text]) == 0
    predicted = json.loads(capsys.readouterr().out)
    assert (predicted["label"], predicted["choice"]) == ("1", "The film was good.")


BAD_ROWS = {
    "label": ({"label": 2}, "row 2: expected the index of one of 2 choices as label, .* got 2"),
    "no label": ({"label": None}, "row 2: expected the index of one of 2 choices .* got None"),
    "one choice": ({"choices": ["a"]}, "row 2: expected at least two choices, got"),
    "three": ({"choices": ["a", "b", "c"]}, "row 2: expected 2 choices, as in the first, got 3"),
    "empty cell": ({"choices": ["a", None]}, "row 2: expected a list of texts in choices"),
    "blank cell": ({"choices": ["a", ""]}, "row 2: expected a list of texts in choices"),
    "no text": ({"text": None}, "row 2: expected text in text, got None"),
}


def test_a_model_without_the_pooler_of_its_head_is_refused():
    model = tiny_model(head="choice")
    model.bert.pooler = None
    with pytest.raises(ValueError, match=r"model: .* got a BertForMultipleChoice without"):
        make_task(DataOptions(task=TASK)).adapt_model(model, None, [])


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named(tmp_path, case):
    changes, message = BAD_ROWS[case]
    file = write_lines(tmp_path / "data.jsonl", [ROWS[0], ROWS[1] | changes])
    with pytest.raises(ValueError, match=message) as raised:
        make_task(DataOptions(task=TASK)).read(file_source(file))
    assert "data.jsonl" in str(raised.value)


def test_missing_columns_and_typed_text_without_choices_are_errors(tmp_path):
    task = make_task(DataOptions(task=TASK))
    file = write_lines(tmp_path / "data.jsonl", [{"text": "a", "label": 0, "option1": "b"}])
    with pytest.raises(ValueError, match=r"choices_column: expected a column .* got 'choices'"):
        task.read(file_source(file))
    with pytest.raises(ValueError, match="typed text 1: expected at least two choices"):
        task.from_texts(["Anna sleeps."])
