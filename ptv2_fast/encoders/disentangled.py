"""The attention of DeBERTa v1, v2 and v3: its products, and the tables of its relative positions.

Both kinds of module have one name. v1 makes query, key and value of a head behind each other, in
one product whose biases lie beside it; v2 has a linear layer for each.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from ptv2_fast.ops.attention import Positions
from ptv2_fast.ops.disentangled import position_slots

MODULE = "DisentangledSelfAttention"
_TERMS = ("c2p", "p2c")


def unserved_option(backbone: Any) -> str | None:
    """What of a DeBERTa is not served, as "name: what it is"; None when all is."""
    attentions = [layer.attention.self for layer in backbone.encoder.layer]
    if any(getattr(attention, "talking_head", False) for attention in attentions):
        return "config.talking_head False, got True (it mixes the scores of heads)"
    for term in dict.fromkeys(term for module in attentions for term in module.pos_att_type):
        if term not in _TERMS:
            return f"config.pos_att_type of {' and '.join(_TERMS)}, got {term!r}"
    if getattr(backbone, "z_steps", 0) > 1:
        return f"z_steps at most 1, got {backbone.z_steps} (the last layer runs several times)"
    return None


def has_fused_inputs(attention: Any) -> bool:
    """Whether this is v1's module."""
    return hasattr(attention, "in_proj")


def score_scale(attention: Any) -> float:
    """The factor on its scores, whether or not the terms that it counts are there."""
    terms = attention.pos_att_type
    count = len(terms) if has_fused_inputs(attention) else len(set(terms) & set(_TERMS))
    width = attention.all_head_size // attention.num_attention_heads
    return 1 / math.sqrt(width * (1 + count))


def project(attention: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of states [B, T, hidden], each [B, H, T, D]."""
    heads = attention.num_attention_heads
    if not has_fused_inputs(attention):
        linears = (attention.query_proj, attention.key_proj, attention.value_proj)
        query, key, value = (linear(states).unflatten(-1, (heads, -1)) for linear in linears)
    else:
        joined = attention.in_proj(states)
        query, key, value = (part_of_product(attention, joined, index) for index in range(3))
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def part_of_product(attention: Any, joined: Tensor, index: int) -> Tensor:
    """Query, key or value (0, 1, 2), [..., H, D], of v1's one product, with its bias."""
    heads = attention.num_attention_heads
    part = joined.unflatten(-1, (heads, 3, -1))[..., index, :]
    bias = (attention.q_bias, None, attention.v_bias)[index]
    return part if bias is None else part + bias.to(part.dtype).view(heads, -1)


def table_projections(attention: Any) -> tuple[Any, Any]:
    """The layers that make a table of keys and one of queries of relative embeddings, or None."""
    if not attention.relative_attention:
        return None, None
    if has_fused_inputs(attention):
        names = ("pos_proj", "pos_q_proj")
    elif attention.share_att_key:
        names = ("key_proj", "query_proj")
    else:
        names = ("pos_key_proj", "pos_query_proj")
    key, query = (
        getattr(attention, name) if term in attention.pos_att_type else None
        for name, term in zip(names, _TERMS, strict=True)
    )
    return key, query


class RelativePositions:
    """The relative positions of one DeBERTa, for `disentangled_prefix_attention`.

    Its weights are frozen, so a layer's tables are computed once and kept. They are computed again
    when a weight that they are made of has changed, and, over the distances of that text, in each
    forward of a layer whose relative embeddings have dropout.

    Args:
        encoder: the module around the layers.
    """

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self._tables: dict[nn.Module, tuple[object, tuple[Tensor | None, Tensor | None]]] = {}
        self._slots: dict[tuple, tuple[Tensor, int, int]] = {}

    def __getstate__(self) -> dict:
        return {"encoder": self.encoder, "_tables": {}, "_slots": {}}

    @property
    def has_convolution(self) -> bool:
        """Whether one follows the first layer, on padded states."""
        return getattr(self.encoder, "conv", None) is not None

    def of(
        self, attention: Any, embeddings: Tensor | None, tokens: int, dtype: torch.dtype
    ) -> Positions | None:
        """What a layer's attention adds to its scores; None when nothing is.

        Args:
            attention: the attention module of the layer.
            embeddings: of relative positions, [slots, hidden], as the encoder hands them down.
            tokens: T.
            dtype: of the attention's queries.

        Raises:
            ValueError: for weights that train.
        """
        projections = table_projections(attention)
        if embeddings is None or projections == (None, None):
            return None
        weights = self._weights(projections)
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            raise ValueError(
                "rel_embeddings: expected relative positions without a gradient, got some that "
                "train (modules_to_save may not name them)"
            )
        device, dropout = embeddings.device, attention.pos_dropout
        with torch.inference_mode(False), torch.no_grad():  # what is kept serves training too
            slots, first, last = self._slots_of(attention, tokens, device)
            if dropout.training and dropout.p > 0:
                rows = dropout(embeddings.detach())[first : last + 1]
                return Positions(*_tables(attention, projections, rows, dtype), slots - first)
            if torch.compiler.is_compiling() or torch.jit.is_tracing():
                return Positions(*_tables(attention, projections, embeddings, dtype), slots)
            state = (dtype, [(w.data_ptr(), w._version, w.dtype, w.device) for w in weights])
            kept = self._tables.get(attention)
            if kept is None or kept[0] != state:
                kept = state, _tables(attention, projections, embeddings, dtype)
                self._tables[attention] = kept
        return Positions(*kept[1], slots)

    def _weights(self, projections: tuple[Any, Any]) -> list[Tensor]:
        """What the tables of a layer are made of."""
        norm = getattr(self.encoder, "LayerNorm", None)
        modules = (self.encoder.rel_embeddings, norm, *projections)
        return [
            weight
            for module in modules
            if module is not None
            for weight in (*module.parameters(), *module.buffers())
        ]

    def _slots_of(
        self, attention: Any, tokens: int, device: torch.device
    ) -> tuple[Tensor, int, int]:
        """The slots of a text's distances, and the lowest and the highest of them."""
        buckets = getattr(attention, "position_buckets", -1)
        longest = attention.max_relative_positions
        key = (tokens, buckets, longest, device)
        found = self._slots.get(key)
        if found is None:
            span = buckets if buckets > 0 else longest
            slots = position_slots(tokens, span, max(buckets, 0), None, longest)
            found = slots.to(device), int(slots[0]), int(slots[-1])
            if not torch.compiler.is_compiling():
                self._slots[key] = found
        return found


def _tables(
    attention: Any, projections: tuple[Any, Any], embeddings: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The tables of keys and of queries, each [H, slots, D] or None."""
    key, query = (
        None
        if linear is None
        else linear(embeddings)
        .to(dtype)
        .unflatten(-1, (attention.num_attention_heads, -1))
        .transpose(0, 1)
        .contiguous()
        for linear in projections
    )
    return cast("Tensor | None", key), cast("Tensor | None", query)
