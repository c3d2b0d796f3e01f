"""A run on the Hugging Face hub: its model card, written from the run's facts, and the upload."""

import json
import math
import os
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ptv2_fast.files import ADAPTER_CONFIG_NAMES, leads_out, read_json_object
from ptv2_fast.tasks import DataOptions
from ptv2_fast.tasks.benchmarks import BENCHMARKS
from ptv2_fast.training import run_folder
from ptv2_fast.training.finished_runs import COLUMNS, Run, find_runs
from ptv2_fast.training.run_lookup import locate

CARD = "README.md"
# What stays here: checkpoints of an unfinished run, texts of the data, marks and locks, and what
# Trainer leaves beside a checkpoint: pickles, and a record with names of this machine.
_LEFT_OUT = ["checkpoints/**", run_folder.MISTAKES, ".ptv2-fast*", "*.tmp", "*.bin", "*.pt",
             "*.pth", "*trainer_state.json"]  # fmt: skip
# The parts of JSON files that name files, by the files' names; labels may look like paths.
_PLACES_IN = {
    run_folder.CONFIG: ("data", "tasks", "model"),
    run_folder.REPORT: ("model", "started_from"),
    **dict.fromkeys(ADAPTER_CONFIG_NAMES, ("base_model",)),
}
_PIPELINES = {"semantic-role-labeling": "token-classification"}


def write_card(folder: str | os.PathLike, base_model: str | None = None) -> Path:
    """Write README.md into the folder of a finished run; an old one is replaced.

    The front matter, which the hub reads, holds the base model, the task, the data set and every
    score; the text holds the command, the seed and the versions.

    Args:
        folder: of the run.
        base_model: the name of its pretrained model; None = the one that the run was given, where
            that is no folder.

    Returns:
        The file.

    Raises:
        ValueError: for a folder without a finished run of one task, naming what is wrong.
    """
    folder = Path(folder)
    run = _find_run(folder)
    front = _front_matter(run, base_model).to_yaml()
    card = ModelCard(f"---\n{front}\n---\n\n{_text(run, base_model)}")
    run_folder.write_text(folder / CARD, f"{card}")
    return folder / CARD


def push_to_hub(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    base_model: str | None = None,
) -> str:
    """Upload a run or an adapter to the hub; `ptv2_fast.load` opens what others download of it.

    A run that has no README.md gets its card first. In the JSON files of the upload the paths of
    this machine are their last parts.

    Args:
        folder: of a finished run, or of an adapter.
        repo_id: "user/name"; created when missing.
        private: whether a repository that is created is; None = as the user's settings say.
        token: of the hub; None = the one that `hf auth login` or HF_TOKEN left.
        base_model: what the upload names as its pretrained model; None = the one that the run was
            given, which then may be no folder of this machine.

    Returns:
        The address of the upload.

    Raises:
        ValueError: for a folder without them, one with a link out of it, another name, or a
            pretrained model that nobody else has; then nothing is uploaded.
        OSError: when the hub cannot be reached or refuses.
    """
    folder = Path(folder)
    place = locate(folder)
    _check_links(folder)
    shared = _shared_files(folder, base_model)
    if place.run == folder and not (folder / CARD).is_file():
        write_card(folder, base_model)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"repo_id: expected a name of the hub, got {repo_id!r}: {error}"
        ) from error
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    done = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=f"Upload {folder.absolute().name} by ptv2-fast",
        ignore_patterns=[*_LEFT_OUT, *shared],
    )
    for name, content in shared.items():
        api.upload_file(
            repo_id=repo_id,
            path_or_fileobj=json.dumps(content, indent=2).encode(),
            path_in_repo=name,
        )
    return str(done)


def _check_links(folder: Path) -> None:
    """Check that an upload takes no files from elsewhere along."""
    for path in sorted(folder.rglob("*")):
        is_left_out = path.relative_to(folder).parts[0] == run_folder.CHECKPOINTS
        if path.is_symlink() and not is_left_out and leads_out(path, folder):
            raise ValueError(
                f"{path}: expected no links out of the folder, got one to {path.resolve()}"
            )


def _shared_files(folder: Path, base_model: str | None) -> dict[str, Any]:
    """The JSON files of a folder that name a pretrained model or data, as others may see them.

    Raises:
        ValueError: for a model that is a folder of this machine, where others have to load it.
    """
    names = (*_PLACES_IN, *(f"{run_folder.ADAPTER}/{name}" for name in ADAPTER_CONFIG_NAMES))
    # A fine-tuned model is whole, and read without the one that it was.
    is_whole = (folder / run_folder.MODEL).is_dir()
    shared = {}
    for name in names:
        if not (folder / name).is_file():
            continue
        content = read_json_object(folder / name)
        holder, key = _model_in(content)
        given = holder.get(key)
        is_here = isinstance(given, str) and (Path(given).is_absolute() or Path(given).is_dir())
        if is_here and base_model is None and not is_whole:
            raise ValueError(
                f"base_model: expected the name on the hub of the pretrained model, which "
                f"{folder / name} names as a folder of this machine, {given!r}, got None; without "
                "it nobody else can open the upload"
            )
        places = _PLACES_IN[name.rpartition("/")[2]]
        shared[name] = {k: _last_parts(v) if k in places else v for k, v in content.items()}
        if base_model is not None and given:
            holder, key = _model_in(shared[name])
            holder[key] = base_model
    return shared


