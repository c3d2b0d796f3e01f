"""Adapters in files and in models: saving, loading."""

from ptv2_fast.adapters.loading import (
    check_tensors,
    load_adapter,
    load_prefix,
    read_config,
    read_labels,
    save_adapter,
)

__all__ = [
    "check_tensors",
    "load_adapter",
    "load_prefix",
    "read_config",
    "read_labels",
    "save_adapter",
]
