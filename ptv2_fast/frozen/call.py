"""What one call of a frozen block is."""

from typing import NamedTuple

from torch import Tensor

from ptv2_fast.frozen.modules import Norm
from ptv2_fast.frozen.weights import BlockWeights
from ptv2_fast.ops.attention import Positions


class Dropout(NamedTuple):
    """The probabilities of a block's dropouts; 0 outside training."""

    attention: float = 0.0
    attention_output: float = 0.0
    activation: float = 0.0
    output: float = 0.0
    prefix: float = 0.0


class BlockCall(NamedTuple):
    """What one call of a block is, beside its tensors."""

    weights: BlockWeights
    dropout: Dropout
    policy: str
    chunk: int  # tokens that go through the feed-forward network at a time
    tokens: int  # N, rows that belong to a token; those behind them are not read
    max_seqlen: int
    first_token_only: bool  # compute the output for the first token of each sequence only
    next_norm: Norm | None  # pre-norm: that in front of the attention above, None = nothing is
    previous_norm: Norm | None  # whose output the input is; None where `previous_sum` is

    @property
    def attention_norm(self) -> Norm | None:
        """That of the sum behind the attention."""
        spec, weights = self.weights.spec, self.weights
        return weights.second_norm if spec.pre_norm else weights.first_norm

    @property
    def output_norm(self) -> Norm | None:
        """That of the sum behind the feed-forward network."""
        return self.next_norm if self.weights.spec.pre_norm else self.weights.second_norm


class AttentionInputs(NamedTuple):
    """What the attention of a layer gets beside its hidden states, without gradients."""

    cosine: Tensor | None = None  # [1 or B, T, rotary_dim], of positions
    sine: Tensor | None = None
    bias: Tensor | None = None  # [1, heads, T, T], added to the scores of tokens
    positions: Positions | None = None  # of disentangled attention


class BlockTensors(NamedTuple):
    """The tensors of one call that have no gradient."""

    cu_seqlens: Tensor  # int32 [B + 1]
    coordinates: Tensor  # int32 [N, 2]
    seed: Tensor | None  # int64 [1]
    previous_sum: Tensor | None  # [N, hidden] and fp32 [N, 2]: what the block below normalised
    previous_stats: Tensor | None
    cosine: Tensor | None  # fp32 [N, rotary_dim / 2], of each row's position
    sine: Tensor | None
    bias: Tensor | None  # as in AttentionInputs
    context_lengths: Tensor | None  # int32 [B], of packed rows
    position_key: Tensor | None = None  # as in `Positions`
    position_query: Tensor | None = None
    position_slots: Tensor | None = None
    prefix_index: Tensor | None = None  # int32 [B] and [R], of a bank of prefixes
    prefix_lengths: Tensor | None = None
