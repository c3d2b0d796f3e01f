"""Adapters of tiny models for the tests, and what damages their files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import ptv2_fast
from ptv2_fast import PTuningV2Config
from tests.models import tiny_model

FILES = ["ptv2_config.json", "ptv2_adapter.safetensors"]
HUGE = 10**12


def attached(model_type: str = "bert", head: str = "token", overrides=None, **fields):
    model = tiny_model(model_type, head, **(overrides or {}))
    ptv2_fast.attach(model, PTuningV2Config(**{"num_virtual_tokens": 5, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def plain_twin(model, **overrides):
    """A model of the same class and backbone, with another head."""
    twin = type(model)(type(model.config)(**{**model.config.to_dict(), **overrides})).eval()
    backbone = {n: t for n, t in model.state_dict().items() if n in model._keys_to_ignore_on_save}
    twin.load_state_dict(backbone, strict=False)
    return twin


def assert_refused(model, directory, message: str) -> None:
    """The error, and that the model is as plain as it was."""
    with pytest.raises(ValueError, match=message):
        ptv2_fast.load_adapter(model, directory)
    assert not hasattr(model, "prefix_encoder") and "save_pretrained" not in vars(model)


def edit_config(directory, removed: str = "", **changes) -> None:
    path = directory / FILES[0]
    content = {**json.loads(path.read_text()), **changes}
    content.pop(removed, None)
    path.write_text(json.dumps(content))


def edit_tensors(directory, **changes) -> None:
    tensors = {**load_file(directory / FILES[1]), **changes}
    save_file({n: t for n, t in tensors.items() if t is not None}, directory / FILES[1])
