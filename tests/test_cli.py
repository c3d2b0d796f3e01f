"""The command line end to end on tiny data, interrupted runs, and bad input."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptv2_fast import cli
from ptv2_fast.training.option_files import read_config_file
from ptv2_fast.training.options import ModelOptions, RunConfig, TrainingOptions
from ptv2_fast.training.unread_options import METHODS_OF_OPTION, READERS, options_without_effect
from tests.command_line import (
    LOADING,
    fails_with_one_line,
    save_tiny,
    train_arguments,
    train_tiny,
)
from tests.models import one_thread  # noqa: F401


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str]:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    return train_tiny(tiny, tmp_path_factory.mktemp("runs") / "ner")


def test_a_run_folder_holds_config_metrics_adapter_and_report(trained):
    report = json.loads((trained / "report.json").read_text())
    assert report["metrics"]["validation"]["f1"] > 0.9
    # Two layers of keys and values of 4 positions, and a head for three labels.
    assert report["trainable_parameters"] == 2 * 2 * 4 * 16 + 16 * 3 + 3
    files = [trained / "adapter" / name for name in ("config.json", "ptv2_config.json",
                                                     "ptv2_adapter.safetensors")]  # fmt: skip
    assert report["saved_bytes"] == sum(file.stat().st_size for file in files)
    assert report["kept_bytes"] > 0
    assert report["baselines"]["validation"]["answer"] == "O"
    assert report["steps"] == 48
    config = json.loads((trained / "config.json").read_text())
    assert config["found"] == {
        "labels": ["B-LOC", "B-PER", "O"],
        "max_length": 24,
        "transitions": {"B-LOC": {"O": 24}, "B-PER": {"O": 24}, "O": {"B-LOC": 24, "O": 72}},
    }
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_f1" in line] == [6, 12, 18, 24, 30, 36, 42, 48]
    assert not list(trained.rglob("*.tmp"))


def test_the_config_file_of_a_run_repeats_it(trained, tmp_path):
    again = ["train", "--config", str(trained / "config.json"), "--output", str(tmp_path / "run")]
    assert cli.main(again) == 0
    name = "adapter/ptv2_adapter.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes()


def test_runs_of_earlier_versions_take_the_best_label_of_each_word(trained, tmp_path):
    """Also where they are repeated or go on; others do as they began."""
    # Not above: they need datasets and seqeval; other files take names from this one without them.
    from ptv2_fast.tasks.decoding import affinities
    from ptv2_fast.training.models import load_run
    from ptv2_fast.training.prepare import prepare

    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    content = json.loads((folder / "config.json").read_text())
    transitions = content["found"]["transitions"]
    run = load_run(folder)
    assert run.task.affinity.equal(affinities(run.labels, transitions))
    content["found"]["transitions"] = {"O": {"B-ORG": 1}}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="transitions: expected counts of labels"):
        load_run(folder)
    del content["found"]["transitions"], content["data"]["decoding"]
    (folder / "config.json").write_text(json.dumps(content))
    run = load_run(folder)
    assert run.task.affinity is None and run.task.options.decoding == "argmax"
    assert read_config_file(folder / "config.json")["decoding"] == "argmax"
    goes_on = prepare(run.config, folder, resume=True)
    assert goes_on.part.task.affinity is None and goes_on.metadata == content["found"]


@pytest.mark.parametrize(
    ("method", "learning_rate"),
    [("fine-tuning", 0.01), ("linear-probe", 0.05), ("prompt-tuning", 0.01)],
)
def test_baselines_score_the_same_after_loading(method, learning_rate, tiny, tmp_path, capsys):
    output = tmp_path / "run"
    values = {
        "task": "text-classification", "model": tiny["model"], "method": method, "init": "tokens",
        "train_file": tiny["train_csv"], "validation_file": tiny["dev_csv"], "max_steps": 30,
        "learning_rate": learning_rate, "eval_steps": 15, "pre_seq_len": 3, "dropout": 0,
        "progress": False,
    }  # fmt: skip
    config = tmp_path / "config.json"
    config.write_text(json.dumps(values))
    assert cli.main(["train", "--config", str(config), "--output", str(output)]) == 0
    capsys.readouterr()
    assert cli.main(["eval", "--run", str(output), "--data", tiny["dev_csv"]]) == 0
    scores = json.loads(capsys.readouterr().out)
    report = json.loads((output / "report.json").read_text())
    assert scores["accuracy"] == report["metrics"]["validation"]["accuracy"] > 0.9
    assert cli.main(["predict", "--run", str(output), "--text", "the film was good"]) == 0
    predicted = json.loads(capsys.readouterr().out)
    assert predicted["label"] == "good" and 0.5 < predicted["score"] < 1


def test_a_killed_run_resumes_to_the_adapter_of_an_uninterrupted_one(tiny, tmp_path):
    """The kill comes in the middle of the second epoch, at no boundary of anything."""
    options = ("--save-steps", "4", "--eval-steps", "4", "--dropout", "0.1", "--max-steps", "40")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "ptv2_fast.cli", *train_arguments(tiny, killed, *options)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not any(
        int(state.parent.name.split("-")[1]) >= 8
        for state in killed.glob("checkpoints/checkpoint-*/trainer_state.json")
    ):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "report.json").exists()
    # A checkpoint that a crash cut short.
    (killed / "checkpoints" / "checkpoint-39").mkdir()
    assert cli.main(train_arguments(tiny, whole, *options)) == 0
    neutral = ["--feature-cache", str(tmp_path / "cache")]
    assert cli.main(["train", "--output", str(killed), "--resume", *neutral]) == 0
    assert not (killed / "checkpoints").exists()
    name = "adapter/ptv2_adapter.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()
    steps = [
        json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps) and steps.count(4) == 1


def test_a_complete_run_is_not_trained_again(trained, capsys):
    before = (trained / "report.json").stat().st_mtime_ns
    assert cli.main(["train", "--output", str(trained), "--resume"]) == 0
    assert "is complete" in capsys.readouterr().err
    assert (trained / "report.json").stat().st_mtime_ns == before


def test_options_that_the_method_does_not_read_are_named(tiny, tmp_path, capsys):
    names = {**ModelOptions.model_fields, **TrainingOptions.model_fields}
    assert set(METHODS_OF_OPTION) <= set(names)
    arguments = train_arguments(tiny, tmp_path / "run", "--method", "linear-probe", "--dry-run",
                                "--lora-rank", "4")  # fmt: skip
    assert cli.main(arguments) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == [
        f"note: {option} has no effect on the method linear-probe"
        for option in ("--num-virtual-tokens", "--init", "--lora-rank")
    ]


def test_options_that_others_leave_without_effect_are_named():
    names = {*TrainingOptions.model_fields, *ModelOptions.model_fields}
    assert set(READERS) <= names
    plain = RunConfig.from_dict({"model": "m", "task": "token-classification", "train_file": "a"})
    assert set(options_without_effect(plain, names)) >= {*READERS}
    found = options_without_effect(plain, ["decay_ratio", "learning_rate", "bias_learning_rate"])
    assert found == {
        "decay_ratio": "any schedule but warmup_stable_decay",
        "bias_learning_rate": "a run without --train-biases or --train-norms",
    }
    of_search = options_without_effect(plain, READERS, ["schedule", "low_rank", "method"])
    assert [*of_search] == ["bias_learning_rate"]
    reading = {"prefix_projection": True, "train_norms": True, "low_rank": 4}
    falling = plain.changed(reading | {"schedule": "warmup_stable_decay"})
    assert not options_without_effect(falling, {*READERS} - {"schedule_decay"})


# Each line is ten of the line before.
ALIASES = "a: &a 1\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n"
    for before, name in itertools.pairwise("abcdefgh")
)

BAD_TRAINING = {
    "missing file": (["--train-file", "/nowhere.txt"], "expected an existing file"),
    "missing model": (["--model", "/nowhere"], "/nowhere"),
    "missing column": (["--train-file", "{train_csv}"], "words_column: expected a column of"),
    "P": (["--num-virtual-tokens", "0"], "num_virtual_tokens: expected an integer >= 1, got 0"),
    "width": (
        ["--method", "p-tuning-v1", "--encoder-hidden-size", "0"],
        "encoder_hidden_size: expected None or an integer >= 1, got 0",
    ),
    "P takes all": (["--position-offset", "prefix", "--pre_seq_len", "24"], "num_virtual_tokens"),
    "depth": (["--depth", "1-3"], "depth: expected layers 1 to 2, which the model has, got '1-3'"),
    "max length": (["--max-length", "25"], "max_length: expected at most 24, got 25"),
    "max length beside P": (
        ["--max-length", "24", "--position-offset", "prefix"],
        "24 positions and 20 remain, because position_offset='prefix' takes 4",
    ),
    "long input": (["--max-length", "8", "--long-input", "error"], "train.txt sentence 2"),
    "task": (["--task", "chess"], "task: expected one of"),
    "number": (["--learning-rate", "fast"], "--learning-rate: invalid float value: 'fast'"),
    "sign": (["--learning-rate=-1"], "learning_rate: expected None or a number > 0"),
    "infinite": (
        ["--learning-rate", "inf"],
        "learning_rate: expected None or a number > 0, got inf",
    ),
    "unknown option": (["--lerning-rate", "1"], "--lerning-rate"),
    "save steps": (
        ["--eval-steps", "4", "--save-steps", "8"],
        "save_steps: expected eval_steps 4 with load_best, got 8",
    ),
    "save steps without eval steps": (
        ["--eval-seconds", "4", "--save-steps", "8"],
        "save_steps: expected None beside eval_seconds with load_best, got 8",
    ),
    "decay": (
        ["--schedule", "warmup_stable_decay", "--warmup-ratio", "0.5", "--decay-ratio", "0.6"],
        "decay_ratio: expected at most 1 - warmup_ratio = 0.5, got 0.6",
    ),
    "tokens": (["--batch-tokens", "0"], "batch_tokens: expected None or an integer >= 1, got 0"),
    "size and tokens": (
        ["--batch-size", "4", "--batch-tokens", "64"],
        "batch_size: expected None beside batch_tokens, got 4",
    ),
    "average": (["--ema-decay", "1"], "ema_decay: expected None or a number in (0, 1), got 1.0"),
    "smoothing": (
        ["--label-smoothing-factor", "0.1", "--task", "question-answering"],
        "label_smoothing_factor: expected 0 for the task question-answering",
    ),
    "resume": (["--resume", "--overwrite"], "expected one of resume and overwrite"),
}


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_bad_training_input_ends_with_one_line_and_writes_nothing(case, tiny, tmp_path, capsys):
    more, message = BAD_TRAINING[case]
    output = tmp_path / "run"
    arguments = train_arguments(tiny, output, *(word.format(**tiny) for word in more))
    assert message in fails_with_one_line(arguments, capsys)
    assert not output.exists()


def test_an_unknown_label_in_the_validation_file_names_it(tiny, tmp_path, capsys):
    file = tmp_path / "dev.txt"
    file.write_text("Anna B-PER\n\nMars B-PLANET\n")
    arguments = train_arguments(tiny, tmp_path / "run", "--validation-file", str(file))
    line = fails_with_one_line(arguments, capsys)
    assert f"{file} sentence 2: unknown label 'B-PLANET'" in line


def test_an_existing_folder_is_left_alone(trained, tiny, tmp_path, capsys):
    before = {file: file.stat().st_mtime_ns for file in trained.rglob("*")}
    line = fails_with_one_line(train_arguments(tiny, trained), capsys)
    assert "--resume goes on" in line
    line = fails_with_one_line(train_arguments(tiny, trained, "--resume", "--seed", "1"), capsys)
    assert {file: file.stat().st_mtime_ns for file in trained.rglob("*")} == before
    line = fails_with_one_line(train_arguments(tiny, f"{tiny['train']}/run"), capsys)
    assert f"expected a folder, got the file '{tiny['train']}'" in line
    (tmp_path / "precious.txt").write_text("mine")
    for flag in ("--overwrite", "--resume", "--no-progress"):
        line = fails_with_one_line(train_arguments(tiny, tmp_path, flag), capsys)
        assert "or a run folder with" in line and "--resume" not in line
    assert (tmp_path / "precious.txt").read_text() == "mine"
    line = fails_with_one_line(train_arguments(tiny, tiny["model"], "--overwrite"), capsys)
    assert "or a run folder with" in line, "a pretrained model has a config.json too"


def test_bad_config_files_name_the_file_and_the_option(tiny, tmp_path, capsys):
    for name, content, message in (
        (
            "a.json",
            '{"num_virtual_tokens": "many"}',
            "num_virtual_tokens: expected an integer >= 0, got 'many'",
        ),
        (
            "b.json",
            '{"max_lenght": 3}',
            "unknown options ['max_lenght']; close to 'max_lenght' are",
        ),
        (
            "g.json",
            '{"lr": 3, "weight_deca": 1}',
            "close to 'lr' are ['learning_rate']; close to 'weight_deca' are ['weight_decay'",
        ),
        ("c.json", '{"seed": ', "c.json cannot be read"),
        ("e.yaml", "on: 1", "unknown options ['True']"),
        (
            "f.yaml",
            "num_virtual_tokens: 4\npre_seq_len: 8",
            "expected every option once, got ['num_virtual_tokens'] more often",
        ),
        ("h.json", "[" * 100_000, "h.json cannot be read: maximum recursion depth"),
        (
            "i.yaml",
            ALIASES + "seed: *h\n",
            "i.yaml cannot be read: expected at most 100,000 values",
        ),
        ("j.yaml", "&a [*a]", "j.yaml cannot be read: expected at most 100,000 values"),
        ("k.json", f'{{"seed": {10**30}}}', "seed: expected an integer of 64 bits"),
        (
            "l.json",
            f'{{"seed": {[7] * 999}}}',
            "seed: expected an integer in 0..2**32-1, got [7, 7, 7",
        ),
        ("m.json", '{"depth": "1-\\u001b[31m"}', "got '1-\\x1b[31m'"),
        ("n.json", '{"\\u001b[31m": 1}', "unknown options ['\\x1b[31m']"),
        ("d.ini", "seed = 1", "expected .json, .toml, .yaml or .yml, got '.ini'"),
    ):
        (tmp_path / name).write_text(content)
        options = ["train", "--output", str(tmp_path / "run"), "--config", str(tmp_path / name),
                   "--task", "token-classification", "--model", tiny["model"]]  # fmt: skip
        line = fails_with_one_line(options, capsys)
        assert message in line and len(line) < 500 and line.rstrip().isprintable()


def test_a_line_says_no_more_than_can_be_read(tiny, tmp_path, capsys):
    file = tmp_path / "train.txt"
    file.write_text(f"Anna B-PER\nsleeps O\n. O\nand B{'x' * 10**6}\n")
    options = train_arguments(tiny, tmp_path / "run", "--train-file", str(file))
    line = fails_with_one_line(options, capsys)
    assert str(file) in line and len(line) < 2200


def test_what_takes_too_much_memory_ends_with_one_line(tiny, tmp_path, capsys):
    options = train_arguments(tiny, tmp_path / "run", "--num-virtual-tokens", str(2**60))
    assert cli.main(options) == 2
    assert "error: not enough memory: " in capsys.readouterr().err.splitlines()[-1]


def test_corrupt_and_foreign_adapters_end_with_one_line(trained, tiny, tmp_path, capsys):
    import shutil

    command = ["predict", "--run", str(tmp_path / "run"), "--text", "Anna"]
    assert "expected a run folder" in fails_with_one_line(command, capsys)
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    tensors = tmp_path / "run" / "adapter" / "ptv2_adapter.safetensors"
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-7])
    assert "corrupt or truncated" in fails_with_one_line(command, capsys)
    tensors.write_bytes(content)
    description = tmp_path / "run" / "adapter" / "ptv2_config.json"
    description.write_text(description.read_text().replace('"hidden_size": 16', '"hidden_size": 8'))
    assert "hidden_size 8 against 16" in fails_with_one_line(command, capsys)
    command = ["eval", "--run", str(trained), "--data", tiny["train_csv"]]
    assert "words_column: expected a column of" in fails_with_one_line(command, capsys)


def test_env_runs_without_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from ptv2_fast import cli; sys.exit(cli.main(['env']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert "backend       cpu: " in done.stdout


@pytest.mark.parametrize(
    ("module", "package"), [("datasets", "datasets"), ("sklearn", "scikit-learn")]
)
def test_a_missing_package_is_named_in_one_line(tiny, tmp_path, module, package):
    code = (
        f"import sys; sys.modules[{module!r}] = None; from ptv2_fast.cli import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *train_arguments(tiny, tmp_path / "run")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 2
    expected = f"ptv2-fast train: error: expected the package {package}, which is not installed"
    assert done.stderr.splitlines() == [LOADING, expected]
    assert not (tmp_path / "run").exists()
