"""Named real shapes of the benchmarks."""

from dataclasses import dataclass

from tests.inputs import Shape


@dataclass(frozen=True)
class AttentionShape(Shape):
    """With what else decides about the scores.

    Args:
        window: tokens at most so far away are visible to a row, beside the prefix; None = all.
        has_bias: an additive bias [1, heads, tokens, tokens], as of relative positions.
        has_positions: both position terms of DeBERTa v3, 256 buckets over 512 distances.
    """

    window: int | None = None
    has_bias: bool = False
    has_positions: bool = False

    @property
    def is_plain(self) -> bool:
        return self.window is None and not self.has_bias and not self.has_positions


HEADS = {"minilm": (12, 32), "base": (12, 64), "large": (16, 64)}  # heads, head_dim


def _named(
    *cases: tuple[str, int, int, int],
    window: int | None = None,
    has_bias: bool = False,
    has_positions: bool = False,
) -> dict[str, AttentionShape]:
    """Shapes by name from (encoder, batch, tokens, prefix)."""
    shapes = {}
    for encoder, batch, tokens, prefix in cases:
        heads, head_dim = HEADS[encoder]
        name = f"{encoder}-b{batch}-t{tokens}-p{prefix}"
        name += "" if window is None else f"-w{window}"
        name += "-bias" * has_bias + "-positions" * has_positions
        shapes[name] = AttentionShape(
            batch, heads, tokens, tokens, prefix, head_dim,
            window=window, has_bias=has_bias, has_positions=has_positions,
        )  # fmt: skip
    return shapes


WINDOW = 64  # ModernBERT's
POSITION_BUCKETS, MOST_DISTANT = 256, 512  # of DeBERTa v3
# By device: batch 1 to 32, 64 to 512 tokens (MiniLM's 32 beside them), prefixes of 8 to 224; then
# windows as ModernBERT's, biases as those of T5 and MPNet, and positions as DeBERTa's.
ATTENTION_SHAPES = {
    "cpu": _named(
        ("minilm", 32, 32, 100),
        ("base", 32, 64, 8),
        ("base", 16, 64, 8),
        ("base", 1, 64, 224),
        ("base", 1, 128, 20),
        ("base", 8, 128, 20),
        ("base", 8, 128, 100),
        ("base", 4, 128, 128),
        ("base", 2, 256, 224),
        ("base", 2, 384, 16),
        ("base", 2, 512, 128),
        ("large", 4, 128, 128),
        ("large", 8, 128, 100),
        ("large", 2, 256, 64),
        ("large", 1, 512, 20),
        ("large", 1, 512, 128),
    )
    | _named(("base", 4, 512, 20), ("base", 2, 2048, 20), window=WINDOW)
    | _named(("base", 4, 512, 20), has_bias=True)
    | _named(
        ("base", 8, 64, 20),
        ("base", 8, 128, 20),
        ("base", 4, 256, 20),
        ("base", 2, 512, 20),
        ("base", 2, 512, 100),
        has_positions=True,
    ),
    "cuda": _named(
        ("minilm", 32, 32, 100),
        ("base", 32, 64, 8),
        ("base", 32, 64, 224),
        ("base", 1, 128, 20),
        ("base", 32, 128, 20),
        ("base", 32, 128, 128),
        ("base", 16, 256, 224),
        ("base", 32, 384, 16),
        ("base", 16, 512, 128),
        ("base", 32, 512, 128),
        ("large", 1, 512, 20),
        ("large", 32, 128, 20),
        ("large", 32, 128, 100),
        ("large", 16, 256, 64),
        ("large", 32, 512, 128),
    )
    | _named(("base", 32, 512, 20), ("base", 8, 2048, 20), window=WINDOW)
    | _named(("base", 32, 512, 20), has_bias=True)
    | _named(
        ("base", 32, 128, 20), ("base", 16, 512, 20), ("large", 16, 512, 100), has_positions=True
    ),
}
