"""Which runs a sweep has and what differs between them: sweep.json.

    {"kind": "depth",
     "runs": {"ascending-1-4-seed-11":
              {"depth": "1-4", "order": "ascending", "layers": 4, "seed": 11}, ...},
     "changes": {"ascending-1-4-seed-11": {"depth": "1-4", "seed": 11}, ...},
     "base": {all options of the runs, with those that a run changes as they were given,
              "given": [names of those that were given; the others are defaults]}}

`runs` holds the axes of a figure. By kind, beside the seed:
    seeds    nothing
    depth    depth ("1-4"), order ("ascending", "descending", or "all" with a prefix in every
             layer, which is the last point of both), layers (how many get a prefix)
    length   num_virtual_tokens, prefix_projection
    reparam  prefix_projection
    head     head
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptv2_fast.files import plain_name
from ptv2_fast.training import run_folder
from ptv2_fast.training.option_files import options_of_run
from ptv2_fast.training.options import NEUTRAL_OPTIONS, RunConfig

SWEEP = "sweep.json"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Named runs that share the options of `base` but for their changes.

    Attributes:
        kind: what is compared.
        base: the options that the runs share.
        changes: by name of the run, the options that are its own.
        axes: by name of the run, where it stands in a figure.

    Raises:
        ValueError: for a name that is a path, and runs without changes, axes or a seed.
    """

    kind: str
    base: RunConfig
    changes: dict[str, dict[str, Any]]
    axes: dict[str, dict[str, Any]]

    def __post_init__(self) -> None:
        for name in (*self.changes, *self.axes):
            plain_name(name, "runs")
        if set(self.changes) != set(self.axes):
            raise ValueError(
                f"runs: expected changes and axes of the same runs, got {list(self.changes)!r:.100}"
                f" and {list(self.axes)!r:.100}"
            )
        for part in (*self.changes.values(), *self.axes.values()):
            if not isinstance(part, dict) or "seed" not in part:
                raise ValueError(f"runs: expected tables with a seed, got {part!r:.100}")

    def configs(self) -> dict[str, RunConfig]:
        """The options of each run.

        Raises:
            ValueError: naming the run whose options are bad.
        """
        configs = {}
        for name, changes in self.changes.items():
            try:
                configs[name] = self.base.changed(changes)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return configs

    def write(self, folder: Path) -> None:
        """Write sweep.json."""
        content = {
            "kind": self.kind, "runs": self.axes, "changes": self.changes,
            "base": self.base.options(),
        }  # fmt: skip
        run_folder.write_json(folder / SWEEP, content)

    def with_seeds(self, base: RunConfig, seeds: Sequence[int]) -> "Sweep":
        """The settings of this sweep with other seeds.

        Raises:
            ValueError: for repeated seeds, or a bad value of an option.
        """
        variants = {}
        for name, axes in self.axes.items():
            variant = name.removesuffix(f"seed-{axes['seed']}").removesuffix("-")
            parts = [
                {option: value for option, value in part.items() if option != "seed"}
                for part in (self.changes[name], axes)
            ]
            variants[variant] = (parts[0], parts[1])
        return sweep_of(self.kind, base, variants, seeds)

    def joined_with(self, before: "Sweep") -> "Sweep":
        """This sweep and the runs of an earlier one in the same folder, the earlier ones first.

        Raises:
            ValueError: when the two compare different things or differ in an option of all runs.
        """
        if before.kind != self.kind:
            raise ValueError(
                f"resume: expected the sweep of {before.kind} that was started here, got one of "
                f"{self.kind}"
            )
        changed = set().union(*self.changes.values())
        old, new = before.base.flat(), self.base.flat()
        differences = [
            f"{name} {old[name]!r} against {value!r}"
            for name, value in new.items()
            if value != old[name] and name not in changed | NEUTRAL_OPTIONS
        ]
        if differences:
            raise ValueError(
                "resume: expected the sweep that was started here; that sweep against now: "
                + ", ".join(differences)
            )
        return dataclasses.replace(
            self, changes=before.changes | self.changes, axes=before.axes | self.axes
        )


def read_sweep(folder: Path) -> Sweep:
    """The sweep in a folder.

    Raises:
        ValueError: when there is none, or it cannot be read.
    """
    file = folder / SWEEP
    content = run_folder.read_json(file)
    try:
        parts = {name: content[name] for name in ("base", "runs", "changes")}
        if not all(isinstance(part, dict) for part in parts.values()):
            raise ValueError("expected tables under base, runs and changes")
        base = RunConfig.from_dict(options_of_run(parts["base"]))
        return Sweep(str(content["kind"]), base, parts["changes"], parts["runs"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: no readable sweep ({error})") from error


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise a ValueError unless there is a seed and each comes once."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected different integers, got {list(seeds)}")


def sweep_of(kind: str, base: RunConfig, variants: dict[str, tuple[dict, dict]],
             seeds: Sequence[int] | None) -> Sweep:  # fmt: skip
    """Every variant with every seed; the runs are called <variant>-seed-<seed>.

    Args:
        kind: what is compared.
        base: the shared options.
        variants: by name ("" = a run is called by its seed alone), its options and where it
            stands in a figure.
        seeds: None = the seed of `base`.

    Raises:
        ValueError: for repeated seeds, or a bad value of an option.
    """
    seeds = [base.training.seed] if seeds is None else seeds
    check_seeds(seeds)
    changes, axes = {}, {}
    for variant, (options, place) in variants.items():
        for seed in seeds:
            name = f"{variant}-seed-{seed}" if variant else f"seed-{seed}"
            changes[name] = {**options, "seed": seed}
            axes[name] = {**place, "seed": seed}
    sweep = Sweep(kind, base, changes, axes)
    sweep.configs()
    return sweep


def seeds_sweep(base: RunConfig, seeds: Sequence[int]) -> Sweep:
    """One run a seed.

    Raises:
        ValueError: for repeated seeds.
    """
    return sweep_of("seeds", base, {"": ({}, {})}, seeds)
