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

from ptv2_fast.tasks import DataOptions
from ptv2_fast.tasks.benchmarks import BENCHMARKS
from ptv2_fast.training import run_folder
from ptv2_fast.training.finished_runs import COLUMNS, Run, find_runs
from ptv2_fast.training.run_place import find_place

CARD = "README.md"
# What stays here: checkpoints of an unfinished run, texts of the data, marks and locks.
_LEFT_OUT = ["checkpoints/**", run_folder.MISTAKES, ".ptv2-fast*", "*.tmp"]
_PIPELINES = {"semantic-role-labeling": "token-classification"}


def write_card(folder: str | os.PathLike) -> Path:
    """Write README.md into the folder of a finished run; an old one is replaced.

    The front matter, which the hub reads, holds the base model, the task, the data set and every
    score; the text holds the command, the seed and the versions.

    Returns:
        The file.

    Raises:
        ValueError: for a folder without a finished run of one task, naming what is wrong.
    """
    folder = Path(folder)
    run = _find_run(folder)
    card = ModelCard(f"---\n{_front_matter(run).to_yaml()}\n---\n\n{_text(run)}")
    run_folder.write_text(folder / CARD, f"{card}")
    return folder / CARD


def push_to_hub(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload a run or an adapter to the hub; `ptv2_fast.load` opens what others download of it.

    A run that has no README.md gets its card first. In the config.json of the upload the paths of
    the data are their last parts; the pretrained model stays as it was given.

    Args:
        folder: of a finished run, or of an adapter.
        repo_id: "user/name"; created when missing.
        private: whether a repository that is created is; None = as the user's settings say.
        token: of the hub; None = the one that `hf auth login` or HF_TOKEN left.

    Returns:
        The address of the upload.

    Raises:
        ValueError: for a folder without them, or another name.
        OSError: when the hub cannot be reached or refuses.
    """
    folder = Path(folder)
    place = find_place(folder)
    if place.run == folder and not (folder / CARD).is_file():
        write_card(folder)
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
        ignore_patterns=[*_LEFT_OUT, *([run_folder.CONFIG] if place.run == folder else [])],
    )
    if place.run == folder:
        content = run_folder.read_json(folder / run_folder.CONFIG)
        shared = {k: _last_parts(v) if k in ("data", "tasks") else v for k, v in content.items()}
        api.upload_file(
            repo_id=repo_id,
            path_or_fileobj=json.dumps(shared, indent=2).encode(),
            path_in_repo=run_folder.CONFIG,
        )
    return str(done)


def _find_run(folder: Path) -> Run:
    runs, left_out = find_runs([folder])
    if len(runs) != 1 or runs[0].folder.resolve() != folder.resolve():
        why = f": {left_out[0].reason}" if left_out else f", of {len(runs)} runs"
        raise ValueError(f"run: expected the folder of a finished run, got {str(folder)!r}{why}")
    if runs[0].report.get("tasks"):
        raise ValueError(f"run: expected the run of one task, got {str(folder)!r} of several")
    return runs[0]


def _front_matter(run: Run) -> ModelCardData:
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
    base = result.model if _is_name(result.model) else None
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


def _text(run: Run) -> str:
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
    command = shlex.join(
        word if word.startswith("--") else _file_name(word) for word in shlex.split(run.command())
    )
    return f"""# {title}

{method} on {_file_name(result.model)}, trained by [ptv2-fast](https://pypi.org/project/ptv2-fast).

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
