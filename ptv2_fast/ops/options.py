"""What a call of the operator takes beside the five tensors, in the order of the schemas."""

from typing import NamedTuple

from torch import Tensor

SCHEMA = (
    "Tensor? key_mask, Tensor? seed, float scale, float dropout_p, float prefix_dropout_p, "
    "Tensor? context_lengths=None, int window=-1, Tensor? prefix_index=None, "
    "Tensor? prefix_lengths=None, Tensor? cu_seqlens=None, SymInt max_seqlen=0, Tensor? bias=None, "
    "Tensor? position_key=None, Tensor? position_query=None, Tensor? position_slots=None, "
    "Tensor? prefix_gate=None"
)


class Options(NamedTuple):
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
    max_seqlen: int = 0
    bias: Tensor | None = None  # [1|B, H, T, S]
    # Of DeBERTa, `disentangled_prefix_attention`: without slots there is neither table.
    position_key: Tensor | None = None  # [H, slots, D], in the dtype of query
    position_query: Tensor | None = None  # likewise
    position_slots: Tensor | None = None  # int32 [2 M - 1]: the slot of i - j at i - j + M - 1
    prefix_gate: Tensor | None = None  # [R, H] in the dtype of lse; it has a gradient
