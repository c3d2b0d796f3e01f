"""Adapters as a command names them, `ner=runs/ner`, and the one encoder of them all.

Light: the command line checks what it is given before it imports what runs it.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ptv2_fast.training import run_folder
from ptv2_fast.training.run_lookup import find_run

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def read_adapters(given: Sequence[str]) -> dict[str, Path]:
    """Name -> folder.

    Raises:
        ValueError: for a word of another form, or a name that comes twice.
    """
    adapters: dict[str, Path] = {}
    for word in given:
        name, equals, folder = word.partition("=")
        if not equals or not folder or not _NAME.fullmatch(name):
            raise ValueError(
                "adapter: expected name=folder with a name of letters, digits, dots, hyphens and "
                f"underscores, got {word!r}"
            )
        if name in adapters:
            raise ValueError(f"adapter: expected a name once, got {name!r} twice")
        adapters[name] = Path(folder)
    return adapters


def find_encoder(adapters: Mapping[str, Path], model: str | None = None) -> str:
    """The pretrained model that the runs of adapters name.

    Args:
        model: the one to use, whatever they name.

    Raises:
        ValueError: for a folder of no run, one of another method than p-tuning-v2, and where there
            are several models or none.
    """
    named: dict[str, str] = {}
    for name, folder in adapters.items():
        config, _ = run_folder.read_run_config(find_run(folder)[0])
        if config.model.method != "p-tuning-v2":
            raise ValueError(
                f"adapter {name}: expected a run of p-tuning-v2, got one of {config.model.method}"
            )
        named[str(config.model.model)] = name
    if model is not None:
        return model
    if len(named) != 1:
        found = ", ".join(f"{base} ({name})" for base, name in named.items()) or "no adapter"
        raise ValueError(f"model: expected the name of the encoder, as the runs name {found}")
    return next(iter(named))
