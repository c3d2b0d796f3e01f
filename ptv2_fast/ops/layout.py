"""How the operator lays out what it allocates; every backend and every fake allocates alike."""

from torch import Tensor


def empty_token_major(like: Tensor) -> Tensor:
    """An empty [B, H, T, D] tensor whose [B, T, H, D] view is contiguous, as HF reshapes it."""
    batch, heads, tokens, head_dim = like.shape
    return like.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def empty_gradients(
    query: Tensor,
    key: Tensor,
    prefix_key: Tensor,
    needs_query: bool,
    needs_key_value: bool,
    needs_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five uninitialised gradients; one that is not needed is an empty(0)."""

    def token_gradient(like: Tensor, needed: bool) -> Tensor:
        return empty_token_major(like) if needed else like.new_empty(0)

    def prefix_gradient() -> Tensor:
        return prefix_key.new_empty(prefix_key.shape if needs_prefix else 0)

    return (
        token_gradient(query, needs_query),
        token_gradient(key, needs_key_value),
        token_gradient(key, needs_key_value),
        prefix_gradient(),
        prefix_gradient(),
    )
