"""Recipes: the options of published runs, one YAML file each."""

import difflib
from pathlib import Path
from typing import Any

from ptv2_fast.training.options import read_config_file

_FOLDER = Path(__file__).parent


def recipes() -> list[str]:
    """The names of all recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """The options of a recipe, flat.

    Raises:
        ValueError: for an unknown recipe.
    """
    if name not in recipes():
        close = difflib.get_close_matches(name, recipes(), n=3, cutoff=0.4)
        hint = f"; close to it are {close}" if close else ""
        raise ValueError(
            f"recipe: expected a name that `ptv2-fast tasks` lists, got {name!r}{hint}"
        )
    return read_config_file(_FOLDER / f"{name}.yaml")
