"""Files that others may have written: JSON that is no trap, names that stay in their folder."""

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import Any

# What a config.json of ours holds beside its own: transformers takes the file for a model's, does
# not know this type, and says so.
NO_MODEL = {
    "model_type": "ptv2-fast, which transformers does not open by itself: call "
    "ptv2_fast.load(folder), or ptv2_fast.load_adapter(model, folder)"
}

# The file that describes an adapter, and PEFT's name of it, which adapters of version 0.1 have.
ADAPTER_CONFIG_NAMES = ("ptv2_config.json", "adapter_config.json")


def find_description(directory: str | os.PathLike) -> Path | None:
    """The file that describes the adapter in a folder, None where there is none."""
    paths = (Path(directory) / name for name in ADAPTER_CONFIG_NAMES)
    return next((path for path in paths if path.is_file()), None)


def read_text(path: Path) -> str:
    """What a text file in UTF-8 says, with or without a byte order mark; unpacked when it is .gz.

    Raises:
        UnicodeDecodeError: for another encoding.
        OSError: when the file cannot be read or unpacked.
    """
    whole = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            whole = gzip.decompress(whole)
        except (EOFError, zlib.error) as error:
            raise OSError(f"not a whole gzip file: {error}") from error
    return whole.decode("utf-8-sig")


def read_json(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        ValueError: for what is not JSON, or nested too deeply to be read.
        OSError: when the file cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The same, of a file that holds an object.

    Raises:
        ValueError, OSError: as `read_json`; and for anything but an object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content


def plain_name(name: object, what: str) -> str:
    """A name out of a file that is about to become a part of a path.

    Returns:
        The name, which names something directly in the folder it is joined to.

    Raises:
        ValueError: for anything else: a path, "..", a drive, a hidden file, no text at all.
    """
    good = (
        isinstance(name, str)
        and 0 < len(name) < 256
        and name.isprintable()
        and not name.startswith((".", "~"))
        and not set(name) & set('/\\:*?"<>|')
    )
    if not good:
        raise ValueError(f"{what}: expected a plain name without a path, got {name!r:.100}")
    assert isinstance(name, str)
    return name


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a link leads out of a folder.

    The links of a snapshot of the hub lead to the blobs beside it, which is not out.
    """
    folder = folder.resolve()
    blobs = [above.parent / "blobs" for above in folder.parents if above.name == "snapshots"]
    return not any(path.resolve().is_relative_to(place) for place in (folder, *blobs))


def without_word(content: dict[str, Any]) -> dict[str, Any]:
    """What a config.json of ours says beside NO_MODEL."""
    return {
        name: value
        for name, value in content.items()
        if name not in NO_MODEL or not str(value).startswith("ptv2-fast")
    }
