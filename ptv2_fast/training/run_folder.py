"""The folder of a run: what is where, and writing that a crash cannot leave half done.

config.json, metrics.jsonl, mistakes.json and report.json; adapter/ (p-tuning-v2), model/
(fine-tuning) or trained.safetensors (the other methods); tokenizer/; checkpoints/ until the run is
finished. A multi-task run keeps in tasks/NAME/ a folder of this form for each of its tasks, instead
of what was trained.
"""

import contextlib
import csv
import functools
import io
import json
import math
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ptv2_fast.files import NO_MODEL, plain_name, read_json_object, without_word
from ptv2_fast.training import output
from ptv2_fast.training.multitask.config import MultiTaskConfig
from ptv2_fast.training.option_files import options_of_run
from ptv2_fast.training.options import NEUTRAL_OPTIONS, RunConfig

Config = RunConfig | MultiTaskConfig

CONFIG = "config.json"
METRICS = "metrics.jsonl"
REPORT = "report.json"
MISTAKES = "mistakes.json"  # by split, as `mistakes` in tasks/comparison.py describes it
ADAPTER = "adapter"
MODEL = "model"
TRAINED = "trained.safetensors"
TOKENIZER = "tokenizer"
CHECKPOINTS = "checkpoints"
TASKS = "tasks"
# By kind of folder, the file that says what was begun in it.
MARKS = {"run": CONFIG, "sweep": "sweep.json", "search": "study.db"}
# What report.json may hold, beside what names the run.
_TABLES = (
    "machine", "versions", "examples", "drawn_from", "truncated_examples", "remarks", "tasks",
    "baselines", "started_from",
)  # fmt: skip
COSTS = (
    "trainable_parameters", "total_parameters", "saved_bytes", "steps", "step_seconds",
    "train_seconds", "kept_bytes", "peak_memory_bytes",
)  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name that then replaces the old one."""
    output.write_bytes(path, text.encode())


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
    return read_json_object(path)


def check_output(folder: Path, resume: bool, overwrite: bool, kind: str = "run") -> None:
    """Check that a command may use this folder; nothing is changed.

    Args:
        folder: of the output.
        resume, overwrite: go on with what was begun there, or delete it.
        kind: what the command leaves, a key of `MARKS`.

    Raises:
        ValueError: for a file, a folder that cannot be written, one with content that is not ours
            or of another kind, and one that was begun unless `resume` or `overwrite`.
    """
    output.check_place(folder)
    if resume and overwrite:
        raise ValueError("resume: expected one of resume and overwrite, got both")
    if not output.contents(folder):
        return
    mark = output.read_mark(folder)
    is_ours = _begun_before_marks(folder, kind) if mark is None else mark["kind"] == kind
    if not is_ours:
        other = "" if mark is None else f"a {mark['kind']!r:.20} folder "
        raise ValueError(
            f"output: expected a new or empty folder, or a {kind} folder with {MARKS[kind]}, got "
            f"{other}{str(folder)!r}"
        )
    if overwrite and mark is None:
        raise ValueError(
            f"output: expected a folder with {output.MARKER} to delete, got {str(folder)!r}, which "
            "this version did not make; delete it yourself if nothing in it is needed"
        )
    if not resume and not overwrite:
        raise ValueError(
            f"output: expected a new or empty folder, got {str(folder)!r}; --resume goes on with "
            f"the {kind} in it, --overwrite deletes it"
        )


def _begun_before_marks(folder: Path, kind: str) -> bool:
    """Whether a version that left no marker may have begun what is in a folder."""
    file = folder / MARKS[kind]
    if not file.is_file():
        return False
    # The folder of a pretrained model has a config.json too.
    return kind != "run" or "found" in read_json(file)


def check_run(
    folder: Path,
    config: Config,
    metadata: dict[str, Any] | None = None,
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Check that a run may use this folder: at once, when its data is read, when it begins.

    Args:
        folder: of the output.
        config: of one task or of several.
        metadata: labels, max_length and the like; None = not known yet.
        resume, overwrite: as for `check_output`.

    Raises:
        ValueError: as `check_output`; when the run to go on with is another, naming what differs.
    """
    check_output(folder, resume, overwrite)
    if resume:
        check_same_run(folder, config, metadata)


def check_same_run(folder: Path, config: Config, metadata: dict[str, Any] | None = None) -> None:
    """Check that the run in the folder was started with these options and has this metadata.

    Without a config.json there is nothing to compare with.

    Raises:
        ValueError: naming what differs.
    """
    if not (folder / CONFIG).is_file():
        return
    old_config, old_metadata = read_run_config(folder, type(config))
    before = old_config.flat() | old_metadata
    now = config.flat() | (old_metadata if metadata is None else metadata)
    check_same("resume", "run", before, now, NEUTRAL_OPTIONS)


def check_same(
    argument: str, kind: str, before: dict[str, Any], now: dict[str, Any], ignored: Collection[str]
) -> None:
    """Check that what was begun in a folder is what a command asks for now.

    Args:
        argument: what the message names.
        kind: of what was begun: run, search.
        before, now: flat options, those of one of several data sets behind its name and a point.
        ignored: options that may differ.

    Raises:
        ValueError: naming what differs.
    """
    differences = [
        f"{name} {before.get(name)!r} against {now.get(name)!r}"
        for name in {**now, **before}
        if now.get(name) != before.get(name) and name.rpartition(".")[2] not in ignored
    ]
    if differences:
        raise ValueError(
            f"{argument}: expected the {kind} that was started here; that {kind} against now: "
            + ", ".join(differences)
        )


