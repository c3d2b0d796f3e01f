"""Recipes: the options of published runs and presets of our own, one YAML file each.

Beside options a file has a one-line `description` and, where the run is not possible yet,
`unsupported`, which says why. A preset leaves the task to the user.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ptv2_fast.tasks.hints import hint
from ptv2_fast.training.options import flatten

__all__ = ["Recipe", "load_recipe", "read_recipe", "recipes"]

_FOLDER = Path(__file__).parent
_FIGURES = "published"  # published.yaml is no recipe


@dataclass(frozen=True)
class Recipe:
    """One recipe: what it is for, its options, and why it cannot run where it cannot."""

    name: str
    description: str
    options: dict[str, Any]
    unsupported: str | None = None


@functools.cache
def recipes() -> list[str]:
    """The names of all recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml") if path.stem != _FIGURES)


@functools.cache
def load_recipe(name: str) -> Recipe:
    """A recipe by name, whether it can run or not.

    Raises:
        ValueError: for an unknown recipe.
    """
    if name not in recipes():
        raise ValueError(
            f"recipe: expected a name that `ptv2-fast tasks` lists, got {name!r}"
            + hint(name, recipes())
        )
    values = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    description, unsupported = values.pop("description"), values.pop("unsupported", None)
    return Recipe(name, description, flatten(values), unsupported)


def read_recipe(name: str) -> dict[str, Any]:
    """The options of a recipe, flat.

    Raises:
        ValueError: for an unknown recipe, or one whose run is not possible yet.
    """
    recipe = load_recipe(name)
    if recipe.unsupported is not None:
        raise ValueError(f"recipe: {name} cannot run: {recipe.unsupported}")
    return dict(recipe.options)
