"""Recipes: the options of published runs and presets of our own, one YAML file each.

Beside options a file has a one-line `description`. A preset leaves the task to the user.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ptv2_fast.tasks.hints import hint
from ptv2_fast.training.options import flatten

__all__ = ["Recipe", "load_recipe", "options_beside", "read_recipe", "recipes"]

_FOLDER = Path(__file__).parent
_FIGURES = "published"  # published.yaml is no recipe


@dataclass(frozen=True)
class Recipe:
    """One recipe: what it is for and its options."""

    name: str
    description: str
    options: dict[str, Any]


@functools.cache
def recipes() -> list[str]:
    """The names of all recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml") if path.stem != _FIGURES)


@functools.cache
def load_recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        ValueError: for an unknown recipe.
    """
    if name not in recipes():
        raise ValueError(
            f"recipe: expected a name that `ptv2-fast tasks` lists, got {name!r}"
            + hint(name, recipes())
        )
    values = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    description = values.pop("description")
    return Recipe(name, description, flatten(values))


def options_beside(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a recipe, flat, without those that cannot stand beside what is given.

    Raises:
        ValueError: for an unknown recipe.
    """
    options = read_recipe(name)
    warmup, decay = options.get("warmup_ratio", 0), given.get("decay_ratio")
    if given.get("schedule") == "exponential" or (decay is not None and warmup + decay > 1):
        options.pop("warmup_ratio", None)
    starts_otherwise = given.get("prefix_projection") or given.get("start_from") is not None
    if starts_otherwise or given.get("num_virtual_tokens") == 0:
        options.pop("init", None)  # from tokens
    return options


def read_recipe(name: str) -> dict[str, Any]:
    """The options of a recipe, flat.

    Raises:
        ValueError: for an unknown recipe.
    """
    return dict(load_recipe(name).options)
