"""Operators: the public functions; importing this package registers the raw ones."""

from ptv2_fast.ops import elementwise  # noqa: F401  (registers its operators)
from ptv2_fast.ops.attention import prefix_attention, prefix_attention_with_lse
from ptv2_fast.ops.backends import backends
from ptv2_fast.ops.disentangled import disentangled_prefix_attention

__all__ = [
    "backends",
    "disentangled_prefix_attention",
    "prefix_attention",
    "prefix_attention_with_lse",
]
