"""Adapters in files and in models: saving, loading, and those of other packages."""

import importlib
from typing import TYPE_CHECKING

from ptv2_fast.adapters.loading import (
    check_tensors,
    load_adapter,
    load_prefix,
    read_config,
    read_labels,
    save_adapter,
)

if TYPE_CHECKING:
    from ptv2_fast.adapters.convert import export_peft, fold_adapter, import_adapter

# Imported on first use: few programs convert.
_LAZY = {
    "export_peft": "ptv2_fast.adapters.convert",
    "fold_adapter": "ptv2_fast.adapters.convert",
    "import_adapter": "ptv2_fast.adapters.convert",
}

__all__ = [
    "check_tensors",
    "export_peft",
    "fold_adapter",
    "import_adapter",
    "load_adapter",
    "load_prefix",
    "read_config",
    "read_labels",
    "save_adapter",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
