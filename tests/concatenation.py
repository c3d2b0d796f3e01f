"""Prefix attention as nobody here computes it: every row's own copy, in front of keys and values.

An attention function of transformers for plain models, on the masks that transformers' eager
attention gets; and a forward for the attention of models that ask for no function.
"""

import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME = "test_concatenation"
DISENTANGLED = "DisentangledSelfAttention"


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
        model: a plain model, whose layers run their attention once each, in order.
        prefixes: layer -> [2, H_kv, P, D].
    """
    calls = itertools.count()

    def concatenate(
        module, query, key, value, attention_mask, scaling, position_bias=None, **kwargs
    ):
        prefix = prefixes.get(next(calls))
        added = (attention_mask, position_bias)
        return attend(query, key, value, prefix, added, scaling), None

    def forward(module, hidden, attention_mask=None, position_bias=None, mask=None, **kwargs):
        if position_bias is None:
            position_bias = module.compute_bias(hidden.shape[1], hidden.shape[1])
        heads = position_bias.shape[1]
        query, key, value = (
            linear(hidden).unflatten(2, (heads, -1)).transpose(1, 2)
            for linear in (module.q, module.k, module.v)
        )
        scale = query.shape[3] ** -0.5 if type(module).__name__.startswith("MPNet") else 1.0
        added = attention_mask if mask is None else mask
        out, _ = concatenate(module, query, key, value, added, scale, position_bias)
        return module.o(out.flatten(2)), position_bias

    def disentangled(module, hidden, mask, *_, rel_embeddings=None, relative_pos=None, **__):
        query, key, value, terms, scale = disentangle(module, hidden, rel_embeddings, relative_pos)
        hidden_by_mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(
            ~mask.bool(), torch.finfo(query.dtype).min
        )
        added = (hidden_by_mask, terms)
        return attend(query, key, value, prefixes.get(next(calls)), added, scale).flatten(2), None

    with_own_code = [module for module in model.modules() if computes_itself(module)]
    for module in with_own_code:
        is_disentangled = type(module).__name__ == DISENTANGLED
        module.forward = functools.partial(disentangled if is_disentangled else forward, module)
    AttentionInterface.register(NAME, concatenate)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    old = model.config._attn_implementation
    if not with_own_code:
        set_attention(model, NAME)
    try:
        yield
    finally:
        for module in with_own_code:
            del module.forward
        set_attention(model, old)


def disentangle(
    module, hidden: Tensor, rel_embeddings: Tensor | None, relative_pos: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    """DeBERTa's query, key, value [B, H, T, D], scores by distance [B, H, T, T], scale.

    A row of a table for every pair of tokens, [H, T, T, D], as the formula of the paper has it.
    """
    heads, kinds = module.num_attention_heads, module.pos_att_type
    if hasattr(module, "in_proj"):
        weights = module.in_proj.weight.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(1, 2)
        query, key, value = (hidden @ weight.T for weight in weights)
        query, value = query + module.q_bias, value + module.v_bias
        names = ("pos_proj", "pos_q_proj")
    else:
        linears = (module.query_proj, module.key_proj, module.value_proj)
        query, key, value = (linear(hidden) for linear in linears)
        is_shared = module.share_att_key
        names = ("key_proj", "query_proj") if is_shared else ("pos_key_proj", "pos_query_proj")
    query, key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scale, terms = (query.shape[3] * (1 + len(kinds))) ** -0.5, []
    if rel_embeddings is not None:
        span = len(rel_embeddings) // 2
        slots = (relative_pos[0] + span).clamp(0, 2 * span - 1).long()
        for kind, name, heads_of_tokens, product in (
            ("c2p", names[0], query, "bhid,hijd->bhij"),
            ("p2c", names[1], key, "bhjd,hijd->bhij"),
        ):
            if kind in kinds:
                table = getattr(module, name)(rel_embeddings).unflatten(1, (heads, -1))
                by_pair = table.transpose(0, 1)[:, slots]
                terms.append(scale * torch.einsum(product, heads_of_tokens, by_pair))
    return query, key, value, sum(terms) if terms else None, scale


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Of all parts: some versions of transformers leave out those with their own configuration."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation(name)


def computes_itself(module) -> bool:
    """Whether this is attention that asks transformers for no function."""
    own = all(hasattr(module, name) for name in "qkvo") or type(module).__name__ == DISENTANGLED
    return own and "ALL_ATTENTION_FUNCTIONS" not in vars(sys.modules[type(module).__module__])
