"""A bank of adapters: each row of a mixed batch gives what its adapter gives alone."""

import copy

import pytest
import torch
from torch import Tensor

import ptv2_fast
from ptv2_fast import AdapterBank, PTuningV2Config, load_adapter, save_adapter
from ptv2_fast.encoders.families import FAMILIES
from tests.models import (
    assert_close_to_plain,
    auto_class,
    has_class,
    is_served,
    one_thread,  # noqa: F401
    plain_results,
    tiny_config,
    tiny_model,
)

MODEL_TYPES = [name for name in ("bert", "roberta", "modernbert", "deberta-v2") if is_served(name)]
SIZES = {"max_position_embeddings": 130}
# Name -> head, labels, and what the prefix is.
ADAPTERS = {
    "pair": ("sequence", 2, {"num_virtual_tokens": 1}),
    "tags": ("token", 17, {"num_virtual_tokens": 100, "position_offset": "prefix"}),
    "answers": ("question", 2, {"num_virtual_tokens": 7, "layers": (1, 2)}),
    "grade": ("sequence", 1, {"num_virtual_tokens": 20, "layers": (2,), "prefix_projection": True}),
    "choices": ("choice", 2, {"num_virtual_tokens": 3, "layers": (0, 2)}),
    "gated": ("sequence", 5, {"num_virtual_tokens": 5, "prefix_gate": True}),
    "alone": ("token", 4, {"num_virtual_tokens": 2, "low_rank": 2}),
}


def with_adapter(plain, head: str, num_labels: int, fields: dict):
    """A model of its class on the weights of `plain`, with an adapter that is large everywhere."""
    model_type = plain.config.model_type
    if fields.get("position_offset") and not FAMILIES[model_type].has_position_table(plain.config):
        fields = {**fields, "position_offset": "none"}
    config = tiny_config(model_type, num_labels=num_labels, **SIZES)
    model = auto_class(model_type, head).from_config(config).eval()
    weights = plain.state_dict()
    own = model.base_model.state_dict()
    model.base_model.load_state_dict({n: t for n, t in weights.items() if n in own}, strict=False)
    ptv2_fast.attach(model, PTuningV2Config(**fields))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5 if "prefix" in name else 0.3)
    return model.eval()


@pytest.fixture(scope="module", params=MODEL_TYPES)
def case(request, tmp_path_factory):
    """A plain encoder, and models with adapters on it, each saved in a folder of its name."""
    torch.manual_seed(0)
    plain, folder = tiny_model(request.param, "bare", **SIZES), tmp_path_factory.mktemp("adapters")
    models = {}
    for name, (head, num_labels, fields) in ADAPTERS.items():
        if has_class(request.param, head):
            model = with_adapter(plain, head, num_labels, fields)
            save_adapter(model, folder / name)
            # What a user runs: the adapter alone, in a model of its class.
            fresh = auto_class(request.param, head).from_config(model.config)
            fresh.base_model.load_state_dict(
                {n: t for n, t in plain.state_dict().items()
                 if n in fresh.base_model.state_dict()}, strict=False,
            )  # fmt: skip
            models[name] = load_adapter(fresh, folder / name)
    return plain, models, folder


def bank_of(case, how: str = "auto", names=None, is_trainable: bool = False) -> AdapterBank:
    plain, models, folder = case
    bank = AdapterBank(copy.deepcopy(plain), backbone=how)
    for name in models if names is None else names:
        bank.load(name, folder / name, is_trainable)
    return bank


def texts_of(lengths) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, 60, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 1), mask.long()


def result_of(model, ids: Tensor) -> Tensor:
    """What a model makes of one text, [1, T]."""
    if type(model).__name__.endswith("ForMultipleChoice"):
        return model(input_ids=ids[:, None]).logits[0, 0]
    output = model(input_ids=ids)
    if "start_logits" in output:
        return torch.stack((output.start_logits[0], output.end_logits[0]), dim=-1)
    return output.logits[0] if "logits" in output else output.last_hidden_state[0]


def test_every_row_equals_its_adapter_alone(case):
    plain, models, _ = case
    names = [*models, "__base__"]
    lengths = [(5 * number) % 14 + 1 for number in range(24)]
    asked = [names[(number * 5) % len(names)] for number in range(24)]
    ids, mask = texts_of(lengths)
    assert len(set(asked)) == len(names)

    def alone(*copies) -> tuple[Tensor, ...]:
        found = dict(zip(names, copies, strict=True))
        with torch.no_grad():
            rows = zip(asked, ids, lengths, strict=True)
            return tuple(result_of(found[name], row[None, :n]) for name, row, n in rows)

    expected = plain_results(alone, *models.values(), plain)
    for how in ("frozen", "hook"):
        bank = bank_of(case, how)
        with torch.no_grad():
            assert_close_to_plain(bank(ids, mask, asked), expected, how)
            reordered = bank(ids.flip(0), mask.flip(0), asked[::-1])[::-1]
            assert_close_to_plain(reordered, expected, f"{how}, another order")
