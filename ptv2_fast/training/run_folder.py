"""The folder of a run: what is where, and writing that a crash cannot leave half done.

config.json, metrics.jsonl and report.json; adapter/ (p-tuning-v2), model/ (fine-tuning) or
trained.safetensors (the other methods); tokenizer/; checkpoints/ until the run is finished. A
multi-task run keeps in tasks/NAME/ a folder of this form for each of its tasks, instead of what was
trained.
"""

import csv
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

from ptv2_fast.training.options import NEUTRAL_OPTIONS, RunConfig

CONFIG = "config.json"
METRICS = "metrics.jsonl"
REPORT = "report.json"
ADAPTER = "adapter"
MODEL = "model"
TRAINED = "trained.safetensors"
TOKENIZER = "tokenizer"
CHECKPOINTS = "checkpoints"
TASKS = "tasks"


class Config(Protocol):
    """The configuration of a run of one task or of several."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Any:
        """From option values."""

    def to_dict(self) -> dict[str, Any]:
        """The tables of options, JSON-ready."""

    def flat(self) -> dict[str, Any]:
        """All options in one table, JSON-ready."""


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name that then replaces the old one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON the same way."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table the same way; what a row lacks is left empty."""
    table = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(table, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a run.

    Raises:
        ValueError: when there is no such file or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"run: expected a run folder with {path.name}, got {str(path.parent)!r}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content


def check_output(folder: Path, resume: bool, overwrite: bool, marker: str = CONFIG) -> None:
    """Check that a run, or what else leaves the file `marker`, may use this folder.

    Nothing is changed.

    Raises:
        ValueError: for a file, a folder that cannot be written, one with content that is no run,
            and for a run unless `resume` or `overwrite`.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise ValueError(f"output: expected a folder, got the file {str(nearest)!r}")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"output: expected a folder that can be written, got {str(nearest)!r}")
    if resume and overwrite:
        raise ValueError("resume: expected one of resume and overwrite, got both")
    if not folder.exists() or not any(folder.iterdir()):
        return
    is_run = (folder / marker).is_file()
    if is_run and marker == CONFIG:  # the folder of a pretrained model has a file of this name
        is_run = "found" in read_json(folder / marker)
    if not is_run:
        raise ValueError(
            f"output: expected a new or empty folder, or a run folder with {marker}, got "
            f"{str(folder)!r}"
        )
    if not resume and not overwrite:
        raise ValueError(
            f"output: expected a new or empty folder, got {str(folder)!r}; --resume goes on with "
            "the run in it, --overwrite deletes it"
        )


def check_same_run(folder: Path, config: Config, found: dict[str, Any] | None = None) -> None:
    """Check that the run in the folder was started with these options, and found the same.

    Args:
        folder: without a config.json there is nothing to compare with.
        config: of one task or of several.
        found: labels, max_length and the like; None = not known yet.

    Raises:
        ValueError: naming what differs.
    """
    if not (folder / CONFIG).is_file():
        return
    old_config, old_found = read_run_config(folder, type(config))
    before = old_config.flat() | old_found
    now = config.flat() | (old_found if found is None else found)
    differences = [
        f"{name} {before.get(name)!r} against {now.get(name)!r}"
        for name in {**now, **before}
        if now.get(name) != before.get(name) and name.rpartition(".")[2] not in NEUTRAL_OPTIONS
    ]
    if differences:
        raise ValueError(
            "resume: expected the run that was started here; that run against now: "
            + ", ".join(differences)
        )


def read_run_config(folder: Path, kind: type[Config] = RunConfig) -> tuple[Any, dict[str, Any]]:
    """The options of a run, and the facts found at its start (labels, max_length).

    Args:
        folder: of the run.
        kind: RunConfig, or the configuration of a multi-task run.

    Raises:
        ValueError: when the folder holds no run, one that cannot be read, or one of the other kind.
    """
    content = read_json(folder / CONFIG)
    if "tasks" in content and kind is RunConfig:
        names = [str(single_folder(folder, task["name"])) for task in content["tasks"]]
        raise ValueError(
            f"run: expected the run of one task, got a multi-task run; its tasks are in {names}"
        )
    facts = content.get("found")
    if not isinstance(facts, dict) or not {"labels", "max_length"} <= set(facts):
        raise ValueError(f"{folder / CONFIG}: expected the key 'found' with labels and max_length")
    options = {name: value for name, value in content.items() if name != "found"}
    return kind.from_dict(options), facts


def single_folder(folder: Path, name: str) -> Path:
    """Where a multi-task run keeps one of its tasks in the form of a run of its own."""
    return folder / TASKS / name


def start(folder: Path, config: Config, found: dict[str, Any], overwrite: bool) -> None:
    """Create the folder, or empty an old run's, and write config.json."""
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, {**config.to_dict(), "found": found})


def finish(folder: Path, report: dict[str, Any]) -> None:
    """Write report.json, and delete the checkpoints: with fine-tuning they would fill a disk."""
    write_json(folder / REPORT, report)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; one that a crash cut short is passed over.

    Trainer writes trainer_state.json last, so a checkpoint where it can be read is whole.
    """
    checkpoints = (folder / CHECKPOINTS).glob("checkpoint-*")
    for checkpoint in sorted(checkpoints, key=lambda p: int(p.name.split("-")[1]), reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return checkpoint
    return None


def saved_bytes(folder: Path) -> int:
    """Size of what was trained: the adapter, the model or the tensors of a run."""
    files = [folder / TRAINED]
    for name in (ADAPTER, MODEL):
        files += (folder / name).rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
