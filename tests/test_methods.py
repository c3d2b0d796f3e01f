"""Methods: prompt depth, prompt encoders, LoRA; what they train, save and resume."""

import pytest

from ptv2_fast.training.depth import parse_depth
from ptv2_fast.training.methods import prefix_config, prepare_model
from ptv2_fast.training.options import ModelOptions
from tests.models import one_thread, tiny_model  # noqa: F401


def options(method: str, **more) -> ModelOptions:
    return ModelOptions(model="tiny", method=method, num_virtual_tokens=5, **more)


@pytest.mark.parametrize(
    ("text", "layers"),
    [("1-4", (0, 1, 2, 3)), ("21-24", (20, 21, 22, 23)), ("9, 1-2", (0, 1, 8)), ("3", (2,))],
)
def test_depth_counts_layers_from_one(text, layers):
    assert parse_depth(text) == layers
    assert prefix_config(options("p-tuning-v2", depth=text)).layers == layers


@pytest.mark.parametrize("text", ["", "4-1", "0-3", "1-4,4", "1-4-8", "a", "-1", "1,,2"])
def test_a_bad_depth_is_named_before_a_model_is_loaded(text):
    with pytest.raises(ValueError, match=r"^depth: expected"):
        options("p-tuning-v2", depth=text)


def test_a_depth_beyond_the_model_or_without_a_prefix_is_refused():
    with pytest.raises(ValueError, match="depth: expected layers 1 to 3, which the model has"):
        prepare_model(tiny_model(), options("p-tuning-v2", depth="2-4"))
    with pytest.raises(ValueError, match="depth: expected None for the method fine-tuning"):
        options("fine-tuning", depth="1")
    model = tiny_model()
    prepare_model(model, options("p-tuning-v2", depth="2-3"))
    assert model.prefix_encoder.layers == (1, 2)
