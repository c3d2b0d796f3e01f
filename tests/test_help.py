"""What comes before anything heavy is loaded: help, versions, bad arguments and what was meant."""

import os
import subprocess
import sys

import pytest

import ptv2_fast
from ptv2_fast import cli
from tests.command_line import LOADING, fails_with_one_line


def test_help_version_and_bad_arguments_import_nothing_heavy(tmp_path):
    """They come at once; and so does the word that what is heavy is being loaded."""
    commands = (
        "train multitask eval predict serve ablate search report convert card tasks models env"
    ).split()
    for seed in ("1", "2"):
        (tmp_path / "seeds" / seed).mkdir(parents=True)
        (tmp_path / "seeds" / seed / "config.json").write_text('{"found": {}}')
    files = ["--train-file", "/nowhere.txt", "--output", str(tmp_path / "run")]
    lines = [["--help"], ["--version"], *([name, "--help"] for name in commands), ["trian"],
             ["train", "--epochs", "3"], ["train", "--task", "ner", "--model", "m", *files],
             ["train", "--task", "token-classification", "--model", "m", *files],
             ["train", "--task", "rte", "--model", "/nowhere", "--output", str(tmp_path / "run")],
             ["predict", "--run", str(tmp_path / "seeds"), "--text", "x"],
             ["eval", "--run", "/nowhere", "--data", "x"]]  # fmt: skip
    code = f"""
import contextlib, io, sys
from ptv2_fast import cli
for words in {lines!r}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        cli.main(words)
print(sorted({{"torch", "numpy", "transformers", "datasets", "pandas"}} & set(sys.modules)))
sys.modules["datasets"] = None
cli.main(["train", "--task", "rte", "--model", "m", "--output", {str(tmp_path / "run")!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    assert done.stdout == "[]\n", done.stderr
    messages = done.stderr.splitlines()
    for message, part in zip(
        messages, ("train", "--num-train-epochs", "['token-classification']", "'/nowhere.txt'",
                   "model: expected an existing folder", "with several", "config.json", LOADING,
                   "the package datasets"),
        strict=True,
    ):  # fmt: skip
        assert part in message


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["train", "--epochs", "3"], "--num-train-epochs"),
        (["train", "--per_device_eval_batch_size=8"], "--eval-batch-size"),
        (["train", "--output_dir", "runs/x"], "--output"),
        (["train", "--learning-rte", "1"], "--learning-rate"),
        (["ablate", "depth", "--step", "2"], "--steps"),
        (["train", "--method", "prefix-tuning"], "p-tuning-v2"),
        (["train", "--schedule", "constant with warmup"], "constant_with_warmup"),
        (["predcit"], "predict"),
    ],
)
def test_unknown_options_and_values_are_answered_by_those_that_were_meant(words, meant, capsys):
    assert f"did you mean {meant}" in fails_with_one_line(words, capsys)


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"ptv2-fast {ptv2_fast.__version__}\n"


# Completes the last of some words, as bash does at the key Tab.
TAB = """
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
entry=$(complete -p ptv2-fast)
$(sed 's/.*-F \\([^ ]*\\).*/\\1/' <<< "$entry") ptv2-fast "${@: -1}" "${@: -2:1}"
echo "${COMPREPLY[@]}"
"""


def test_a_shell_completes_commands_options_and_values(tmp_path, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as ended:
        cli.main(["--print-completion", "bash"])
    assert ended.value.code == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "train.csv").touch()
    for words, completed in {
        ("multi",): "multitask",
        ("train", "--num-v"): "--num-virtual-tokens",
        ("train", "--method", "p-tuning"): "p-tuning-v2 p-tuning-v1",
        ("search", "--task", "squ"): "squad squad_v2",
        ("ablate", "rep"): "reparam",
        ("train", "--recipe", "preset-qa-m"): "preset-qa-minilm",
        ("train", "--train-file", f"{tmp_path}/tr"): f"{tmp_path}/train.csv",
    }.items():
        done = subprocess.run(
            ["bash", "-c", TAB, "bash", tmp_path / "script", "ptv2-fast", *words],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout.split() == completed.split(), (words, done.stderr)


def test_completion_without_its_package_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    line = fails_with_one_line(["--print-completion", "zsh"], capsys)
    assert "needs shtab: pip install 'ptv2-fast[completion]'" in line
