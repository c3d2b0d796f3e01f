"""What a search varies: options by name, each with a range or a list of choices.

learning_rate: {low: 0.001, high: 0.1, log: true}
num_virtual_tokens: {choices: [8, 16, 32]}
max_length: {low: 64, high: 256, step: 64}
"""

import dataclasses
import itertools
import math
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ptv2_fast.tasks.options import value_type
from ptv2_fast.training.options import (
    DEFAULT_LEARNING_RATES,
    SECTIONS,
    RunConfig,
    flatten,
    read_table,
    with_changes,
)

Space = dict[str, dict[str, Any]]

# Beside "choices" alone.
_RANGE = {"low", "high", "log", "step"}
_WITH_PROMPT = ("p-tuning-v2", "prompt-tuning", "p-tuning-v1")
_FEW_EPOCHS = ("fine-tuning", "lora")


def default_space(base: RunConfig, given: Collection[str] = ()) -> Space:
    """What is searched when no space was given, by method.

    Args:
        base: the run.
        given: options that the user set and that therefore stay.

    Raises:
        ValueError: when nothing is left.
    """
    method, training = base.model.method, base.training
    rate = DEFAULT_LEARNING_RATES[method]
    space: Space = {"learning_rate": {"low": rate / 10, "high": rate * 10, "log": True}}
    if method in _WITH_PROMPT:
        space["num_virtual_tokens"] = {"choices": [8, 16, 32, 64, 128]}
    if method == "p-tuning-v2":
        space["prefix_projection"] = {"choices": [False, True]}
    if method == "lora":
        space["lora_rank"] = {"choices": [4, 8, 16, 32]}
    if training.max_steps is None and training.max_seconds is None:
        few = method in _FEW_EPOCHS
        space["num_train_epochs"] = {"choices": [2, 3, 5, 10] if few else [5, 10, 20, 40]}
    space["dropout"] = {"choices": [0.0, 0.1]}
    space = {
        name: entry
        for name, entry in space.items()
        if name not in given and _fits({name: entry}, base)
    }
    if not space:
        raise ValueError(
            "space: expected an option to vary, but all of the default space were given"
        )
    return space


def read_space(path: str | Path) -> Space:
    """A space from a .yaml, .json or .toml file; `check_space` looks at its entries.

    Raises:
        ValueError: for a missing or malformed file, or unknown options.
    """
    try:
        table = read_table(path)
        # The names alone, since `model` is both an option and a table of options.
        return dict(zip(flatten(dict.fromkeys(table)), table.values(), strict=True))
    except ValueError as error:
        raise ValueError(f"space: {error}") from error


def _fits(space: Space, base: RunConfig) -> bool:
    try:
        check_space(space, base)
    except ValueError:
        return False
    return True


def with_options(base: RunConfig, values: dict[str, Any]) -> RunConfig:
    """A run with some options changed.

    Raises:
        ValueError: when the values do not go together.
    """
    return RunConfig.from_dict(with_changes(base.flat(), values))


def check_space(space: Space, base: RunConfig) -> None:
    """Check every entry, that a run may have each of its values, and each two that may be drawn.

    Raises:
        ValueError: naming the option, what was expected and what was given.
    """
    if not space:
        raise ValueError("space: expected at least one option to vary, got none")
    if "task" in space:
        raise ValueError("space: expected options of one task, got task among them")
    for name, entry in space.items():
        _check_entry(name, entry)
    alone, pairs = itertools.combinations(space, 1), itertools.combinations(space, 2)
    for names in (*alone, *pairs):
        for values in itertools.product(*(values_of(space[name]) for name in names)):
            try:
                with_options(base, dict(zip(names, values, strict=True)))
            except ValueError as error:
                reason = str(error)
                if len(names) == 2:
                    reason = (
                        f"expected values of {names[0]} and {names[1]} that go together, got "
                        f"{values[0]!r} and {values[1]!r} ({error})"
                    )
                raise ValueError(f"space: {reason}") from error


def _check_entry(name: str, entry: Any) -> None:
    def require(condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"space: {name}: expected {expected}, got {entry!r}")

    require(isinstance(entry, dict), "a table with choices, or with low and high")
    if "choices" in entry:
        choices = entry["choices"]
        require(set(entry) == {"choices"}, "choices alone")
        require(isinstance(choices, list) and choices != [], "a list of choices")
        plain = all(c is None or isinstance(c, bool | int | float | str) for c in choices)
        require(plain, "choices that are numbers, text, true, false or null")
        different = {(type(choice), choice) for choice in choices}
        require(len(different) == len(choices), "different choices")
        return
    require({"low", "high"} <= set(entry) <= _RANGE, "low, high and perhaps log or step")
    numbers = [entry[key] for key in ("low", "high", "step") if key in entry]
    # YAML takes 1e-3 for text and 1.0e-3 for a number.
    require(all(type(n) in (int, float) for n in numbers), "numbers (1.0e-3 and not 1e-3 in YAML)")
    require(all(map(math.isfinite, numbers)), "finite numbers")
    require(entry["low"] < entry["high"], "low below high")
    require(isinstance(entry.get("log", False), bool), "true or false for log")
    require(not entry.get("log") or entry["low"] > 0, "low above 0 with log")
    require(entry.get("step", 1) > 0, "a step above 0")
    require(not entry.get("log") or "step" not in entry, "log or step")
    kind = option_type(name)
    require(kind in (int, float), "choices, since the option is no number")
    require(kind is float or all(type(n) is int for n in numbers), "integers")


def values_of(entry: dict[str, Any]) -> list[Any]:
    """The choices, or both ends of the range."""
    return entry["choices"] if "choices" in entry else [entry["low"], entry["high"]]


def option_type(name: str) -> type:
    """The type of an option's values."""
    for part in SECTIONS.values():
        if name in {field.name for field in dataclasses.fields(part)}:  # type: ignore[arg-type]
            return value_type(typing.get_type_hints(part)[name])[0]
    raise ValueError(f"{name}: no such option")


def draw_values(trial: Any, space: Space) -> dict[str, Any]:
    """The values of the space that an `optuna.Trial` is to have."""
    values = {}
    for name, entry in space.items():
        if "choices" in entry:
            values[name] = trial.suggest_categorical(name, entry["choices"])
        elif option_type(name) is int:
            values[name] = trial.suggest_int(name, **entry)
        else:
            values[name] = trial.suggest_float(name, **entry)
    return values
