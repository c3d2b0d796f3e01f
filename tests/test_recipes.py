"""Recipes against the authors' scripts, published figures, and what `ptv2-fast tasks` lists."""

import json

import pytest
import transformers
import yaml

from ptv2_fast import cli
from ptv2_fast.cli.parser import run_config
from ptv2_fast.cli.tasks import plain_command, rows_of
from ptv2_fast.recipes import load_recipe, read_recipe, recipes
from ptv2_fast.recipes.published import published, published_scores
from ptv2_fast.tasks.benchmarks import BENCHMARKS
from ptv2_fast.training.options import RunConfig
from tests import conll_files, squad_files, superglue_files
from tests.models import one_thread  # noqa: F401
from tests.tiny_run import save_tiny_model

BERT_CASED, BERT, ROBERTA = "bert-large-cased", "bert-large-uncased", "roberta-large"
# run_script/*.sh of THUDM/P-tuning-v2: model, lr, pre_seq_len, bs, epochs, dropout, seed.
SCRIPTS = {
    "boolq-bert-large": (BERT_CASED, 5e-3, 40, 32, 100, 0.1, 11),
    "boolq-roberta-large": (ROBERTA, 7e-3, 8, 32, 100, 0.1, 11),
    "conll2003-roberta-large": (ROBERTA, 3e-2, 11, 16, 30, 0.1, 11),
    "conll2004-bert-large": (BERT, 2e-2, 128, 32, 40, 0.2, 11),
    "conll2004-roberta-large": (ROBERTA, 6e-2, 144, 32, 80, 0.1, 11),
    "conll2005-roberta-large": (ROBERTA, 6e-3, 224, 16, 15, 0.1, 11),
    # Named run_conll12_bert.sh, but it trains roberta-large; the recipe keeps its promise.
    "conll2012-bert-large": (BERT, 5e-3, 128, 16, 45, 0.1, 11),
    "conll2012-roberta-large": (ROBERTA, 5e-3, 64, 32, 45, 0.1, 11),
    "copa-bert-large": (BERT_CASED, 1e-2, 16, 16, 80, 0.1, 44),
    "copa-roberta-large": (ROBERTA, 9e-3, 8, 16, 120, 0.1, 11),
    "ontonotes-bert-large": (BERT, 1e-2, 16, 16, 30, 0.1, 11),
    "ontonotes-roberta-large": (ROBERTA, 7e-3, 48, 16, 60, 0.1, 14),
    "rte-bert-large": (BERT_CASED, 1e-2, 20, 32, 60, 0.1, 11),
    "rte-roberta-large": (ROBERTA, 5e-3, 128, 32, 100, 0.1, 11),
    "squad-roberta-large": (ROBERTA, 5e-3, 16, 8, 30, 0.2, 11),
    "squad_v2-roberta-large": (ROBERTA, 5e-3, 8, 8, 10, 0.2, 11),
    "wic-bert-large": (BERT_CASED, 1e-4, 20, 16, 80, 0.1, 44),
    "wic-roberta-large": (ROBERTA, 1e-2, 8, 32, 50, 0.1, 11),
    "wsc-bert-large": (BERT_CASED, 5e-3, 20, 16, 80, 0.1, 44),
    "wsc-roberta-large": (ROBERTA, 1e-2, 8, 16, 10, 0.1, 44),
}
SUPERGLUE = ("boolq", "copa", "rte", "wic", "wsc")
WRITERS = superglue_files.WRITERS | conll_files.WRITERS | squad_files.WRITERS
PRESETS = [name for name in recipes() if name.startswith("preset-")]
GLM = [name for name in recipes() if "-glm-" in name]
# Of which no script was released -> whose settings their rows with GLM have.
WITHOUT_SCRIPT = {"cb": "rte", "multirc": "boolq", "record": "boolq"}
DEBERTA = [name for name in recipes() if name.endswith("-deberta-xlarge")]


def config_of(name: str, **more) -> RunConfig:
    return RunConfig.from_dict(read_recipe(name) | more)


def test_tokens_of_a_batch_replace_the_size_that_a_recipe_gives():
    options = {"recipe": "rte-roberta-large", "config": None, "batch_tokens": 2048}
    training = run_config(options).training
    assert (training.batch_size, training.batch_tokens) == (None, 2048)


