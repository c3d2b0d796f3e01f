"""Low-rank updates that train beside the prefix: on both paths, against layers with the updates."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ptv2_fast
from ptv2_fast import PTuningV2Config
from ptv2_fast.encoders.attachment import find_attachment
from tests.models import (
    BACKBONES,
    P,
    make_batch,
    one_thread,  # noqa: F401
    real_tokens,
    set_fields,
    tiny_model,
)
from tests.test_vectors import VECTORS, check_gradients, head_of, vectors_of

RANK = 3
# Layers of three inputs, of one, gated, grouped-query, by head; with dropout in one place or more.
FAMILIES = (
    "bert",
    "deberta-v2",
    "esm",
    "glm2021",
    "llama",
    "mobilebert",
    "modernbert",
    "nomic_bert",
    "t5",
)
CASES = [(name, way) for name in FAMILIES if name in BACKBONES for way in BACKBONES[name]]


class UpdatedLinear(nn.Linear):
    """The matrix W + scale B A, the definition of an update."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight + self.scale * self.lora_B @ self.lora_A
        return nn.functional.linear(input, weight, self.bias)


def updated(model_type: str = "bert", dtype: torch.dtype = torch.float32, plain=None, **fields):
    """A plain model, and an attached one whose updates are not zero."""
    plain = tiny_model(model_type, head_of(model_type)).to(dtype) if plain is None else plain
    config = PTuningV2Config(**{"num_virtual_tokens": P, "low_rank": RANK, **fields})
    model = ptv2_fast.attach(copy.deepcopy(plain), config)
    with torch.no_grad():
        for name, parameter in model.prefix_encoder.named_parameters():
            std = 1.0 if name == "embedding.weight" else 0.2
            parameter.copy_(nn.init.normal_(parameter, std=std).to(dtype))
    return plain, model


def with_updates(plain, model):
    """The plain model with updated matrices."""
    changed, alpha = copy.deepcopy(plain), find_attachment(model).config.low_rank_alpha
    for name, parameter in vectors_of(model).items():
        place, _, kind = name.rpartition(".")
        linear = changed.get_submodule(place)
        linear.__class__, linear.scale = UpdatedLinear, 2.0 if alpha is None else alpha / RANK
        setattr(linear, kind, nn.Parameter(parameter.detach().to(linear.weight.dtype)))
    return changed


def check_updates(model_type: str, dtype: torch.dtype, **fields) -> None:
    plain, model = updated(model_type, dtype, **fields)
    check_gradients(with_updates(plain, model), model, head_of(model_type), dtype)


@pytest.mark.parametrize(("model_type", "backbone"), CASES)
def test_outputs_and_gradients_equal_updated_layers(model_type, backbone):
    check_updates(model_type, torch.float32, backbone=backbone, low_rank_alpha=4.5)


@pytest.mark.parametrize("backbone", ["frozen", "hook"])
@pytest.mark.parametrize("model_type", ["bert", "esm", "llama"])
def test_bfloat16_gradients_equal_updated_layers(model_type, backbone):
    check_updates(model_type, torch.bfloat16, backbone=backbone)


@pytest.mark.parametrize("backbone", ["frozen", "hook"])
@pytest.mark.parametrize(
    "targets", [["query", "value"], ["attention.output.dense"], ["key", "dense"]]
)
def test_some_layers_alone(targets, backbone):
    check_updates("bert", torch.float32, backbone=backbone, low_rank_targets=targets)


@pytest.mark.parametrize("backbone", ["frozen", "hook"])
def test_updates_stand_without_a_prefix(backbone, tmp_path):
    plain, model = updated(num_virtual_tokens=0, backbone=backbone)
    batch = make_batch("token")
    real, logits = real_tokens("token", batch), model(**batch).logits
    expected = with_updates(plain, model)(**batch).logits
    torch.testing.assert_close(logits * real, expected * real)
    logits.square().sum().backward()
    assert all(leaf.grad.abs().max() > 0 for leaf in vectors_of(model).values())
    ptv2_fast.save_adapter(model, tmp_path)
    twin = ptv2_fast.load_adapter(plain, tmp_path)
    torch.testing.assert_close(twin(**batch).logits * real, logits * real)


