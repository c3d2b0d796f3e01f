"""Where examples are: files, and splits of data sets of the hub.

Light: the command line looks for the files before it imports what reads them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ptv2_fast.tasks.benchmarks import Benchmark
from ptv2_fast.tasks.options import DataOptions

_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class Stream:
    """An open file that is read once, such as stdin; of text, or of bytes in UTF-8.

    Attributes:
        format: "csv", "tsv" or "json", the last with an object a line.
    """

    file: IO[Any]
    format: str


@dataclass(frozen=True)
class Part:
    """Rows that were read already, of a source that is read a part after the other.

    Attributes:
        numbers: of its rows in the source, from 1.
        table: a Dataset; None of typed texts.
        read: bytes of the file that were read until here.
        is_whole: whether there are no others.
    """

    numbers: Sequence[int]
    table: Any = None
    read: int = 0
    is_whole: bool = False


@dataclass(frozen=True)
class Source:
    """One file, one split of a hub data set, a stream, or a part of one; `name` is how messages
    call it."""

    name: str
    path: Path | None = None
    hub: tuple[str, str | None, str] | None = None
    stream: Stream | None = None
    part: Part | None = None

    def number(self, index: int) -> int:
        """How messages number a row."""
        return index + 1 if self.part is None else self.part.numbers[index]

    @property
    def format(self) -> str:
        """ "csv", "tsv", "json", "parquet", "hub", "part" or "other"; compressed by gzip or not."""
        if self.part is not None:
            return "part"
        if self.stream is not None:
            return self.stream.format
        if self.path is None:
            return "hub"
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        if suffixes[-1:] == [".gz"]:
            suffixes.pop()
        return _SUFFIXES.get(suffixes[-1] if suffixes else "", "other")


TYPED = Source("typed")


def file_source(path: str | Path) -> Source:
    """The source of a file.

    Raises:
        ValueError: when there is no such file.
    """
    if not Path(path).is_file():
        raise ValueError(f"file: expected an existing file, got {str(path)!r}")
    return Source(name=str(path), path=Path(path))


def find_sources(options: DataOptions) -> dict[str, Source]:
    """The sources of the splits that the options name: "train", "validation", "test", ….

    Files that the options give come first; then the splits of `dataset` or the official files in
    data_dir; then, without a training file, a published data set's place on the hub.

    Raises:
        ValueError: for a missing file or split, or no training data.
    """
    splits = ("train", "validation", "test")
    paths = {split: getattr(options, f"{split}_file") for split in splits}
    given = {split: file_source(path) for split, path in paths.items() if path is not None}
    benchmark = options.benchmark
    if options.dataset is not None:
        names = {split: getattr(options, f"{split}_split") for split in splits}
        return _hub_splits(options.dataset, options.dataset_config, names) | given
    if options.data_dir is not None:
        assert benchmark is not None
        return _official_files(benchmark, Path(options.data_dir)) | given
    if "train" in given:
        return given
    if benchmark is None:
        raise ValueError("train_file: expected a file, or dataset=NAME, got neither")
    if benchmark.hub is None:
        raise ValueError(f"data_dir: expected the folder of {benchmark.title}, got None")
    return _hub_splits(*benchmark.hub, benchmark.hub_splits) | given


def _hub_splits(
    name: str, config: str | None, splits: Mapping[str, str | None]
) -> dict[str, Source]:
    return {
        split: Source(f"{name}[{theirs}]", hub=(name, config, theirs))
        for split, theirs in splits.items()
        if theirs
    }


def _official_files(benchmark: Benchmark, folder: Path) -> dict[str, Source]:
    """The files of a published data set in a folder, or in the folder of its name inside."""
    if not folder.is_dir():
        raise ValueError(f"data_dir: expected an existing folder, got {str(folder)!r}")
    titles = {benchmark.name, benchmark.title.lower()}
    inside = [p for p in sorted(folder.iterdir()) if p.is_dir() and p.name.lower() in titles]
    for place in (folder, *inside):
        found = {
            split: next((place / name for name in names if (place / name).is_file()), None)
            for split, names in benchmark.files.items()
        }
        if found["train"] is not None:
            break
    for split in ("train", "validation"):
        if found[split] is None:
            raise ValueError(
                f"data_dir: expected {' or '.join(benchmark.files[split])} of {benchmark.title} "
                f"for the {split} split in {str(folder)!r}, got "
                f"{sorted(path.name for path in folder.iterdir())[:10]}"
            )
    return {split: file_source(path) for split, path in found.items() if path is not None}
