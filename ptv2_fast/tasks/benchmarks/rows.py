"""What turns published rows into those of a task family, for several suites."""

from collections.abc import Iterator, Sequence
from typing import Any

from ptv2_fast.tasks.benchmarks.benchmark import Rows


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


def sentences(*forms: tuple[str, ...], classes: tuple[str, ...] = ()) -> Rows:
    """Rows of one or two texts and a label.

    Args:
        forms: the columns of the texts and, last, of the label: in the official files and, where
            they differ, on the hub.
        classes: how the hub calls labels that are numbers in the official files.
    """

    def rows(row: dict[str, Any], template: str) -> Iterator[dict[str, Any]]:
        columns = next((form for form in forms if form[0] in row), forms[0])[:-1]
        label = next((row[form[-1]] for form in forms if form[-1] in row), None)
        # zip is not strict: some have one text.
        texts = zip(("text", "text_pair"), columns, strict=False)
        yield {
            **{name: text(row, column) for name, column in texts},
            "label": class_label(label, classes),
        }

    rows.__doc__ = f"({', '.join(forms[0][:-1])})."
    return rows