def read_run_config(folder: Path, kind: type[Config] = RunConfig) -> tuple[Any, dict[str, Any]]:
    """The options of a run, and what else its start made known (labels, max_length).

    Args:
        folder: of the run.
        kind: of its configuration.

    Raises:
        ValueError: when the folder holds no run, one that cannot be read, or one of the other kind.
    """
    content = without_word(read_json(folder / CONFIG))
    if "tasks" in content and kind is RunConfig:
        names = [str(part_folder(folder, name)) for name in task_names(content, folder)]
        raise ValueError(
            f"run: expected the run of one task, got a multi-task run; its tasks are in {names}"
        )
    metadata = content.get("found")
    if not isinstance(metadata, dict) or not {"labels", "max_length"} <= set(metadata):
        raise ValueError(f"{folder / CONFIG}: expected the key 'found' with labels and max_length")
    if kind is RunConfig:
        _check_metadata(metadata, folder / CONFIG)
    try:
        return kind.from_dict(options_of_run(content)), metadata
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error


def _check_metadata(metadata: dict[str, Any], place: Path) -> None:
    labels, length = metadata["labels"], metadata["max_length"]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{place}: found.labels: expected a list of text, got {labels!r:.100}")
    if type(length) is not int or not 0 < length < 2**31:
        raise ValueError(f"{place}: found.max_length: expected an integer > 0, got {length!r:.40}")


def task_names(content: dict[str, Any], folder: Path) -> list[str]:
    """The names of the data sets in a multi-task run's config.json.

    Raises:
        ValueError: when they are not there, or no plain names.
    """
    tables = content["tasks"]
    place = f"{folder / CONFIG}: tasks"
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{place}: expected a list of tables, got {tables!r:.100}")
    return [plain_name(table.get("name"), place) for table in tables]


def part_folder(folder: Path, name: str) -> Path:
    """Where a multi-task run keeps one of its tasks in the form of a run of its own.

    Raises:
        ValueError: for a name that is a path.
    """
    return folder / TASKS / plain_name(name, "tasks")


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a finished run.

    Raises:
        ValueError: when there is none, or it holds something else than a report does.
    """
    report = read_json(folder / REPORT)
    names = ("task", "method", "model", "metrics")
    missing = [name for name in names if report.get(name) is None]
    if missing:
        raise ValueError(f"{REPORT}: expected the keys {missing}")
    metrics = report["metrics"]
    splits = metrics.values() if isinstance(metrics, dict) else [None]
    for scores in splits:
        values = scores.values() if isinstance(scores, dict) else [None]
        if not all(map(is_number, values)):
            raise ValueError(f"{REPORT}: expected scores by split in 'metrics', got {metrics!r}")
    texts = dict.fromkeys(("task", "method", "model"), ("text", lambda v: isinstance(v, str)))
    numbers = dict.fromkeys(COSTS, ("a number", is_number))
    tables = dict.fromkeys(_TABLES, ("a table", lambda v: not v or isinstance(v, dict)))
    for name, (kind, fits) in (texts | numbers | tables).items():
        if report.get(name) is not None and not fits(report[name]):
            raise ValueError(f"{REPORT}: expected {kind} in {name!r}, got {report[name]!r:.100}")
    for table in ("remarks", "baselines"):
        for name, part in (report.get(table) or {}).items():
            if not isinstance(part, dict):
                raise ValueError(f"{REPORT}: expected a table in {table} of {name!r}, got {part!r}")
    for name, part in (report.get("tasks") or {}).items():
        if not isinstance(part, dict) or not {"task", "metric"} <= set(part):
            raise ValueError(f"{REPORT}: expected task and metric of {name!r}, got {part!r}")
    return report


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a number that a float can hold, NaN included."""
    if type(value) is int:
        return abs(value) < 2**1000
    return isinstance(value, float | bool) and not (isinstance(value, float) and math.isinf(value))


@contextlib.contextmanager
def locked_run(
    folder: Path, config: Config, metadata: dict[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[None]:
    """Within the context this process alone trains a run in the folder, whose config.json is there.

    Raises:
        ValueError: as `check_run`, since others may have used the folder after it was checked; when
            another process writes there.
    """
    check = functools.partial(
        check_run, folder, config, metadata, resume=resume, overwrite=overwrite
    )
    with output.locked(folder, "run", overwrite, check):
        if output.is_first():
            write_config(folder, config, metadata)
        yield


def write_config(folder: Path, config: Config, metadata: dict[str, Any]) -> None:
    """Write config.json, in a folder that is made when missing."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, {**NO_MODEL, **config.to_dict(), "found": metadata})


def finish(folder: Path, report: dict[str, Any], mistakes: dict[str, Any]) -> None:
    """Write mistakes.json and report.json, and delete the checkpoints: with fine-tuning they would
    fill a disk."""
    write_json(folder / MISTAKES, mistakes)
    write_json(folder / REPORT, report)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def saved_bytes(folder: Path) -> int:
    """Size of what was trained: the adapter, the model or the tensors of a run."""
    files = [folder / TRAINED]
    for name in (ADAPTER, MODEL):
        files += (folder / name).rglob("*")
    return sum(f.stat().st_size for f in files if f.is_file() and not output.is_leftover(f))
