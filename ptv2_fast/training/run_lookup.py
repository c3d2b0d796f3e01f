"""Which run a folder is of: a run's own, its adapter's or a checkpoint's; or why it is of none."""

from pathlib import Path
from typing import NamedTuple

from ptv2_fast.files import find_description, read_json
from ptv2_fast.training import run_folder

_NAMED = 5  # of several runs in a message


class Location(NamedTuple):
    """Where a trained model is.

    Attributes:
        run: the folder of its run; None of an adapter alone.
        weights: the checkpoint, or the adapter alone; None = what the run ended with.
    """

    run: Path | None
    weights: Path | None


def locate(folder: Path) -> Location:
    """What to open in a folder.

    Raises:
        ValueError: for a folder of several runs, naming them, and one with nothing to open.
    """
    above = folder.absolute().parents
    if not folder.is_dir():
        raise _no_run(folder)
    if is_run(folder):
        return Location(folder, None)
    name = folder.absolute().name
    if name in (run_folder.ADAPTER, run_folder.MODEL) and is_run(above[0]):
        return Location(above[0], None)
    if above[0].name == run_folder.CHECKPOINTS and folder.is_dir() and is_run(above[1]):
        return Location(above[1], folder)
    if find_description(folder) is not None:
        return Location(None, folder)
    runs = [path for path in sorted(folder.glob("*")) if is_run(path)]
    if runs:
        # A search keeps what its best trial trained.
        runs = [*filter(_holds_trained, runs)] or runs
        more = f" and {len(runs) - _NAMED} others" if len(runs) > _NAMED else ""
        raise ValueError(
            f"run: expected the folder of one run, got {str(folder)!r} with several; name one of "
            f"{[*map(str, runs[:_NAMED])]}{more}"
        )
    other = (folder / run_folder.CONFIG).is_file()
    raise _no_run(folder, f", whose {run_folder.CONFIG} is not that of a run" if other else "")


def _no_run(folder: Path, why: str = "") -> ValueError:
    return ValueError(
        f"run: expected a run folder with {run_folder.CONFIG}, got {str(folder)!r}{why}"
    )


def find_run(folder: Path) -> tuple[Path, Path | None]:
    """The folder of a run, and that of its checkpoint where it is one that is named.

    Raises:
        ValueError: as `locate`, and for an adapter alone.
    """
    run, weights = locate(folder)
    if run is None:
        raise ValueError(
            f"run: expected the folder of a run, got an adapter alone, {str(folder)!r}, which does "
            "not say how its task reads data; ptv2_fast.load opens it"
        )
    return run, weights


def is_run(folder: Path) -> bool:
    """Whether a run was begun in a folder, or something damaged looks so."""
    file = folder / run_folder.CONFIG
    try:
        content = read_json(file) if file.is_file() else {}
    except ValueError:
        return True
    return not isinstance(content, dict) or "found" in content


def _holds_trained(run: Path) -> bool:
    names = (run_folder.ADAPTER, run_folder.MODEL, run_folder.TRAINED)
    return any((run / name).exists() for name in names)
