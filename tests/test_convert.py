"""Adapters of other packages in and out: the same logits, and one clear error for a bad file."""

import copy
import inspect
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.models import cache_argument
from ptv2_fast import PTuningV2Config
from ptv2_fast.adapters import export_peft, fold_adapter, import_adapter
from tests.models import (
    HEADS,
    MODEL_TYPES,
    MODELS,
    P,
    assert_close_to_model,
    assert_close_to_plain,
    concatenated_forward,
    make_batch,
    one_thread,  # noqa: F401
    outputs_of,
    plain_results,
    real_tokens,
    tiny_model,
)

TASKS = {
    "sequence": "SEQ_CLS",
    "token": "TOKEN_CLS",
    "question": "QUESTION_ANS",
    "bare": "FEATURE_EXTRACTION",
}
# The heads of some; of the others the first that transformers has.
ALL_HEADS = ("bert", "roberta", "electra", "qwen2")
WIDE = {"gemma3_text": 64, "mistral": 64, "qwen2": 64}  # windows that hold prefix and text


def made_model(model_type: str, head: str = "sequence"):
    wide = {"sliding_window": WIDE[model_type]} if model_type in WIDE else {}
    return tiny_model(model_type, head, **wide)


def peft_serves(model_type: str) -> bool:
    return cache_argument(tiny_model(model_type, "bare")) is not None


SERVED = [name for name in MODEL_TYPES if peft_serves(name)]
CASES = [
    (name, head)
    for name, head in MODELS
    if name in SERVED and head in TASKS and (name in ALL_HEADS or head == "sequence")
]


def peft_model(plain, head: str, **fields):
    """A prefix of PEFT with a random head on a copy of a model."""
    config = peft.PrefixTuningConfig(task_type=TASKS[head], num_virtual_tokens=P, **fields)
    model = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def let_peft_run(model) -> None:
    """Give the cache the name by which PEFT looks for it in the signatures of a copy.

    Versions of transformers that call it `cache` still take `past_key_values`.
    """
    for module in (model.base_model, getattr(model.base_model, "base_model", None)):
        if isinstance(module, nn.Module) and cache_argument(module) == "cache":
            module.forward = _renamed(module.forward)


def _renamed(forward):
    def forward_with_past(*args, past_key_values=None, **kwargs):
        return forward(*args, past_key_values=past_key_values, **kwargs)

    return forward_with_past


def results_of_peft(head: str, batch: dict[str, Tensor]):
    def run(model) -> tuple[Tensor]:
        let_peft_run(model)
        with torch.no_grad():
            return (outputs_of(head, model(**batch)) * real_tokens(head, batch),)

    return run


@torch.no_grad()
def our_results(model, head: str, batch: dict[str, Tensor]) -> tuple[Tensor]:
    return (outputs_of(head, model(**batch)) * real_tokens(head, batch),)


@pytest.mark.parametrize(("model_type", "head"), CASES)
@pytest.mark.filterwarnings("ignore:the model has windows")
def test_an_adapter_of_peft_has_its_logits_there_and_back(model_type, head, tmp_path):
    plain, batch = made_model(model_type, head), make_batch(head)
    original = peft_model(plain, head)
    original.save_pretrained(tmp_path / "peft")
    ours = import_adapter(copy.deepcopy(plain), tmp_path / "peft")
    expected = plain_results(results_of_peft(head, batch), original)
    assert_close_to_plain(our_results(ours, head, batch), expected)
    export_peft(ours, tmp_path / "back")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "back")
    assert_close_to_plain(results_of_peft(head, batch)(back.eval()), expected)