def test_every_script_has_a_recipe_and_nothing_else_is_there():
    assert {*recipes()} == {*SCRIPTS, *PRESETS, *DEBERTA, *GLM}
    assert len(SCRIPTS) == 20 and len(PRESETS) == 9 and len(DEBERTA) == 7


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_recipe_says_what_the_authors_script_says(name):
    config = config_of(name)
    data, model, training = config.data, config.model, config.training
    assert (
        model.model.rpartition("/")[2], training.learning_rate, model.num_virtual_tokens,
        training.batch_size, training.num_train_epochs, model.dropout, training.seed,
    ) == SCRIPTS[name]  # fmt: skip
    assert data.task == name.partition("-")[0] and data.task in BENCHMARKS
    # Dropout of hidden states acts on the prefix too; that of the attention is the model's, 0.1.
    assert model.prefix_dropout == model.dropout
    assert 0.1 in (model.attention_dropout, model.dropout)
    assert (model.method, model.position_offset) == ("p-tuning-v2", "prefix")
    projected = name == "wic-bert-large"
    assert (model.prefix_projection, model.encoder_hidden_size) == (
        (True, 512) if projected else (False, None)
    )
    templates = BENCHMARKS[data.task].templates
    assert data.template == ("1" if projected else templates[0])
    assert (training.warmup_ratio, training.weight_decay, training.load_best) == (0, 0, True)
    if data.task in SUPERGLUE:
        assert (training.schedule, data.max_length) == ("linear", 128)
    else:
        assert (training.schedule, training.schedule_decay) == ("exponential", 0.95)
        assert data.max_length == (384 if data.task.startswith("squad") else None)
    assert model.num_virtual_tokens + (data.max_length or 128) <= 512


@pytest.mark.parametrize("name", PRESETS)
def test_presets_leave_the_task_to_the_user(name):
    assert not {"task", "train_file", "dataset", "data_dir"} & set(read_recipe(name))
    family = {"classification": "text-classification", "tagging": "token-classification",
              "qa": "question-answering"}[name.split("-")[1]]  # fmt: skip
    config = config_of(name, task=family)
    assert (config.training.bf16, config.model.backbone_dtype) == (
        (False, None) if name.endswith("minilm") else (True, "bf16")
    )


@pytest.mark.parametrize("name", DEBERTA)
def test_a_row_of_deberta_has_the_settings_of_robertas_and_shifts_no_table(name):
    same = read_recipe(f"{name.partition('-')[0]}-roberta-large")
    changed = {"model": "microsoft/deberta-xlarge", "position_offset": "none"}
    assert read_recipe(name) == same | changed
    assert config_of(name).model.method == "p-tuning-v2"


def test_rows_of_glm_have_the_settings_that_they_say():
    """Both sizes the same; the paper prints none, so those of RoBERTa-large's scripts."""
    tasks = (*SUPERGLUE, *WITHOUT_SCRIPT)
    assert {*GLM} == {f"{task}-glm-{size}" for task in tasks for size in ("xlarge", "xxlarge")}
    for task in tasks:
        config, other = (
            config_of(name)
            for name in (f"{task}-glm-xlarge", f"{WITHOUT_SCRIPT.get(task, task)}-roberta-large")
        )
        assert config.model.num_virtual_tokens == other.model.num_virtual_tokens
        assert config.training.learning_rate == other.training.learning_rate
        assert config.model.position_offset == "none" and config.data.task == task
        larger = {"model": "./models/glm-10b"}
        assert read_recipe(f"{task}-glm-xxlarge") == read_recipe(f"{task}-glm-xlarge") | larger
        assert published(task, config.model.model) and published(task, larger["model"])
        assert "written from the paper" in load_recipe(f"{task}-glm-xlarge").description


def test_an_unknown_recipe_names_close_ones(tmp_path, capsys):
    command = ["train", "--recipe", "rte-roberta", "--output", str(tmp_path / "run")]
    assert cli.main(command) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "got 'rte-roberta'; close to it are ['rte-roberta-large'" in line
    with pytest.raises(ValueError, match="got 'published'"):
        read_recipe("published")


def test_published_figures_name_their_source_and_whether_it_was_compared():
    cells = {
        (f.column, f.source, f.head): (f.value, f.verified)
        for f in published("rte", "FacebookAI/roberta-large")
    }
    assert cells == {
        ("FT", "Table 2", "linear"): (86.6, True),
        ("PT", "Table 2", "linear"): (58.8, True),
        ("PT-2", "Table 2", "linear"): (89.5, True),
        ("PT-2", "Table 4", "linear"): (88.4, False),
        ("PT-2", "Table 4", "lm"): (86.6, False),
        ("PT-2", "README of THUDM/P-tuning-v2", "linear"): (86.6, True),
    }
    splits = {f.split: f.value for f in published("conll2005", "roberta-large")
              if f.source.startswith("README")}  # fmt: skip
    assert splits == {"test_wsj": 89.4, "test_brown": 83.9}
    (copa,) = [f for f in published("copa", "bert-large-cased") if f.best_epoch]
    assert (copa.value, copa.best_epoch) == (77.0, 12)
    for other in ("google-bert/bert-large-uncased-whole-word-masking", "xlm-roberta-large"):
        assert published("rte", other) == []


def test_figures_are_of_known_data_sets_metrics_and_splits():
    for figure in published_scores():
        benchmark = BENCHMARKS[figure.task]
        assert figure.metric in benchmark.metrics, figure
        assert figure.split in benchmark.files, figure
        assert 0 < figure.value <= 100
        assert len([f for f in published_scores() if f == figure]) == 1


