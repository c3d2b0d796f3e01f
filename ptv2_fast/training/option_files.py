"""Options in JSON, TOML and YAML files, those of earlier versions among them."""

import json
from pathlib import Path
from typing import Any

from ptv2_fast.files import without_word
from ptv2_fast.tasks.option_table import GIVEN
from ptv2_fast.training.options import TABLES, defaults, flatten

_MOST_VALUES = 100_000  # in a YAML file

# What earlier versions did with data where their files do not name an option.
OF_EARLIER_RUNS = {"decoding": "argmax"}


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Options from a .json, .toml, .yaml or .yml file, flat; a run's config.json is such a file.

    Raises:
        ValueError: for a missing or malformed file, or unknown options.
    """
    return flatten(read_table(path))


def read_table(path: str | Path) -> dict[str, Any]:
    """What a .json, .toml, .yaml or .yml file says, without what a run found.

    Raises:
        ValueError: for a missing or malformed file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config: expected an existing file, got {str(path)!r}")
    try:
        values = _parser(path.suffix.lower())(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of json, toml, yaml and unicode
        raise ValueError(f"config: {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config: expected a table of options in {path}, got {values!r:.100}")
    if "found" in values:  # which a run's config.json keeps beside the options
        values = options_of_run(values)
    data = values.get("data")
    if isinstance(data, dict) and {"dataset", "train_file"} <= set(data):
        # A list of all options, since only one of the two can be given: a search's best.yaml.
        values = with_given(values)
    return without_word(values)


def options_of_run(content: dict[str, Any]) -> dict[str, Any]:
    """The options in a run's config.json, in that of a multi-task run, or those that the runs of a
    sweep share; one of data that an earlier version did not know is what that version did."""
    values = {name: value for name, value in content.items() if name != "found"}
    if isinstance(values.get("data"), dict):
        values["data"] = OF_EARLIER_RUNS | values["data"]
    elif "task" in values:
        values = OF_EARLIER_RUNS | values
    if isinstance(values.get("tasks"), list):
        values["tasks"] = [
            with_given(OF_EARLIER_RUNS | table) if isinstance(table, dict) else table
            for table in values["tasks"]
        ]
    return with_given(values)


def with_given(values: dict[str, Any]) -> dict[str, Any]:
    """A list of options with the names of those that were given, which earlier versions did not
    keep: those that are not the default, as these versions took it."""
    tables = [values[name] for name in TABLES if isinstance(values.get(name), dict)]
    known = defaults()
    listed = [(name, value) for table in (values, *tables) for name, value in table.items()]
    return {GIVEN: [n for n, value in listed if n in known and value != known[n]], **values}


def _parser(suffix: str) -> Any:
    if suffix == ".json":
        return json.loads
    if suffix == ".toml":
        try:
            import tomllib
        except ImportError:
            raise ValueError("TOML needs Python >= 3.11; use JSON or YAML") from None
        return tomllib.loads
    if suffix in (".yaml", ".yml"):
        return _parse_yaml
    raise ValueError(f"expected .json, .toml, .yaml or .yml, got {suffix!r}")


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    # Aliases make much of little: ten lines of them would be written out as a billion values.
    left, count = [content], 0
    while left:
        value = left.pop()
        left += [*value, *value.values()] if isinstance(value, dict) else []
        left += value if isinstance(value, list) else []
        count += 1
        if count > _MOST_VALUES:
            raise ValueError(f"expected at most {_MOST_VALUES:,} values, aliases counted in full")
    return content
