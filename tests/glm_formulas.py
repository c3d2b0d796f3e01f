"""Tiny GLMs (2021), masks, and the published formulas in plain torch."""

import torch
from torch import Tensor

from ptv2_fast.encoders.glm import (
    GLMForConditionalGeneration,
    GLMForMultipleChoice,
    GLMForSequenceClassification,
    GLMForTokenClassification,
    GLMModel,
)
from tests.models import tiny_config

CLASSES = {
    "bare": GLMModel,
    "sequence": GLMForSequenceClassification,
    "choice": GLMForMultipleChoice,
    "token": GLMForTokenClassification,
    "lm": GLMForConditionalGeneration,
}
B, T, MASK, START = 3, 9, 57, 58
LENGTHS = torch.tensor([4, 9, 0])
PADDING = (torch.arange(T) < torch.tensor([[9], [6], [4]])).long()
HOLES = PADDING.clone()
HOLES[:2, 2] = 0
# Name -> what a forward gets, the padding [B, T] and the lengths of part A [B] that it means.
MASKS = {
    "nothing": ({}, None, None),
    "padding": ({"attention_mask": PADDING}, PADDING, None),
    "lengths": ({"context_lengths": LENGTHS}, None, LENGTHS),
    "published lengths": ({"attention_mask": LENGTHS}, None, LENGTHS),
    "one length": ({"attention_mask": 3}, None, torch.tensor([3, 3, 3])),
    "causal": ({"attention_mask": torch.tensor(0)}, None, torch.zeros(B)),
    "both": ({"attention_mask": HOLES, "context_lengths": LENGTHS}, HOLES, LENGTHS),
}


def tiny(head: str, **changes):
    torch.manual_seed(0)
    model = CLASSES[head](tiny_config("glm2021", **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def published_mask(padding: Tensor | None, lengths: Tensor | None) -> Tensor:
    """As build_mask_matrix, [B, T, T] of 0 and 1."""
    if lengths is None:
        mask = torch.ones(B, T, T)
    else:
        mask = torch.ones(T, T).tril().repeat(B, 1, 1)
        for row, length in enumerate(lengths.tolist()):
            mask[row, :, : int(length)] = 1
    return mask if padding is None else mask * padding[:, None]


def published_states(
    weights: dict[str, Tensor], ids: Tensor, positions: Tensor, mask: Tensor, prefixes: Tensor
) -> Tensor:
    """The published formulas; prefixes [L, 2, H, P, D], positions [B, 2, T]."""

    def linear(states: Tensor, name: str) -> Tensor:
        return states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(states: Tensor, name: str) -> Tensor:
        centred = states - states.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def heads(states: Tensor) -> Tensor:
        return states.view(B, T, prefixes.shape[2], -1).transpose(1, 2)

    hidden = weights["word_embeddings.weight"][ids]
    hidden = hidden + weights["transformer.position_embeddings.weight"][positions[:, 0]]
    hidden = hidden + weights["transformer.block_position_embeddings.weight"][positions[:, 1]]
    seen = torch.cat((torch.ones(B, T, prefixes.shape[3]), mask), dim=2)[:, None].to(hidden)
    for i, (prefix_key, prefix_value) in enumerate(prefixes):
        layer = f"transformer.layers.{i}"
        product = linear(
            norm(hidden, f"{layer}.input_layernorm"), f"{layer}.attention.query_key_value"
        )
        query, key, value = map(heads, product.split(hidden.shape[2], dim=2))
        key = torch.cat((prefix_key.expand(B, -1, -1, -1), key), dim=2)
        value = torch.cat((prefix_value.expand(B, -1, -1, -1), value), dim=2)
        scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
        scores = scores * seen + -65504.0 * (1 - seen)
        out = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        hidden = hidden + linear(out, f"{layer}.attention.dense")
        inner = linear(
            norm(hidden, f"{layer}.post_attention_layernorm"), f"{layer}.mlp.dense_h_to_4h"
        )
        inner = (
            0.5 * inner * (1 + torch.tanh(0.7978845608028654 * inner * (1 + 0.044715 * inner**2)))
        )
        hidden = hidden + linear(inner, f"{layer}.mlp.dense_4h_to_h")
    return norm(hidden, "transformer.final_layernorm")


def published_output(
    model, head: str, prefixes: Tensor, padding, lengths, ids, positions
) -> Tensor:
    """What a head makes of them, in float64; 0 for pads."""
    weights = {n.removeprefix("glm."): t.double() for n, t in model.state_dict().items()}
    mask = published_mask(padding, lengths)
    states = published_states(weights, ids, positions, mask, prefixes.double())
    if head in ("sequence", "choice"):
        inner = torch.tanh(states[:, 0] @ weights["dense.weight"].T + weights["dense.bias"])
        return inner @ weights["out_proj.weight"].T + weights["out_proj.bias"]
    if head == "token":
        states = states @ weights["classifier.weight"].T + weights["classifier.bias"]
    elif head == "lm":
        states = states @ weights["word_embeddings.weight"].T
    return states if padding is None else states * padding[..., None]


def output_of(model, head: str, padding: Tensor | None, **inputs) -> Tensor:
    if head == "choice":  # of the texts as choices of one question
        inputs = {n: t[None] if getattr(t, "ndim", 0) else t for n, t in inputs.items()}
    output = model(**inputs)
    logits = output.last_hidden_state if head == "bare" else output.logits
    logits = logits.T if head == "choice" else logits
    is_by_token = padding is not None and head not in ("sequence", "choice")
    return logits * padding[..., None] if is_by_token else logits
