"""Prefix attention as nobody here computes it: every row's own copy, in front of keys and values.

An attention function of transformers for plain models, on the masks that transformers' eager
attention gets.
"""

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME = "test_concatenation"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Tensor | None,
    added: tuple[Tensor | None, ...],
    scale: float,
) -> Tensor:
    """Attention over a prefix and the tokens, [B, T, H, D].

    Args:
        query: [B, H, T, D].
        key, value: [B, H_kv, T, D].
        prefix: keys and values, [2, H_kv, P, D], or None.
        added: what is added to the scores of tokens, [B or 1, H or 1, T or 1, T]: a mask, a bias.
        scale: of the products.
    """
    if prefix is not None:
        rows = prefix[:, None].expand(-1, len(query), -1, -1, -1)
        key, value = torch.cat((rows[0], key), dim=2), torch.cat((rows[1], value), dim=2)
    group = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    for term in added:
        if term is not None:
            columns = key.shape[2] - term.shape[3]
            scores = scores + torch.nn.functional.pad(term, (columns, 0))
    return (scores.softmax(-1) @ value).transpose(1, 2)


@contextlib.contextmanager
def concatenating_attention(model: PreTrainedModel, prefixes: dict[int, Tensor]) -> Iterator[None]:
    """Within the context a plain model has prefixes.

    Args:
        model: a plain model, whose layers call their attention once each, in order.
        prefixes: layer -> [2, H_kv, P, D].
    """
    calls = itertools.count()

    def concatenate(
        module, query, key, value, attention_mask, scaling, position_bias=None, **kwargs
    ):
        prefix = prefixes.get(next(calls))
        added = (attention_mask, position_bias)
        return attend(query, key, value, prefix, added, scaling), None

    AttentionInterface.register(NAME, concatenate)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    old = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(old)
