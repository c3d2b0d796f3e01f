"""Prefixes on encoders of transformers, attached in place."""

from ptv2_fast.encoders.families import FAMILIES
from ptv2_fast.encoders.lifecycle import (
    attach,
    detach,
    disabled,
    get_nb_trainable_parameters,
    max_input_tokens,
    print_trainable_parameters,
)

__all__ = [
    "FAMILIES",
    "attach",
    "detach",
    "disabled",
    "get_nb_trainable_parameters",
    "max_input_tokens",
    "print_trainable_parameters",
]
