"""The configuration of a run over several data sets of one task family."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from ptv2_fast.tasks.options import DataOptions
from ptv2_fast.training.options import (
    ModelOptions,
    RunConfig,
    TrainingOptions,
    check_label_smoothing,
    flatten,
    read_table,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# Options that a run of one task does not have.
_OWN = ("tasks", "temperature", "mixed_batches")


@dataclasses.dataclass(frozen=True)
class MultiTaskConfig:
    """All options of a multi-task run: what config.json in its folder says.

    Attributes:
        tasks: the data sets, at least two of one family.
        names: of the data sets, in reports and as folders.
        model, training: as for one task.
        temperature: batches are drawn from a data set of n rows in proportion to
            n ** (1 / temperature): 1 = by size, large = equally often.
        mixed_batches: let a batch hold rows of several data sets, in the same proportions.

    Raises:
        ValueError: naming what does not go together.
    """

    tasks: tuple[DataOptions, ...]
    names: tuple[str, ...]
    model: ModelOptions
    training: TrainingOptions
    temperature: float = 1.0
    mixed_batches: bool = False

    def __post_init__(self) -> None:
        if len(self.tasks) < 2 or len(self.tasks) != len(self.names):
            raise ValueError(
                f"tasks: expected at least two data sets and a name for each, got {self.names} for "
                f"{len(self.tasks)}"
            )
        bad = [n for n in self.names if not isinstance(n, str) or not _NAME.fullmatch(n)]
        if bad:
            raise ValueError(f"tasks: expected names of letters, digits, - and _, got {bad}")
        if len(set(self.names)) < len(self.names):
            raise ValueError(
                f"tasks: expected a name of its own for each data set, got {list(self.names)}; set "
                "name"
            )
        families = {n: task.family for n, task in zip(self.names, self.tasks, strict=True)}
        if len(set(families.values())) > 1:
            raise ValueError(f"tasks: expected data sets of one family, got {families}")
        for name, task in zip(self.names, self.tasks, strict=True):
            if task.head != "linear":
                raise ValueError(
                    f"head: expected 'linear' in a multi-task run, got {task.head!r} for {name}"
                )
        for task in self.tasks:
            check_label_smoothing(task, self.training)
        temperature = self.temperature
        if type(temperature) not in (int, float) or not temperature > 0:
            raise ValueError(f"temperature: expected a number > 0, got {temperature!r}")
        object.__setattr__(self, "temperature", float(temperature))
        if type(self.mixed_batches) is not bool:
            raise ValueError(f"mixed_batches: expected true or false, got {self.mixed_batches!r}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MultiTaskConfig":
        """From `tasks`, a list of tables of data options with a `name`, and the other options.

        A data set without a name gets that of its task. Data options beside `tasks` hold for every
        data set that does not set them.

        Raises:
            ValueError: for an unknown option or a bad value.
        """
        shared = flatten_tasks(values)
        tables = shared.pop("tasks", None)
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise ValueError(f"tasks: expected a list of tables of data options, got {tables!r}")
        own_options = {name: shared.pop(name) for name in _OWN if name in shared}
        data = _part(DataOptions, shared)
        tasks, names = [], []
        for table in tables:
            own = flatten({key: value for key, value in table.items() if key != "name"})
            foreign = sorted(set(own) - set(DataOptions.names()))
            if foreign:
                raise ValueError(f"tasks: expected data options in the list, got {foreign}")
            tasks.append(DataOptions(**{**data, **own}))
            names.append(table.get("name", tasks[-1].task))
        model = ModelOptions(**_part(ModelOptions, shared))
        training = TrainingOptions(**_part(TrainingOptions, shared))
        return cls(tuple(tasks), tuple(names), model, training, **own_options)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` takes, JSON-ready."""
        tasks = [
            {"name": name, **dataclasses.asdict(task)}
            for name, task in zip(self.names, self.tasks, strict=True)
        ]
        return {
            "tasks": tasks,
            "model": dataclasses.asdict(self.model),
            "training": dataclasses.asdict(self.training),
            "temperature": self.temperature,
            "mixed_batches": self.mixed_batches,
        }

    def flat(self) -> dict[str, Any]:
        """All options in one table, JSON-ready; data options behind their data set's name."""
        tables = self.to_dict()
        data = {
            f"{t['name']}.{key}": value for t in tables.pop("tasks") for key, value in t.items()
        }
        model, training = tables.pop("model"), tables.pop("training")
        return {**data, **model, **training, **tables}

    def parts(self) -> dict[str, RunConfig]:
        """The run of each data set alone, by name."""
        return {
            name: RunConfig(task, self.model, self.training)
            for name, task in zip(self.names, self.tasks, strict=True)
        }


def flatten_tasks(values: dict[str, Any]) -> dict[str, Any]:
    """Options in one table under their own names, beside those of multi-task runs alone.

    Raises:
        ValueError: for a name that is no option.
    """
    names = {name: str(name).replace("-", "_") for name in values}
    own = {names[name]: value for name, value in values.items() if names[name] in _OWN}
    return flatten({name: value for name, value in values.items() if names[name] not in own}) | own


def read_multitask_file(path: str | Path) -> dict[str, Any]:
    """Options from a .json, .toml, .yaml or .yml file, as `flatten_tasks` returns them.

    Raises:
        ValueError: for a missing or malformed file, or unknown options.
    """
    return flatten_tasks(read_table(path))


def _part(part: type, values: dict[str, Any]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(part)]
    return {name: values[name] for name in names if name in values}