@pytest.mark.parametrize("backbone", ["frozen", "hook"])
def test_a_new_update_changes_nothing_and_an_adapter_holds_it(backbone, tmp_path):
    plain, batch = tiny_model("bert", "token"), make_batch("token")
    config = PTuningV2Config(num_virtual_tokens=P, backbone=backbone)
    torch.manual_seed(0)
    logits = ptv2_fast.attach(copy.deepcopy(plain), config)(**batch).logits
    config = PTuningV2Config(num_virtual_tokens=P, backbone=backbone, low_rank=RANK)
    torch.manual_seed(0)
    model = ptv2_fast.attach(copy.deepcopy(plain), config)
    assert torch.equal(model(**batch).logits, logits)
    plain, model = updated(backbone=backbone)
    ptv2_fast.save_adapter(model, tmp_path)
    names = load_file(tmp_path / "ptv2_adapter.safetensors")
    assert f"{VECTORS}1.attention.self.value.lora_B" in names
    twin = ptv2_fast.load_adapter(plain, tmp_path)
    real = real_tokens("token", batch)  # the twin leaves the pads out
    torch.testing.assert_close(twin(**batch).logits * real, model(**batch).logits * real)


def test_an_adapter_fits_a_model_that_names_the_default_scale(tmp_path):
    plain, model = updated(low_rank_alpha=None)
    ptv2_fast.save_adapter(model, tmp_path)
    config = PTuningV2Config(num_virtual_tokens=P, low_rank=RANK, low_rank_alpha=2 * RANK)
    twin, batch = ptv2_fast.attach(plain, config), make_batch("token")
    ptv2_fast.load_adapter(twin, tmp_path)
    assert torch.equal(twin(**batch).logits, model(**batch).logits)


class OtherLinear(nn.Linear):
    """As a quantised layer, of another kind than its neighbours."""


@pytest.mark.parametrize("how", ["neighbour", "parametrized"])
def test_a_layer_of_another_kind_beside_an_updated_one_runs_by_the_hook(how):
    """Queries, keys and values are one product in a frozen block."""
    results = []
    for backbone in ("auto", "hook"):
        torch.manual_seed(0)
        plain = tiny_model("bert", "token")
        layer = plain.bert.encoder.layer[1]
        if how == "neighbour":
            layer.attention.self.key.__class__ = OtherLinear
        _, model = updated(plain=plain, low_rank_targets=["query", "output.dense"],
                           backbone=backbone)  # fmt: skip
        if how == "parametrized":
            output = model.bert.encoder.layer[1].output.dense
            nn.utils.parametrize.register_parametrization(output, "weight", nn.Identity())
        if backbone == "auto":
            with pytest.warns(UserWarning, match="layer 1: something of a linear layer trains"):
                results.append(model(**make_batch("token")).logits)
            set_fields(model, strict=True)
            with pytest.raises(ValueError, match="layer 1: something of a linear layer trains"):
                model(**make_batch("token"))
        else:
            results.append(model(**make_batch("token")).logits)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("bert", {"low_rank": 0}, "low_rank: expected None or an integer >= 1, got 0"),
        ("bert", {"low_rank_alpha": 2}, "low_rank_alpha: expected None, or a number > 0 with low"),
        ("bert", {"low_rank": 2, "low_rank_targets": ["qkv"]}, "low_rank: expected linear layers"),
        ("deberta-v2", {"low_rank": 2, "low_rank_targets": ["query_proj"]}, "expected linear"),
        ("albert", {"low_rank": 2}, "low_rank: expected layers that share no weights"),
        ("bert", {"low_rank": 2, "low_rank_targets": ["query", "vlaue"]}, "linear layers.*'vlaue'"),
        ("bert", {"low_rank": 2, "low_rank_alpha": math.inf}, "low_rank_alpha: expected None, or"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused(model_type, fields, message):
    with pytest.raises(ValueError, match=message):
        ptv2_fast.attach(tiny_model(model_type), PTuningV2Config(**fields))
