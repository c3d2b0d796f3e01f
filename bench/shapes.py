"""Named real shapes of the benchmarks."""

from tests.inputs import Shape

HEADS = {"minilm": (12, 32), "base": (12, 64), "large": (16, 64)}  # heads, head_dim


def _named(*cases: tuple[str, int, int, int]) -> dict[str, Shape]:
    """Shapes by name from (encoder, batch, tokens, prefix)."""
    shapes = {}
    for encoder, batch, tokens, prefix in cases:
        heads, head_dim = HEADS[encoder]
        name = f"{encoder}-b{batch}-t{tokens}-p{prefix}"
        shapes[name] = Shape(batch, heads, tokens, tokens, prefix, head_dim)
    return shapes


# By device: batch 1 to 32, 64 to 512 tokens (MiniLM's 32 beside them), prefixes of 8 to 224.
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
    ),
}