def _model_in(content: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Where a file names its pretrained model: a run's config.json, its report, an adapter."""
    if isinstance(content.get("model"), dict):
        return content["model"], "model"
    return content, "model" if "model" in content else "base_model"


def _find_run(folder: Path) -> Run:
    runs, left_out = find_runs([folder])
    if len(runs) != 1 or runs[0].folder.resolve() != folder.resolve():
        why = f": {left_out[0].reason}" if left_out else f", of {len(runs)} runs"
        raise ValueError(f"run: expected the folder of a finished run, got {str(folder)!r}{why}")
    if runs[0].report.get("tasks"):
        raise ValueError(f"run: expected the run of one task, got {str(folder)!r} of several")
    return runs[0]


def _front_matter(run: Run, base_model: str | None) -> ModelCardData:
    (result,) = run.results
    task, method = result.task, str(run.report["method"])
    family = DataOptions(task=task).family
    pipeline = _PIPELINES.get(family, family)
    data_set, configuration = _data_set(run)
    scores = [
        EvalResult(
            task_type=pipeline,
            dataset_type=data_set or task,
            dataset_name=task,
            dataset_config=configuration,
            dataset_split=split,
            metric_type=name,
            metric_value=value,
        )
        for split, values in result.scores.items()
        for name, value in sorted(values.items(), key=lambda item: item[0] != result.metric)
        if math.isfinite(value)
    ]
    base = base_model or (result.model if _is_name(result.model) else None)
    relation = "finetune" if method == "fine-tuning" else "adapter"
    return ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        library_name="ptv2-fast",
        pipeline_tag=pipeline,
        tags=[method, "ptv2-fast", *(["prefix-tuning"] if method == "p-tuning-v2" else [])],
        datasets=[data_set] if data_set else None,
        metrics=[result.metric],
        model_name=run.folder.absolute().name,
        eval_results=scores or None,
    )


def _data_set(run: Run) -> tuple[str | None, str | None]:
    """Name and configuration of the run's data on the hub; None where it is not known there."""
    given = run.options.get("dataset")
    if given is not None:
        return (given, run.options.get("dataset_config")) if _is_name(given) else (None, None)
    benchmark = BENCHMARKS.get(run.report["task"])
    return benchmark.hub if benchmark and benchmark.hub else (None, None)


def _is_name(name: object) -> bool:
    """Whether it is a name of the hub, and no folder."""
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return False
    return not Path(str(name)).exists()


def _text(run: Run, base_model: str | None) -> str:
    (result,) = run.results
    report, title = run.report, run.folder.absolute().name
    method = COLUMNS.get(run.column, run.column)
    rows = [
        f"| {split} | {name} | {value:.4g} |"
        for split, values in result.scores.items()
        for name, value in values.items()
    ]
    labels = run_folder.read_run_config(run.folder)[1]["labels"]
    facts: dict[str, Any] = {
        "task": result.task,
        "data": _file_name(run.options.get("dataset") or run.options.get("train_file")),
        "examples": ", ".join(f"{n} {split}" for split, n in report.get("examples", {}).items()),
        "labels": ", ".join(labels) if len(labels) <= 30 else f"{len(labels)} labels",
        "seed": run.seed,
        "trained weights": f"{report.get('trainable_parameters', 0):,} of "
        f"{report.get('total_parameters', 0):,}",
        "steps": report.get("steps"),
        "versions": ", ".join(f"{n} {v}" for n, v in report.get("versions", {}).items()),
    }
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items() if value)
    base = base_model or _file_name(result.model)
    command = shlex.join(
        base if word == result.model else word if word.startswith("--") else _file_name(word)
        for word in shlex.split(run.command())
    )
    return f"""# {title}

{method} on {base}, trained by [ptv2-fast](https://pypi.org/project/ptv2-fast).

```python
import ptv2_fast

model, tokenizer, labels = ptv2_fast.load(folder)  # downloaded, as huggingface_hub does
```

{listed}

| split | metric | value |
| --- | --- | --- |
{chr(10).join(rows)}

Selected and reported by {report.get("metric_title") or result.metric}.

```
{command}
```
"""


def _last_parts(content: Any) -> Any:
    """JSON with each path of this machine reduced to its last part."""
    if isinstance(content, dict):
        return {name: _last_parts(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_last_parts(value) for value in content]
    return _file_name(content)


def _file_name(word: Any) -> Any:
    """The last part of a path of this machine; anything else as it is."""
    return Path(word).name if isinstance(word, str) and Path(word).is_absolute() else word
