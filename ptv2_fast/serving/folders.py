"""Folders of adapters that requests name: nothing outside the adapter root is read."""

from pathlib import Path


def find_adapter(root: Path, given: str) -> Path:
    """The folder that a request names, below the root or relative to it.

    Raises:
        ValueError: for one that is not there or lies elsewhere, also by links; and for one that
            holds a link to somewhere else.
    """
    root = root.resolve()
    if "\0" in given:
        raise ValueError("folder: expected a path, got one with a zero byte")
    folder = (root / given).resolve()
    if not folder.is_relative_to(root):
        raise ValueError("folder: expected one under the adapter root of this server")
    if not folder.is_dir():
        raise ValueError(f"folder: expected one that is there, got {given!r:.200}")
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise ValueError(
                f"folder: expected no links out of the adapter root, got {path.name!r:.200}"
            )
    return folder
