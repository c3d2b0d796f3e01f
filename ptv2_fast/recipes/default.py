"""The preset that `ptv2-fast train` starts from where neither a method nor a recipe is named."""

import math
from typing import Any

from ptv2_fast.recipes import options_beside
from ptv2_fast.tasks.option_table import GIVEN
from ptv2_fast.training.methods import missing_inside, room_for_text
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.pretrained import load_config
from ptv2_fast.training.warm_start import options_of_start

_KINDS = {
    "token-classification": "tagging",
    "semantic-role-labeling": "tagging",
    "question-answering": "qa",
}
_WIDTHS = {"minilm": 384, "base": 768, "large": 1024}
# Of the encoder and the machine that a preset names, not of the task.
_NOT_TAKEN = ("model", "bf16", "backbone_dtype")


def default_recipe(config: RunConfig) -> tuple[str, dict[str, Any]]:
    """The preset of a task and the width of an encoder, without what the encoder cannot do.

    What trains is that of the adapter that training starts from, where there is one.

    Args:
        config: the run by what was given, and the defaults of the options.

    Returns:
        The name of the preset, and those of its options that go with what was given.

    Raises:
        OSError, ValueError: when the encoder's configuration cannot be read, or the adapter's.
    """
    assert config.model.model is not None
    encoder = load_config(config.model.model)
    width = getattr(encoder, "hidden_size", None) or _WIDTHS["base"]
    size = min(_WIDTHS, key=lambda name: abs(math.log(width / _WIDTHS[name])))
    name = f"preset-{_KINDS.get(config.data.family, 'classification')}-{size}"
    left_out = [*_NOT_TAKEN, *missing_inside(encoder)]
    if config.training.max_steps or config.training.max_seconds:
        left_out.append("num_train_epochs")
    values = config.options()
    given = {name: values[name] for name in values[GIVEN]}
    options = options_beside(name, given) | options_of_start(config.model)
    shown = options | given
    taken = shown["num_virtual_tokens"] if shown.get("position_offset") == "prefix" else 0
    if options.get("max_length", 0) > room_for_text(encoder) - taken:
        left_out += ["max_length", "doc_stride"]
    return name, {n: v for n, v in options.items() if n not in left_out}