def listed(capsys, *words: str) -> str:
    assert cli.main(["tasks", *words]) == 0
    return capsys.readouterr().out


def test_tasks_lists_a_command_for_every_row_and_every_recipe(capsys):
    text = listed(capsys)
    assert max(map(len, text.splitlines())) <= 80
    commands = text.replace("\\\n", " ").split("\n")
    commands = [line.split() for line in commands if line.startswith("    ptv2-fast")]
    rows = {(f.task, f.model, f.head) for f in published_scores() if f.source.startswith("Table")}
    assert len(rows) == 8 * 4 + 7 * 3 + 5  # the linear head of Table 4 is in Table 2 but for SST-2
    for task, model, head in rows:
        output = f"runs/{task}-{model}{'-lm' if head == 'lm' else ''}"
        assert any(command[-1] == output for command in commands), output
    for task in set(BENCHMARKS) - {task for task, *_ in rows}:
        assert any(command[-1] == f"runs/{task}" for command in commands), task
    for name in recipes():
        assert f"  {name}  " in text


def test_tasks_for_programs_and_for_one_name(capsys):
    content = json.loads(listed(capsys, "--json"))
    assert [task["name"] for task in content["tasks"]] == list(BENCHMARKS)
    assert [recipe["name"] for recipe in content["recipes"]] == recipes()
    (row,) = [row for task in content["tasks"] for row in task["rows"]
              if (row["model"], task["name"]) == ("glm-xlarge", "rte")]  # fmt: skip
    assert row["command"][:3] == ["ptv2-fast", "train", "--recipe"]
    for task in BENCHMARKS:
        assert max(map(len, listed(capsys, task).splitlines())) <= 80, task
    text = listed(capsys, "wic")
    assert "templates   0, 1" in text and "train.jsonl" in text and "wic-bert-large" in text
    assert "Table 2, BERT-large, accuracy                   74.9?  63.0?  75.1?" in text
    text = listed(capsys, "wic-bert-large")
    options = yaml.safe_load("\n".join(line for line in text.splitlines() if ": " in line[:30])
                             .partition("\n")[2])  # fmt: skip
    assert options == read_recipe("wic-bert-large")
    assert cli.main(["tasks", "wicc"]) == 2
    assert "close to it are ['wic'" in capsys.readouterr().err


def commands_of(task: str) -> list[list[str]]:
    """What `ptv2-fast tasks` says for a data set, once each.

    Without the larger GLM, whose options are those of the other one.
    """
    rows = [row for row in rows_of(task) if row.model != "glm-xxlarge"]
    rows = [list(row.words) for row in rows]
    return [*rows, list(plain_command(BENCHMARKS[task]))]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    """With a language model's head, and the label words of Table 4 in its vocabulary."""
    # The longest prefix of a recipe shifts an input of 64 tokens by 224 positions.
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"), positions=300)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["true", "false", "neutral"])
    tokenizer.save_pretrained(folder)
    model = transformers.BertForMaskedLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("task", BENCHMARKS)
def test_every_listed_command_dry_runs_on_official_files(task, tiny_model, tmp_path, capsys):
    """With a tiny model in place of the large one, which makes inputs shorter."""
    # SQuAD's windows share 128 tokens.
    length = "200" if task.startswith("squad") else "64"
    data = tmp_path / "data"
    data.mkdir()
    WRITERS[task](data, 8)
    for command in commands_of(task):
        here = ["--model", tiny_model, "--data-dir", str(data), "--max-length", length, "--dry-run"]
        words = [*command, "--output", str(tmp_path / "run"), *here]
        assert cli.main(words) == 0, capsys.readouterr().err
        shown = json.loads(capsys.readouterr().out.partition("\n")[2])
        expected = read_recipe(command[command.index("--recipe") + 1])
        chosen = {name: value for table in shown.values() for name, value in table.items()}
        assert chosen["task"] == task
        changed = {"model", "max_length"}
        assert not {k for k, v in expected.items() if k not in changed and chosen[k] != v}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "more",
    [
        ["--method", "fine-tuning", "--learning-rate", "2e-5", "--num-train-epochs", "10"],
        ["--method", "prompt-tuning", "--learning-rate", "0.1"],
        ["--method", "p-tuning-v1"],
    ],
)
def test_the_other_columns_of_the_table_dry_run(more, tiny_model, tmp_path, capsys):
    WRITERS["rte"](tmp_path, 8)
    for recipe in ("rte-roberta-large", "preset-classification-large"):
        words = ["train", "--recipe", recipe, "--task", "rte", "--model", tiny_model, *more]
        words += ["--data-dir", str(tmp_path), "--max-length", "64", "--dry-run"]
        assert cli.main([*words, "--output", str(tmp_path / "run")]) == 0, capsys.readouterr().err
