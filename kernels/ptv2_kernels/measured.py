"""Launch configurations that were measured on a card: one file per architecture, in measured/.

`python -m bench.gpu tune` writes such a file. PTV2_TUNED names another one to be read instead.
"""

import functools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

KERNELS = ("forward", "query", "key_value", "prefix")
SHORT_PREFIX = 32  # up to it one tile holds the prefix
FOLDER = Path(__file__).parent / "measured"


@dataclass(frozen=True)
class Config:
    """Tile sizes, warps, pipeline stages; maxnreg: registers a thread may use, None = any."""

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def options(self) -> dict[str, int]:
        options = {
            "BLOCK_QUERIES": self.block_queries,
            "BLOCK_KEYS": self.block_keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


class Workload(NamedTuple):
    """What a configuration is chosen by; nothing in it depends on the batch."""

    kernel: str  # of KERNELS
    width: int  # of the tiles of head_dim, configs.tile_widths
    element_size: int  # bytes
    has_dropout: bool
    prefix_length: int | None  # None: the kernel reads no prefix

    @property
    def key(self) -> str:
        """Its name in a file; prefixes are short or long."""
        parts = [self.kernel, f"width {self.width}", f"{8 * self.element_size}bit"]
        if self.has_dropout:
            parts.append("dropout")
        if self.prefix_length is not None:
            parts.append("short" if self.prefix_length <= SHORT_PREFIX else "long")
        return " ".join(parts)


def file_of(architecture: str | int) -> str:
    return f"{architecture}.json" if isinstance(architecture, str) else f"sm_{architecture}.json"


@functools.cache
def measured_configs(architecture: str | int) -> dict[str, Config]:
    """Configurations by `Workload.key`; empty where none were measured.

    Raises:
        ValueError: when PTV2_TUNED names no file that can be read as one.
    """
    named = os.environ.get("PTV2_TUNED")
    path = Path(named) if named else FOLDER / file_of(architecture)
    if not named and not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        if found["architecture"] != architecture:
            return {}
        return {key: Config(**fields) for key, fields in found["configs"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"PTV2_TUNED: expected a file that bench.gpu tune wrote, got {path} "
            f"({type(error).__name__}: {error})"
        ) from error


def write_measured(
    path: Path, architecture: str | int, origin: dict[str, str], configs: dict[str, Config]
) -> None:
    """Put configurations into a file, in place of those with the same keys.

    Args:
        path: of the file; made when missing.
        architecture: as `configs.architecture` gives it.
        origin: card, date and versions.
        configs: by `Workload.key`.
    """
    found = json.loads(path.read_text()) if path.exists() else {"configs": {}}
    known = found["configs"] if found.get("architecture") == architecture else {}
    new = {
        key: {name: value for name, value in asdict(config).items() if value is not None}
        for key, config in configs.items()
    }
    content = {"architecture": architecture, **origin, "configs": {**known, **new}}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
