"""Which runs a sweep has: a name and the options of its own for each, kept in sweep.json.

{"kind": "depth",
 "base": {all options of the runs, with those that a run changes as they were given},
 "runs": {"ascending-1-4-seed-11": {"depth": "1-4", "seed": 11}, ...}}
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptv2_fast.files import plain_name
from ptv2_fast.training import run_folder
from ptv2_fast.training.options import OF_EARLIER_RUNS, RunConfig, with_changes

SWEEP = "sweep.json"
# What the runs of an ablation differ in beside the seed, by kind.
VARIED: dict[str, dict[str, type]] = {
    "depth": {"depth": str},
    "length": {"num_virtual_tokens": int, "prefix_projection": bool},
    "reparam": {"prefix_projection": bool},
    "head": {"head": str},
}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Named runs that share the options of `base` but for those of their own.

    Attributes:
        kind: what is compared: "seeds", one of VARIED, or any other word.
        base: the options that the runs share.
        runs: by name, the options that are a run's own, the seed among them.

    Raises:
        ValueError: for a name that is a path, and runs without a seed.
    """

    kind: str
    base: RunConfig
    runs: dict[str, dict[str, Any]]

    def __post_init__(self) -> None:
        for name, options in self.runs.items():
            plain_name(name, "runs")
            if not isinstance(options, dict) or "seed" not in options:
                raise ValueError(f"runs: expected tables with a seed, got {options!r:.100}")

    def configs(self) -> dict[str, RunConfig]:
        """The options of each run.

        Raises:
            ValueError: naming the run whose options are bad.
        """
        configs = {}
        for name, options in self.runs.items():
            try:
                configs[name] = RunConfig.from_dict(with_changes(self.base.flat(), options))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return configs

    def write(self, folder: Path) -> None:
        """Write sweep.json."""
        content = {"kind": self.kind, "base": self.base.flat(), "runs": self.runs}
        run_folder.write_json(folder / SWEEP, content)

    def with_seeds(self, base: RunConfig, seeds: Sequence[int]) -> "Sweep":
        """The settings of this sweep with other seeds.

        Raises:
            ValueError: for repeated seeds, or a bad value of an option.
        """
        variants = {}
        for name, options in self.runs.items():
            variant = name.removesuffix(f"seed-{options['seed']}").removesuffix("-")
            variants[variant] = {n: value for n, value in options.items() if n != "seed"}
        return sweep_of(self.kind, base, variants, seeds)


def read_sweep(folder: Path) -> Sweep:
    """The sweep in a folder.

    Raises:
        ValueError: when there is none, or it cannot be read.
    """
    file = folder / SWEEP
    content = run_folder.read_json(file)
    try:
        # Earlier versions have the options under "changes", and more for figures under "runs".
        base, runs = content["base"], content.get("changes", content["runs"])
        if not isinstance(base, dict) or not isinstance(runs, dict):
            raise ValueError("expected tables under base and runs")
        return Sweep(str(content["kind"]), RunConfig.from_dict(OF_EARLIER_RUNS | base), runs)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: no readable sweep ({error})") from error


def sweep_of(
    kind: str, base: RunConfig, variants: dict[str, dict[str, Any]], seeds: Sequence[int] | None
) -> Sweep:
    """Every variant with every seed; the runs are called <variant>-seed-<seed>.

    Args:
        kind: what is compared.
        base: the shared options.
        variants: by name ("" = a run is called by its seed alone), its options.
        seeds: None = the seed of `base`.

    Raises:
        ValueError: for repeated seeds, or a bad value of an option.
    """
    seeds = [base.training.seed] if seeds is None else seeds
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected different integers, got {list(seeds)}")
    runs = {
        f"{variant}-seed-{seed}" if variant else f"seed-{seed}": options | {"seed": seed}
        for variant, options in variants.items()
        for seed in seeds
    }
    sweep = Sweep(kind, base, runs)
    sweep.configs()
    return sweep


def seeds_sweep(base: RunConfig, seeds: Sequence[int]) -> Sweep:
    """One run a seed.

    Raises:
        ValueError: for repeated seeds.
    """
    return sweep_of("seeds", base, {"": {}}, seeds)
