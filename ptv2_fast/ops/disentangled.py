"""Attention of DeBERTa: scores by content and by the distance of two tokens, behind a prefix."""

import torch
from torch import Tensor

from ptv2_fast.ops.attention import Positions, attend


def disentangled_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    position_key: Tensor | None,
    position_query: Tensor | None,
    position_slots: Tensor,
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    prefix_dropout_p: float = 0.0,
    prefix_gate: Tensor | None = None,
    seed: Tensor | None = None,
    check: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Disentangled attention (He et al., "DeBERTa", ICLR 2021, section 3.1) over [prefix ; tokens].

    The score of row i and token column j is, with s = position_slots[i - j],

        scale * (query[i] . key[j] + query[i] . position_key[s] + key[j] . position_query[s])

    A prefix column has no position: its score is scale * query[i] . prefix_key[p], and distances of
    tokens are what they are without a prefix (as the original P-Tuning v2 has it). The tables are
    those of a frozen model and get no gradient; query and key get what flows through them.

    Args:
        query: [B, H, T, D]; packed [N, H, D].
        key, value: as query: as many heads, and S = T.
        prefix_key, prefix_value: [H, P, D], or a bank [R, H, P, D].
        position_key: [H, slots, D], query's dtype: relative embeddings by the layer's key
            projection ("c2p"); None without that term.
        position_query: [H, slots, D]: by its query projection ("p2c"); None without that term.
        position_slots: int32 [2 M - 1], M >= T (packed: max_seqlen): entry i - j + M - 1 is the
            slot of the distance i - j, as `position_slots` makes it.
        scale: default (D * terms) ** -0.5, terms being 1, 2 or 3 with the tables that are given.
        check: on a GPU too, check the values of position_slots and of the other integer tensors.
        backend: "reference" forces one; None chooses by device.

    The others, the result and what is raised are those of `prefix_attention`.
    """
    if scale is None and isinstance(query, Tensor) and query.dim() > 0:
        terms = 1 + (position_key is not None) + (position_query is not None)
        scale = (query.shape[-1] * terms) ** -0.5
    return attend(
        (query, key, value, prefix_key, prefix_value), False, check, backend,
        key_mask, cu_seqlens, max_seqlen, prefix_index, prefix_lengths, None, None, None,
        scale, dropout_p, prefix_dropout_p, prefix_gate, seed,
        Positions(position_key, position_query, position_slots),
    )[0]  # fmt: skip


def position_slots(
    length: int, span: int, buckets: int = 0, device: torch.device | str | None = None,
    max_position: int | None = None,
) -> Tensor:  # fmt: skip
    """The slot of every distance in a text of `length` tokens, int32 [2 * length - 1].

    Args:
        length: M, at least 1.
        span: distances from -span to span - 1 have slots of their own, 0 to 2 * span - 1; those
            beyond share the outer ones.
        buckets: > 0 for the logarithmic buckets of DeBERTa v2 and v3 (`position_buckets`):
            distances from buckets / 2 on share buckets that grow with them.
        max_position: with buckets, the distance at which they end (`max_relative_positions`).
    """
    distances = torch.arange(1 - length, length, device=device)
    if buckets > 0 and max_position is not None and max_position > 0:
        middle = buckets // 2
        near = distances.abs() < middle
        capped = torch.where(near, middle - 1, distances.abs())
        # float32, as in the models' own code: a bucket's border may hang on the rounding.
        growth = torch.log(torch.tensor((max_position - 1) / middle))
        steps = torch.log(capped / middle) / growth.to(distances.device)
        far = (torch.ceil(steps * (middle - 1)) + middle).long() * distances.sign()
        distances = torch.where(capped <= middle, distances, far)
    return (distances + span).clamp(0, 2 * span - 1).to(torch.int32)
