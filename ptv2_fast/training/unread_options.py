"""Which options of a run have no effect, because of its others."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from ptv2_fast.training.options import RunConfig

# Options that only some methods read. Not here: depth and start_from, which others refuse.
_PROMPTS = ("p-tuning-v2", "prompt-tuning", "p-tuning-v1")
METHODS_OF_OPTION: dict[str, tuple[str, ...]] = {
    "num_virtual_tokens": _PROMPTS,
    "init": _PROMPTS,
    "encoder_hidden_size": ("p-tuning-v2", "p-tuning-v1"),
    "prompt_encoder": ("p-tuning-v1",),
    **dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout"), ("lora",)),
    **dict.fromkeys(
        ("prefix_projection", "prefix_dropout", "position_offset", "prefix_gate", "train_biases",
         "train_norms", "low_rank", "low_rank_alpha", "low_rank_targets",
         "low_rank_learning_rate", "bias_learning_rate", "backbone", "recompute", "memory_budget",
         "backbone_dtype"),
        ("p-tuning-v2",),
    ),
}  # fmt: skip


class _Reader(NamedTuple):
    """What reads an option, beside the method.

    Attributes:
        options: those that decide whether a run has it.
        is_there: whether a run has it.
        without: the words for its lack.
    """

    options: tuple[str, ...]
    is_there: Callable[[RunConfig], bool]
    without: str


_FALLS_AT_ITS_END = _Reader(
    ("schedule",),
    lambda run: run.training.schedule == "warmup_stable_decay",
    "any schedule but warmup_stable_decay",
)
READERS = {
    "encoder_hidden_size": _Reader(
        ("prefix_projection", "method"),
        lambda run: run.model.prefix_projection or run.model.method == "p-tuning-v1",
        "a run without --prefix-projection",
    ),
    "bias_learning_rate": _Reader(
        ("train_biases", "train_norms"),
        lambda run: run.model.train_biases or run.model.train_norms,
        "a run without --train-biases or --train-norms",
    ),
    "low_rank_learning_rate": _Reader(
        ("low_rank",), lambda run: run.model.low_rank is not None, "a run without --low-rank"
    ),
    "decay_ratio": _FALLS_AT_ITS_END,
    "decay_type": _FALLS_AT_ITS_END,
    "schedule_decay": _Reader(
        ("schedule",),
        lambda run: run.training.schedule == "exponential",
        "any schedule but exponential",
    ),
}


def options_without_effect(
    run: RunConfig, names: Iterable[str], varied: Iterable[str] = ()
) -> dict[str, str]:
    """Those options of a run, among some, that it does not read, and what does not read them.

    Args:
        run: one, or what a search or an ablation starts from.
        names: of the options.
        varied: options in which the runs of that differ: some may read what the first does not.
    """
    method, found, varied = run.model.method, {}, set(varied)
    for name in names:
        reader = READERS.get(name)
        if method not in METHODS_OF_OPTION.get(name, (method,)):
            if "method" not in varied:
                found[name] = f"the method {method}"
        elif reader is not None and varied.isdisjoint(reader.options) and not reader.is_there(run):
            found[name] = reader.without
    return found
