"""What `ptv2-fast train` does where no method, recipe or file is named."""

import json
from pathlib import Path

import pytest
import transformers

from ptv2_fast import cli
from ptv2_fast.recipes import read_recipe
from ptv2_fast.recipes.default import default_recipe
from ptv2_fast.training.options import RunConfig
from tests.command_line import save_tiny
from tests.models import one_thread  # noqa: F401


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str]:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def arguments(tiny, run: Path, *more: str) -> list[str]:
    return [
        "train", "--task", "token-classification", "--model", tiny["model"], "--train-file",
        tiny["train"], "--output", str(run), "--no-progress", *more,
    ]  # fmt: skip


def model_of(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())["model"]


def test_the_preset_of_task_and_encoder_is_the_default(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(arguments(tiny, run, "--max-steps", "2", "--num-virtual-tokens", "5")) == 0
    assert "recipe: preset-tagging-minilm" in capsys.readouterr().err
    preset, config = read_recipe("preset-tagging-minilm"), model_of(run)
    assert config["low_rank"] == preset["low_rank"] > 0 and config["train_biases"]
    assert config["num_virtual_tokens"] == 5, "what is given wins"
    assert json.loads((run / "report.json").read_text())["steps"] == 2, "not the preset's epochs"
    # Resuming takes what the run has.
    assert cli.main(["train", "--output", str(run), "--resume"]) == 0
    assert "recipe:" not in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--method", "p-tuning-v2"], ["--recipe", "none"]])
def test_a_named_method_and_no_recipe_have_the_plain_defaults(words, tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(arguments(tiny, run, "--max-steps", "1", *words)) == 0
    assert "recipe:" not in capsys.readouterr().err
    config = model_of(run)
    assert config["low_rank"] is None and not config["train_biases"]


def test_options_of_a_recipe_are_taken_back_by_none(tiny, tmp_path, capsys):
    words = ["--low-rank", "none", "--no-train-biases", "--no-train-norms", "--max-steps", "1"]
    words += ["--head-dropout", "none"]
    assert cli.main(arguments(tiny, tmp_path / "run", *words)) == 0
    config = model_of(tmp_path / "run")
    assert config["low_rank"] is None and config["head_dropout"] is None
    with pytest.raises(SystemExit):
        cli.main(arguments(tiny, tmp_path / "other", "--low-rank", "nine"))
    assert "invalid int value: 'nine'" in capsys.readouterr().err


BERT, MORE = transformers.BertConfig, ("train_biases", "train_norms", "low_rank")


@pytest.mark.parametrize(
    "task, config, preset, missing",
    [
        ("text-classification", BERT(hidden_size=768), "classification-base", ()),
        ("question-answering", BERT(hidden_size=1024, num_attention_heads=16), "qa-large", ()),
        ("semantic-role-labeling", BERT(hidden_size=512, num_attention_heads=8), "tagging-minilm",
         ()),
        ("token-classification", transformers.ModernBertConfig(), "tagging-base", MORE[:1]),
        ("token-classification", transformers.AlbertConfig(hidden_size=768, num_attention_heads=12),
         "tagging-base", MORE),
    ],
)  # fmt: skip
def test_what_the_encoder_does_not_have_is_left_out(task, config, preset, missing, tmp_path):
    config.save_pretrained(tmp_path)
    given = {"task": task, "model": str(tmp_path), "train_file": "x", "prefix_projection": True}
    name, options = default_recipe(RunConfig.from_dict(given))
    whole = read_recipe(name)
    assert name == f"preset-{preset}"
    assert set(MORE) - set(options) == set(missing)
    assert set(whole) - set(options) >= {"model", "init"}
    RunConfig.from_dict(options | given)


@pytest.mark.parametrize(
    "given, there, left_out",
    [
        ({"schedule": "exponential"}, "init", "warmup_ratio"),
        ({"schedule": "warmup_stable_decay", "decay_ratio": 1.0}, "init", "warmup_ratio"),
        ({"schedule": "warmup_stable_decay"}, "warmup_ratio", "decay_ratio"),
        ({"position_offset": "prefix"}, "init", "max_length"),
        ({"num_virtual_tokens": 0, "train_norms": True}, "max_length", "init"),
    ],
)
def test_what_is_given_takes_the_place_of_what_it_excludes(given, there, left_out, tmp_path):
    BERT(max_position_embeddings=258).save_pretrained(tmp_path)
    own = {"task": "text-classification", "model": str(tmp_path), "train_file": "x", **given}
    _, options = default_recipe(RunConfig.from_dict(own))
    assert there in options and left_out not in options
    RunConfig.from_dict(options | own)


def test_texts_are_cut_where_the_table_of_positions_ends(tmp_path):
    """RoBERTa keeps two of its positions."""
    given = {"task": "text-classification", "model": str(tmp_path), "train_file": "x"}
    for positions in (257, 258):
        transformers.RobertaConfig(max_position_embeddings=positions).save_pretrained(tmp_path)
        _, options = default_recipe(RunConfig.from_dict(given))
        assert ("max_length" in options) is (positions == 258)


def test_without_a_prefix_the_rest_of_the_preset_trains(tiny, tmp_path):
    words = ["--num-virtual-tokens", "0", "--max-steps", "1"]
    for number, more in enumerate(([], ["--recipe", "preset-tagging-minilm"])):
        run = tmp_path / str(number)
        assert cli.main(arguments(tiny, run, *words, *more)) == 0
        config = model_of(run)
        assert config["num_virtual_tokens"] == 0 and config["low_rank"] and config["train_norms"]


def test_a_run_goes_on_from_what_another_trained(tiny, tmp_path):
    """Of any shape, which is then the shape of what trains."""
    first, plain = tmp_path / "first", ["--method", "p-tuning-v2", "--depth", "2"]
    for more in (["--num-virtual-tokens", "3", "--low-rank", "2"], plain):
        assert cli.main(arguments(tiny, first, "--max-steps", "2", "--overwrite", *more)) == 0
        then = ["--start-from", str(first), "--max-steps", "1", "--overwrite"]
        assert cli.main(arguments(tiny, tmp_path / "then", *then)) == 0
        names = ("num_virtual_tokens", "low_rank", "low_rank_alpha", "train_biases", "depth")
        shapes = [{n: model_of(run)[n] for n in names} for run in (first, tmp_path / "then")]
        assert shapes[0] == shapes[1]
    assert json.loads((tmp_path / "then" / "report.json").read_text())["started_from"]["head"]


def test_a_run_that_is_not_scored_is_read_and_left_out_of_reports(tiny, tmp_path, capsys):
    run = tmp_path / "runs" / "a"
    assert cli.main(arguments(tiny, run, "--method", "linear-probe", "--max-steps", "1")) == 0
    assert cli.main(["train", "--output", str(run), "--resume"]) == 0
    assert cli.main(["report", str(run.parent), "--output", str(tmp_path / "page")]) == 2
    assert f"{run}: not scored" in capsys.readouterr().err
