"""Prompt depth: which layers get a prefix, as text that counts the layers from 1."""

import re

_PART = re.compile(r"(\d+)(?:-(\d+))?")


def parse_depth(text: str) -> tuple[int, ...]:
    """The indices, from 0, of the layers in a text such as "1-4,9".

    Layer 1 stands next to the embeddings, as in the paper's ablation (figure 3).

    Raises:
        ValueError: for text of another form, a layer 0, a range that runs down, or a layer twice.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"depth: expected layers counted from 1 as '1-4,9', got {text!r}")
        first = int(match[1])
        last = int(match[2] or first)
        if not 1 <= first <= last:
            raise ValueError(
                f"depth: expected layers counted from 1, each range upwards, got {part.strip()!r} "
                f"in {text!r}"
            )
        layers += range(first - 1, last)
    if len(set(layers)) < len(layers):
        raise ValueError(f"depth: expected every layer once, got {text!r}")
    return tuple(sorted(layers))


def check_depth(text: str, num_layers: int) -> None:
    """Check that a model of `num_layers` layers has those of a depth.

    Raises:
        ValueError: when it has not.
    """
    deepest = parse_depth(text)[-1] + 1
    if deepest > num_layers:
        raise ValueError(
            f"depth: expected layers 1 to {num_layers}, which the model has, got {text!r}"
        )
