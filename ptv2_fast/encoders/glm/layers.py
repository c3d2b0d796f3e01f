"""The layers of GLM (2021): pre-norm, with one product for query, key and value.

Attention is whatever function of transformers the configuration names. Parts have the names that
they have in published checkpoints.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ptv2_fast.encoders.glm.configuration import GLMConfig


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,  # [B, H, T, D]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # added to the scores
    scaling: float,
    dropout: float = 0.0,
    **unused: object,
) -> tuple[Tensor, Tensor]:
    """Attention in plain torch, [B, T, H, D], and its probabilities."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    dropped = nn.functional.dropout(probabilities, dropout, module.training)
    return (dropped @ value).transpose(1, 2), probabilities


class GLMAttention(nn.Module):
    """Query, key and value lie one behind the other in one product, each with its heads."""

    is_causal = False

    def __init__(self, config: GLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.attention_dropout = nn.Dropout(config.attention_dropout_prob)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.output_dropout = nn.Dropout(config.output_dropout_prob)

    def forward(self, hidden_states: Tensor, attention_mask: Any, **kwargs: Any) -> Tensor:
        """[B, T, hidden] -> the same; the rest is for the attention function."""
        parts = self.query_key_value(hidden_states).chunk(3, dim=-1)
        heads = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        attend = ALL_ATTENTION_FUNCTIONS.get(
            self.config._attn_implementation, eager_attention_forward
        )
        out, _ = attend(
            self,
            *heads,
            attention_mask,
            dropout=self.attention_dropout.p if self.training else 0.0,
            scaling=self.head_dim**-0.5,
            **kwargs,
        )
        return self.output_dropout(self.dense(out.flatten(2)))


class GLMNetwork(nn.Module):
    """A plain feed-forward network, four times as wide inside."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dense_4h_to_h = nn.Linear(4 * config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.output_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, hidden] -> the same."""
        expanded = self.activation(self.dense_h_to_4h(hidden_states))
        return self.dropout(self.dense_4h_to_h(expanded))


class GLMBlock(GradientCheckpointingLayer):
    """One layer: both branches begin with a norm."""

    def __init__(self, config: GLMConfig, layer_idx: int) -> None:
        super().__init__()
        width, epsilon = config.hidden_size, config.layernorm_epsilon
        self.input_layernorm = nn.LayerNorm(width, epsilon)
        self.attention = GLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(width, epsilon)
        self.mlp = GLMNetwork(config)

    def forward(self, hidden_states: Tensor, attention_mask: Any, **kwargs: Any) -> Tensor:
        """[B, T, hidden] -> the same."""
        normal = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.attention(normal, attention_mask, **kwargs)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class GLMStack(nn.Module):
    """Holds tables of positions, layers and the last norm, which `GLMModel` runs."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        rows, width = config.max_sequence_length + 1, config.hidden_size
        self.embedding_dropout = nn.Dropout(config.embedding_dropout_prob)
        self.position_embeddings = nn.Embedding(rows, width)
        self.block_position_embeddings = nn.Embedding(rows, width)
        self.layers = nn.ModuleList(GLMBlock(config, i) for i in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(width, config.layernorm_epsilon)
