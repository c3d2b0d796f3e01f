"""Adapters of other packages, in and out: PEFT, P-Tuning v2's own code, ChatGLM, adapters."""

from ptv2_fast.adapters.convert.exporting import export_peft, fold_adapter
from ptv2_fast.adapters.convert.foreign import HEADS, ForeignAdapter
from ptv2_fast.adapters.convert.importing import (
    import_adapter,
    load_foreign,
    named_for,
    read_foreign,
)

__all__ = [
    "HEADS",
    "ForeignAdapter",
    "export_peft",
    "fold_adapter",
    "import_adapter",
    "load_foreign",
    "named_for",
    "read_foreign",
]
