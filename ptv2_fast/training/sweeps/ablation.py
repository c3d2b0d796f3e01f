"""The paper's ablations as sweeps: prompt depth, length, reparameterisation and head.

P-Tuning v2 (Liu et al. 2022): figure 3 adds the prompt to more and more layers, from the first up
and from the last down; figure 4 and the appendix vary its length with and without the MLP; table 4
sets a linear head against the language model's.
"""

from collections.abc import Sequence
from typing import Any

from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.pretrained import load_config
from ptv2_fast.training.sweeps.plan import Sweep, sweep_of

LENGTHS = (4, 8, 16, 32, 64, 128)
DEPTH_STEPS = 6  # as in figure 3: 4, 8, ... 24 of 24 layers


def depth_sweep(
    base: RunConfig, steps: int = DEPTH_STEPS, seeds: Sequence[int] | None = None
) -> Sweep:
    """The prefix in the first and in the last layers, more and more of them.

    Args:
        base: the run; its depth must not be set.
        steps: how many depths from few layers to all; no more than there are layers.
        seeds: None = the one of `base`.

    Raises:
        ValueError: for another method than p-tuning-v2, a depth in `base`, or steps out of range.
        OSError: when the model's configuration cannot be read.
    """
    _require_prefix(base, "depth")
    if base.model.depth is not None:
        raise ValueError(
            f"depth: expected None, since the ablation sets it, got {base.model.depth}"
        )
    assert base.model.model is not None
    count = load_config(base.model.model).num_hidden_layers
    if not 1 <= steps <= count:
        raise ValueError(f"steps: expected 1 to {count}, the layers of the model, got {steps}")
    variants = {f"{order}-{depth}": {"depth": depth} for order, depth in depths(count, steps)}
    return sweep_of("depth", base, variants, seeds)


def depths(count: int, steps: int) -> list[tuple[str, str]]:
    """The order of each setting for `count` layers, and its layers; figure 3 with 24 and 6.

    The order is "ascending", "descending" or, once for both, "all".
    """
    sizes = [count * step // steps for step in range(1, steps)]
    ascending = [("ascending", f"1-{size}") for size in sizes]
    descending = [("descending", f"{count - size + 1}-{count}") for size in sizes]
    return [*ascending, *descending, ("all", f"1-{count}")]


def length_sweep(
    base: RunConfig, values: Sequence[int] = LENGTHS, seeds: Sequence[int] | None = None
) -> Sweep:
    """Every length with a plain table and with the MLP, from N(0, 0.02), as an MLP starts.

    Raises:
        ValueError: for another method than p-tuning-v2, or repeated or bad lengths.
    """
    _require_prefix(base, "length")
    if not values or len(set(values)) < len(values):
        raise ValueError(f"values: expected different lengths, got {list(values)}")
    variants = {
        f"{name}-{value}": {"num_virtual_tokens": value, **projection}
        for name, projection in _table_and_mlp(base).items()
        for value in values
    }
    return sweep_of("length", base, variants, seeds)


def reparam_sweep(base: RunConfig, seeds: Sequence[int] | None = None) -> Sweep:
    """The prefix as a plain table and computed by an MLP, from N(0, 0.02), as an MLP starts.

    Raises:
        ValueError: for another method than p-tuning-v2.
    """
    _require_prefix(base, "reparam")
    return sweep_of("reparam", base, _table_and_mlp(base), seeds)


def head_sweep(base: RunConfig, seeds: Sequence[int] | None = None) -> Sweep:
    """A new linear head against the language model's head with label words.

    Args:
        base: the run; one with the head "lm" may name the words, the verbalizer.
        seeds: None = the one of `base`.

    Raises:
        ValueError: for a task of another family than text-classification.
    """
    if base.data.family != "text-classification":
        raise ValueError(
            f"task: expected text-classification for the ablation of the head, got {base.data.task}"
        )
    verbalizers = {"linear": None, "lm": base.data.verbalizer}
    variants = {head: {"head": head, "verbalizer": words} for head, words in verbalizers.items()}
    return sweep_of("head", base, variants, seeds)


def _table_and_mlp(base: RunConfig) -> dict[str, dict[str, Any]]:
    """The prefix as a table and by an MLP, by name; both start alike."""
    start = {} if base.model.init == "normal" else {"init": "normal"}
    return {
        name: {"prefix_projection": projection, **start}
        for name, projection in (("plain", False), ("mlp", True))
    }


def _require_prefix(base: RunConfig, kind: str) -> None:
    if base.model.method != "p-tuning-v2":
        raise ValueError(
            f"method: expected p-tuning-v2 for the ablation of {kind}, got {base.model.method}"
        )
