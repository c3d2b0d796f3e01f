"""Folders to write into: which are ours, who writes in them, and what a kill leaves there.

A folder that a command of ours began holds a file MARKER, which says what it is of. Nothing else
is ever deleted. The file LOCK is locked while a process writes into the folder.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import filelock

from ptv2_fast.files import plain_name, read_json

MARKER = ".ptv2-fast"
LOCK = ".ptv2-fast.lock"
_KIND = "kind"
_FIRST = ("config.json.", "sweep.json.")  # of a kill at the very beginning
_LEFTOVER = re.compile(r".+\.\d+\.tmp")


class OutputTakenError(ValueError):
    """Since a folder was checked somebody else has begun to write into it."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name that then replaces the old one."""
    with _replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def new_text(path: Path) -> Iterator[IO[str]]:
    """A text file to write into, which gets its name when all is written."""
    with _replacing(path) as temporary, temporary.open("x", encoding="utf-8") as file:
        yield file


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file of a temporary name, which replaces the one of this name at the end."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether a file is one that a kill kept from getting its name."""
    return _LEFTOVER.fullmatch(path.name) is not None


def delete_leftovers(paths: Iterable[Path]) -> None:
    """Delete those files that a kill kept from getting their names."""
    for path in filter(is_leftover, paths):
        _delete(path)


def read_mark(folder: Path) -> dict[str, Any] | None:
    """What MARKER says about a folder; None when the folder is not ours."""
    path = folder / MARKER
    try:
        content = read_json(path) if path.is_file() else None
    except ValueError:
        return None
    return content if isinstance(content, dict) and _KIND in content else None


def write_mark(folder: Path, kind: str, **more: Any) -> None:
    """Say that a folder is ours, and what it is of."""
    text = json.dumps({_KIND: kind, **more}, indent=2) + "\n"
    write_bytes(folder / MARKER, text.encode())


def contents(folder: Path) -> list[Path]:
    """What is in a folder beside the files of this module, and what a kill left of the first."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if not _is_nothing(path)]


def _is_nothing(path: Path) -> bool:
    return path.name.startswith(MARKER) or (is_leftover(path) and path.name.startswith(_FIRST))


def check_place(folder: Path, what: str = "output") -> None:
    """Raise a ValueError for a file, or a folder that cannot be written; `what` is the argument."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise ValueError(f"{what}: expected a folder, got the file {str(nearest)!r}")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"{what}: expected a folder that can be written, got {str(nearest)!r}")


def check_replaceable(folder: Path, kind: str) -> set[str]:
    """The names of the files that a former `replace_files` left in a folder.

    Raises:
        ValueError: for a file, a folder that cannot be written or that holds something else.
    """
    check_place(folder)
    mark = read_mark(folder)
    if mark is None and not contents(folder):
        return set()
    names = (mark or {}).get("files")
    if mark is None or mark[_KIND] != kind or not isinstance(names, list):
        raise ValueError(
            f"output: expected a new folder or one of a former {kind} with {MARKER}, got "
            f"{str(folder)!r}"
        )
    return {plain_name(name, f"{folder / MARKER}: files") for name in names}


def replace_files(folder: Path, kind: str, files: dict[str, bytes]) -> None:
    """Write files in the place of those that a former call left in a folder; others stay.

    Raises:
        ValueError: as `check_replaceable`; for a file of that name which is not ours.
    """
    before = check_replaceable(folder, kind)
    foreign = [name for name in files if name not in before and (folder / name).exists()]
    if foreign:
        raise ValueError(f"output: expected no files of others by our names, got {foreign}")
    folder.mkdir(parents=True, exist_ok=True)
    # Known as ours before they are there, and until they are gone.
    write_mark(folder, kind, files=sorted({*before, *files}))
    for name in before - files.keys():
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        write_bytes(folder / plain_name(name, "files"), content)
    write_mark(folder, kind, files=sorted(files))


def is_first() -> bool:
    """Whether this is the one of several processes that writes."""
    return not _is_one_of_several() or _distributed().get_rank() == 0


def wait_for_all() -> None:
    """Return when every process of this training has come here."""
    if _is_one_of_several():
        _distributed().barrier()


def _is_one_of_several() -> bool:
    return _distributed().is_available() and _distributed().is_initialized()


def _distributed() -> Any:
    """Imported late: commands that do not train look at folders too."""
    import torch.distributed

    return torch.distributed


@contextlib.contextmanager
def locked(folder: Path, kind: str, overwrite: bool, check: Callable[[], object]) -> Iterator[None]:
    """Within the context this process, and those of its training, write into the folder.

    The folder is created, or emptied, and cleared of what a kill left; the first of several
    processes does that while the others wait.

    Args:
        folder: where.
        kind: what the folder is of.
        overwrite: empty it first.
        check: raises a ValueError when the folder may not be used; called once nobody else writes.

    Raises:
        OutputTakenError: when another process writes there, and when `check` raises.
    """
    if not is_first():
        wait_for_all()
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        message = f"output: another process is writing into {str(folder)!r}"
        raise OutputTakenError(message) from None
    try:
        try:
            check()
        except ValueError as error:
            raise OutputTakenError(error) from error
        before = contents(folder)
        if overwrite:
            for path in before:
                _delete(path)
        if overwrite or not before:  # what was begun by an older version is not ours to delete
            write_mark(folder, kind)
        # The runs of a sweep may be somebody else's at the moment; they clear their own folders.
        delete_leftovers(folder.rglob("*.tmp") if kind == "run" else folder.glob("*.tmp"))
        wait_for_all()
        yield
    finally:
        lock.release()


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
