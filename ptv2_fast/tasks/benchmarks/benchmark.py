"""What is known about a published data set."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Turns one row as it is published into rows of the task family, by a template's name.
Rows = Callable[[dict[str, Any], str], Iterable[dict[str, Any]]]


@dataclass(frozen=True)
class Benchmark:
    """A published data set: where it is, and how its rows become those of a task family.

    Attributes:
        name: on the command line.
        title: in tables.
        suite: the collection it belongs to.
        family: the task family that reads, trains and scores it.
        metrics: the published figures; the first selects the best checkpoint.
        files: per split the names that its file may have in --data-dir, of labelled splits only.
            "train" and "validation" must be there; any other split may be absent.
        hub: name and configuration on the Hugging Face hub.
        hub_splits: our names of the splits -> the hub's.
        rows: published row, template -> rows of the family; None when they have its columns.
        templates: names of the ways to phrase an example; the first is the default.
        pairs: those templates that make two texts of an example (text, text_pair).
        options: other defaults of DataOptions, such as column numbers.
        labels: of token tasks, those in any split; the head has them all.
        csv_options: keyword arguments of pandas.read_csv, for a .csv, .tsv or .txt file of it.
        torn_rows: whether the official files have rows that a line break in a text tore in two;
            neither half has a label.
    """

    name: str
    title: str
    suite: str
    family: str
    metrics: tuple[str, ...]
    files: Mapping[str, tuple[str, ...]]
    hub: tuple[str, str | None] | None = None
    hub_splits: Mapping[str, str] = field(
        default_factory=lambda: {"train": "train", "validation": "validation"}
    )
    rows: Rows | None = None
    templates: tuple[str, ...] = ("default",)
    pairs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    csv_options: Mapping[str, Any] = field(default_factory=dict)
    torn_rows: bool = False
