"""What a call of the operator takes beside the five tensors, in the order of the schemas.

The C++ operators take the same (`AttentionOptions` in csrc/attention.h), and so do the Triton
launchers (`describe_call` in ptv2_kernels/arguments.py).
"""

import warnings
from typing import Annotated, Any, NamedTuple, get_type_hints

from torch import Tensor

SymInt = Annotated[int, "a symbol in a traced call"]


class AttentionOptions(NamedTuple):
    """Every backend's forward and backward take these; `prefix_attention` explains them."""

    key_mask: Tensor | None  # bool [B, S], True = attend
    seed: Tensor | None  # int64 [1]
    scale: float
    dropout_p: float
    prefix_dropout_p: float
    context_lengths: Tensor | None = None  # int32 [B]
    window: int = -1  # negative = none
    prefix_index: Tensor | None = None  # int32 [B]; None = every sequence reads row 0
    prefix_lengths: Tensor | None = None  # int32 [R]
    cu_seqlens: Tensor | None = None  # int32 [B + 1]: the packed layout
    max_seqlen: SymInt = 0
    bias: Tensor | None = None  # [1|B, H, T, S]
    # Of DeBERTa, `disentangled_prefix_attention`: without slots there is neither table.
    position_key: Tensor | None = None  # [H, slots, D], in the dtype of query
    position_query: Tensor | None = None  # likewise
    position_slots: Tensor | None = None  # int32 [2 M - 1]: the slot of i - j at i - j + M - 1
    prefix_gate: Tensor | None = None  # [R, H] in the dtype of lse; it has a gradient


_TYPES = {Tensor | None: "Tensor?", float: "float", int: "int", SymInt: "SymInt"}


def schema_of_options() -> str:
    """The options as the schema of an operator has them: "Tensor? key_mask, ..., int window=-1"."""
    defaults = AttentionOptions._field_defaults
    return ", ".join(
        f"{_TYPES[hint]} {name}" + (f"={defaults[name]}" if name in defaults else "")
        for name, hint in get_type_hints(AttentionOptions, include_extras=True).items()
    )


def __getattr__(name: str) -> Any:
    if name == "Options":
        message = "ptv2_fast.ops.options.Options is called AttentionOptions"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return AttentionOptions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
