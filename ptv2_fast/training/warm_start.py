"""Training that starts from the prefix of an earlier run, as after multi-task training."""

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ptv2_fast.adapters import load_adapter, load_prefix, read_config
from ptv2_fast.adapters.loading import MATCHED_FIELDS
from ptv2_fast.encoders.adapter_files import CONFIG_NAME, read_description
from ptv2_fast.files import find_description
from ptv2_fast.tasks import DataOptions
from ptv2_fast.training import run_folder
from ptv2_fast.training.options import ModelOptions

_SOURCE = ("train_file", "dataset", "dataset_config", "data_dir")


@dataclasses.dataclass(frozen=True)
class Start:
    """An adapter that training may start from.

    Attributes:
        adapter: its folder.
        data: of the run that made it; None = not known.
        trained_with: names of the data sets of a multi-task run that made it.
    """

    adapter: Path
    data: DataOptions | None = None
    trained_with: list[str] | None = None


def find_starts(options: ModelOptions) -> list[Start]:
    """The adapters in the folder that the option start_from names; several in a multi-task run's.

    Raises:
        ValueError: when the folder is no adapter and no finished run of the method p-tuning-v2.
    """
    if options.start_from is None:
        return []
    folder = Path(options.start_from)
    if find_description(folder) is not None:
        return [Start(folder)]
    if not (folder / run_folder.CONFIG).is_file():
        raise ValueError(
            f"start_from: expected the folder of a run or an adapter, got {str(folder)!r}"
        )
    content = run_folder.read_json(folder / run_folder.CONFIG)
    if "tasks" not in content:
        return [_start_of_run(folder)]
    names = run_folder.task_names(content, folder)
    return [_start_of_run(run_folder.part_folder(folder, name)) for name in names]


def options_of_start(options: ModelOptions) -> dict[str, Any]:
    """The prefix of the adapter that start_from names, and what trained beside it, as options.

    Raises:
        ValueError: as `find_starts`, and for a description that is damaged.
    """
    starts = find_starts(options)
    if not starts:
        return {}
    found = read_config(read_description(starts[0].adapter), starts[0].adapter)
    targets, layers = found.low_rank_targets, found.layers
    names = [name for name in MATCHED_FIELDS if name in ModelOptions.model_fields]
    return {name: getattr(found, name) for name in names} | {
        "low_rank_targets": None if targets is None else ",".join(targets),
        "depth": None if layers is None else ",".join(str(layer + 1) for layer in layers),
    }


def _start_of_run(folder: Path) -> Start:
    adapter = folder / run_folder.ADAPTER
    if find_description(adapter) is None:
        raise ValueError(
            f"start_from: expected a finished run of p-tuning-v2, got no {adapter / CONFIG_NAME}"
        )
    config, metadata = run_folder.read_run_config(folder)
    return Start(adapter, config.data, metadata.get("trained_with"))


def warm_start(
    model: PreTrainedModel, options: ModelOptions, data: DataOptions | None
) -> dict[str, Any] | None:
    """Give an attached model the prefix of an earlier run, and its head where that fits.

    The head is taken when it was trained for the same task and the same labels; a run of several
    such data sets is asked for the one with the same files.

    Args:
        model: attached as the options say; the labels are those of its configuration.
        options: of the run.
        data: of the run; None = no head is taken.

    Returns:
        What config.json and report.json say about it: `folder`, `trained_with` (the data sets of a
        multi-task run, else None) and `head` (whether it was taken); None without start_from.

    Raises:
        ValueError: naming what differs between the prefixes or the encoders.
    """
    starts = find_starts(options)
    if not starts:
        return None
    same = [] if data is None else [one for one in starts if _fits(one, model, data)]
    if len(same) > 1:
        assert data is not None
        same = [one for one in same if _same_files(one, data)]
    if len(same) == 1:
        load_adapter(model, same[0].adapter)
    else:
        load_prefix(model, starts[0].adapter)
    return {
        "folder": options.start_from,
        "trained_with": starts[0].trained_with,
        "head": len(same) == 1,
    }


def _fits(start: Start, model: PreTrainedModel, data: DataOptions) -> bool:
    """Whether an adapter's head is one for the labels of the model and the task of the data."""
    description = read_description(start.adapter)
    labels = {str(number): label for number, label in (model.config.id2label or {}).items()}
    return (
        description.get("model_class") == type(model).__name__
        and description.get("id2label") == labels
        and (start.data is None or start.data.task == data.task)
    )


def _same_files(start: Start, data: DataOptions) -> bool:
    return start.data is not None and all(
        getattr(start.data, name) == getattr(data, name) for name in _SOURCE
    )
