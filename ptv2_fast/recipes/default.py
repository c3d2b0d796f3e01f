"""The preset that `ptv2-fast train` starts from where neither a method nor a recipe is named."""

import math
from typing import Any

from ptv2_fast.recipes import read_recipe
from ptv2_fast.training.methods import missing_inside
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.pretrained import load_config

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

    Args:
        config: the run by what was given, and the defaults of the options.

    Returns:
        The name of the preset, and those of its options that go with what was given.

    Raises:
        OSError, ValueError: when the encoder's configuration cannot be read.
    """
    assert config.model.model is not None
    encoder = load_config(config.model.model)
    width = getattr(encoder, "hidden_size", None) or _WIDTHS["base"]
    size = min(_WIDTHS, key=lambda name: abs(math.log(width / _WIDTHS[name])))
    name = f"preset-{_KINDS.get(config.data.family, 'classification')}-{size}"
    left_out = [*_NOT_TAKEN, *missing_inside(encoder)]
    if config.training.max_steps or config.training.max_seconds:
        left_out.append("num_train_epochs")
    if config.model.prefix_projection or config.model.num_virtual_tokens == 0:
        left_out.append("init")  # from tokens
    options = read_recipe(name)
    if options.get("max_length", 0) > getattr(encoder, "max_position_embeddings", math.inf):
        left_out += ["max_length", "doc_stride"]
    return name, {n: v for n, v in options.items() if n not in left_out}
