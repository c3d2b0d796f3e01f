"""ptv2-fast: P-Tuning v2 with fused kernels that read the prefix in place.

The raw operators, torch.ops.ptv2, are registered by ptv2_fast.ops, which the first use of a name
below imports; where torch has been imported already, this does.
"""

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptv2_fast.adapters import load_adapter, save_adapter
    from ptv2_fast.encoders import (
        attach,
        detach,
        disabled,
        get_nb_trainable_parameters,
        print_trainable_parameters,
    )
    from ptv2_fast.ops import (
        disentangled_prefix_attention,
        prefix_attention,
        prefix_attention_with_lse,
    )
    from ptv2_fast.ops.backends import backends
    from ptv2_fast.prefix import PrefixEncoder, PTuningV2Config
    from ptv2_fast.training.bank import AdapterBank
    from ptv2_fast.training.models import load

__version__ = "0.1.0"

# Imported on first use: torch and transformers take seconds, and the help of a command needs none.
_LAZY = {
    "AdapterBank": "ptv2_fast.training.bank",
    "PTuningV2Config": "ptv2_fast.prefix",
    "PrefixEncoder": "ptv2_fast.prefix",
    "attach": "ptv2_fast.encoders",
    "backends": "ptv2_fast.ops",
    "detach": "ptv2_fast.encoders",
    "disabled": "ptv2_fast.encoders",
    "disentangled_prefix_attention": "ptv2_fast.ops",
    "get_nb_trainable_parameters": "ptv2_fast.encoders",
    "load": "ptv2_fast.training.models",
    "load_adapter": "ptv2_fast.adapters",
    "prefix_attention": "ptv2_fast.ops",
    "prefix_attention_with_lse": "ptv2_fast.ops",
    "print_trainable_parameters": "ptv2_fast.encoders",
    "save_adapter": "ptv2_fast.adapters",
}

__all__ = [
    "AdapterBank",
    "PTuningV2Config",
    "PrefixEncoder",
    "attach",
    "backends",
    "detach",
    "disabled",
    "disentangled_prefix_attention",
    "get_nb_trainable_parameters",
    "load",
    "load_adapter",
    "prefix_attention",
    "prefix_attention_with_lse",
    "print_trainable_parameters",
    "save_adapter",
]


if "torch" in sys.modules:
    importlib.import_module("ptv2_fast.ops")


def __getattr__(name: str):
    if name in _LAZY:
        if _LAZY[name] != "ptv2_fast.prefix":  # which goes without transformers
            importlib.import_module("ptv2_fast.training.auto_classes")
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
