"""Checkpoints to go on from: whole ones alone, and a word about the others."""

import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ptv2_fast.files import read_json_object

_NAME = re.compile(r"checkpoint-(\d{1,18})")
_OLD_NAMES = {"gamma": "weight", "beta": "bias"}


def last_checkpoint(
    folder: Path, processes: int = 1, needs_best: bool = False, more: Sequence[str] = ()
) -> Path | None:
    """The newest whole checkpoint; warns about each newer one that is damaged.

    Whole is one from which training goes on as if it had not been interrupted: weights, optimizer,
    schedule and random state can be read, and the best checkpoint so far too.

    Args:
        folder: of the checkpoints.
        processes: that train.
        needs_best: the run ends with its best checkpoint.
        more: names of files of weights that every checkpoint has beside the model's.

    Returns:
        Its folder; None when there is none, and training begins at its first step.
    """
    by_step = {int(match[1]): path for path in folder.glob("*") if (match := _match(path))}
    for step in sorted(by_step, reverse=True):
        try:
            _check(by_step[step], step, processes, needs_best, more)
        except (OSError, ValueError) as error:
            warnings.warn(
                f"resume: {by_step[step]} is damaged ({error}); going on from the one before, or "
                "from the beginning when there is none",
                stacklevel=2,
            )
            continue
        return by_step[step]
    return None


def check_best(checkpoint: Path) -> None:
    """Check the checkpoint with which a run is about to end.

    Raises:
        OSError: when it is gone or damaged; a resumed run goes on from an older one.
    """
    try:
        _check_weights(checkpoint)
    except ValueError as error:
        raise OSError(f"the best checkpoint of the run is gone or damaged: {error}") from error


@torch.no_grad()
def load_old_norms(model: nn.Module, checkpoint: Path) -> None:
    """Load the norms that some versions of transformers write as gamma and beta.

    Their Trainer reads a checkpoint by the names that modules have, and so leaves these out.
    """
    parameters = dict(model.named_parameters())
    for file in checkpoint.glob("model*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                stem, _, last = name.rpartition(".")
                parameter = parameters.get(f"{stem}.{_OLD_NAMES.get(last)}")
                if parameter is not None and name not in parameters:
                    parameter.copy_(tensors.get_tensor(name))


def _match(path: Path) -> re.Match[str] | None:
    return _NAME.fullmatch(path.name) if path.is_dir() else None


def _check(
    checkpoint: Path, step: int, processes: int, needs_best: bool, more: Sequence[str]
) -> None:
    """Raise an OSError or a ValueError unless everything in it can be read."""
    state = read_json_object(checkpoint / "trainer_state.json")
    if state.get("global_step") != step:
        raise ValueError(f"its state is that of step {state.get('global_step')!r:.20}")
    numbers = [f"_{number}" for number in range(processes)] if processes > 1 else [""]
    for name in ("optimizer.pt", "scheduler.pt", *(f"rng_state{n}.pth" for n in numbers)):
        _check_archive(checkpoint / name)
    _check_weights(checkpoint, more)
    best = state.get("best_global_step")
    if needs_best and best is not None:
        if type(best) is not int:
            raise ValueError(f"its best step is {best!r:.20}")
        _check_weights(checkpoint.with_name(f"checkpoint-{best}"), more)


def _check_archive(path: Path) -> None:
    """Of a file of torch.save: it is there, and each part has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path.name}: {error}") from error
    if bad is not None:
        raise ValueError(f"{path.name}: {bad} is corrupt")


def _check_weights(checkpoint: Path, more: Sequence[str] = ()) -> None:
    files = sorted(checkpoint.glob("*.safetensors"))
    missing = set(more) - {file.name for file in files}
    if len(files) == len(more) or missing:
        raise ValueError(f"{checkpoint.name} has no weights {' '.join(sorted(missing))}".strip())
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{checkpoint.name}/{file.name}: {error}") from error
