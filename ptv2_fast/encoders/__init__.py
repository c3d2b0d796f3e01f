"""Prefixes on encoders of transformers, attached in place."""

from ptv2_fast.encoders.attaching import (
    attach,
    detach,
    disabled,
    get_nb_trainable_parameters,
    max_input_tokens,
    print_trainable_parameters,
)
from ptv2_fast.encoders.families import FAMILIES

__all__ = [
    "FAMILIES",
    "attach",
    "detach",
    "disabled",
    "get_nb_trainable_parameters",
    "max_input_tokens",
    "print_trainable_parameters",
]
