"""What kind of block an encoder layer is, in data, and what of it a policy keeps.

Every layer is two residual branches, attention and a feed-forward network:

    post-norm    Y = norm_1(X + attention(X))         Z = norm_2(Y + network(Y))
    pre-norm     Y = X + attention(norm_1(X))         Z = Y + network(norm_2(Y))

In both a sum is followed by a norm: in a pre-norm block, that of the next branch. So one fused
operator ends both branches of both kinds, and both read the same tensors backward.
"""

from dataclasses import dataclass, replace

POLICIES = ("none", "ffn", "ffn+qkv", "block")  # in the order of falling memory
_STATS_BYTES = 8  # mean and 1 / deviation of one row, fp32
_LSE_BYTES = 4


@dataclass(frozen=True)
class BlockSpec:
    """The form of a block; its sizes are those of its modules.

    Args:
        pre_norm: the norms stand in front of the branches, and not behind their sums.
        subtract_mean: the norms are LayerNorms, with or without a bias; else RMSNorms.
        activation: of the feed-forward network, a name of ops/activations.py.
        gate: None for a plain network; of a gated one the half of the first product that is
            activated, "first" or "second".
        rotary: None, or the pairs that are rotated: "half" (i, i + D / 2), "interleaved"
            (2i, 2i + 1).
        scale: of the scores; None = head_dim ** -0.5.
        is_causal: no later row is visible to a row.
        window: rows at most so far away are visible to a row; None = all.
        by_head: one linear layer gives query, key and value, of each head one after the other.
    """

    pre_norm: bool = False
    subtract_mean: bool = True
    activation: str = "gelu"
    gate: str | None = None
    rotary: str | None = None
    scale: float | None = None
    is_causal: bool = False
    window: int | None = None
    by_head: bool = False


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a block.

    Args:
        hidden, intermediate: widths of the residual stream and of the activation.
        heads, key_value_heads, head_dim: of the attention.
        is_gated: the first product of the feed-forward network is twice as wide.
        element_bytes: of the matrix products' dtype.
        residual_bytes: of the residual stream's dtype, which differs under autocast only.
    """

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dim: int
    is_gated: bool
    element_bytes: int
    residual_bytes: int

    @property
    def expanded(self) -> int:
        """Width of the first product of the feed-forward network."""
        return (1 + self.is_gated) * self.intermediate

    @property
    def query_key_value(self) -> int:
        """Width of the product that gives query, key and value."""
        return (self.heads + 2 * self.key_value_heads) * self.head_dim

    def bytes_per_token(self, name: str) -> int:
        """Of one of the tensors that `kept_names` knows."""
        product, residual = self.element_bytes, self.residual_bytes
        query = self.heads * self.head_dim
        return {
            "residual": self.hidden * residual,
            "input": self.hidden * residual,
            "query": query * product,
            "key_value": 2 * self.key_value_heads * self.head_dim * product,
            "attention_out": query * product,
            "lse": self.heads * _LSE_BYTES,
            "attention_sum": self.hidden * residual,
            "attention_stats": _STATS_BYTES,
            "expanded": self.expanded * product,
            "output_sum": self.hidden * residual,
            "output_stats": _STATS_BYTES,
        }[name]


@dataclass(frozen=True)
class Surroundings:
    """What stands around a block in its encoder, as far as the kept tensors depend on it.

    Args:
        needs_input_gradient: something below trains. The lowest prefixed block has none: its
            backward pass ends at the prefix and reads no key and no value.
        has_previous: the block below hands up the sum and the statistics of its last norm, from
            which the input is computed again.
        has_separate_input: the input of the attention is not the residual (pre-norm).
        has_next_norm: a norm follows the last sum: always in a post-norm block, below the last
            one in others.
        trains_projections: biases of query, key and value train, or the norms of their heads: their
            gradients are needed in any case.
        trains_input_norm: the norm that gives a separate input trains. In the lowest block it
            stands alone, keeps the residual itself and needs the gradient of the input.
        trains_input_matrix: an update of the matrix of query, key and value trains: its gradient
            needs the input.
    """

    needs_input_gradient: bool = True
    has_previous: bool = True
    has_separate_input: bool = False
    has_next_norm: bool = True
    trains_projections: bool = False
    trains_input_norm: bool = False
    trains_input_matrix: bool = False

    def of_lowest(self) -> "Surroundings":
        """The same around the lowest block that has a backward pass."""
        return replace(self, needs_input_gradient=self.trains_input_norm, has_previous=False)


UPPER_BLOCK = Surroundings()  # of a post-norm encoder


def kept_names(policy: str, around: Surroundings) -> tuple[str, ...]:
    """The tensors that a block keeps for its backward pass.

    block.py saves them, memory.py sums their bytes. "ffn+qkv" keeps the query of a block without a
    gradient below, since it is no larger than the input that it would be computed from.

    Args:
        policy: one of POLICIES.
        around: what stands around the block.
    """
    names: list[str] = []
    needs_projections = around.needs_input_gradient or around.trains_projections
    if policy == "block":
        if not around.has_previous:
            names += ["residual", "input"] if around.has_separate_input else ["residual"]
    else:
        if not needs_projections:
            names += ["query"]
        elif policy in ("none", "ffn"):
            names += ["query", "key_value"]
        elif not around.has_previous:
            names += ["input" if around.has_separate_input else "residual"]
        names += ["attention_out", "lse", "attention_sum", "attention_stats"]
        if policy == "none":
            names += ["expanded"]
    if around.has_next_norm:
        names += ["output_sum", "output_stats"]
    if not around.has_previous:
        input = "input" if around.has_separate_input else "residual"
        needed = ["residual"] * around.trains_input_norm + [input] * around.trains_input_matrix
        names += [name for name in dict.fromkeys(needed) if name not in names]
    return tuple(names)
