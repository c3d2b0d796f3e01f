"""Commands on tiny data: a run that has trained, and those that must fail."""

from pathlib import Path

from ptv2_fast import cli
from tests.tiny_run import save_tiny_model, write_conll, write_reviews

LOADING = "loading torch and transformers ..."


def save_tiny(folder: Path) -> dict[str, str]:
    """A model and data in a folder, by what they are."""
    return {
        "model": save_tiny_model(folder / "model"),
        "train": write_conll(folder / "train.txt", 24),
        "dev": write_conll(folder / "dev.txt", 8),
        "train_csv": write_reviews(folder / "train.csv", 24),
        "dev_csv": write_reviews(folder / "dev.csv", 8),
    }


def train_arguments(tiny, output, *more: str) -> list[str]:
    return [
        "train", "--task", "token-classification", "--method", "p-tuning-v2",
        "--model", tiny["model"], "--train-file", tiny["train"], "--validation-file", tiny["dev"],
        "--num_virtual_tokens", "4", "--init", "tokens", "--learning-rate", "0.1",
        "--head-learning-rate", "0.03", "--batch-size", "4", "--dropout", "0",
        "--no-progress", "--output", str(output), *more,
    ]  # fmt: skip


def train_tiny(tiny: dict[str, str], output: Path) -> Path:
    """A run that has learnt the data; returns its folder."""
    assert cli.main(train_arguments(tiny, output, "--num-train-epochs", "8")) == 0
    return output


def fails_with_one_line(arguments: list[str], capsys) -> str:
    """The line on stderr of a command that must end with exit code 2."""
    try:
        code = cli.main(arguments)
    except SystemExit as error:  # argparse
        code = error.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err
