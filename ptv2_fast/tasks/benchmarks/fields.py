"""Fields of published rows, checked and spelt in one way."""

from collections.abc import Sequence
from typing import Any


def text(row: dict[str, Any], name: str) -> str:
    """A field that must be text.

    Raises:
        KeyError, TypeError: when it is missing, or something else.
    """
    value = row[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, not text")
    return value


def class_label(value: Any, classes: Sequence[str] = ()) -> str | None:
    """A label as the official files spell it; None stays None, where there is no label.

    Args:
        value: true, 1, "entailment", ….
        classes: how the hub calls the labels 0, 1, … of the official files; also true and false.
    """
    if value is None:
        return None
    name = str(value)
    return str(classes.index(name)) if name in classes else name
