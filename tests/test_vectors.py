"""Biases and norms that train beside the prefix: on both paths, and what an adapter holds."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ptv2_fast
from ptv2_fast import PTuningV2Config
from ptv2_fast.adapters import load_prefix
from ptv2_fast.encoders.attachment import find_attachment
from ptv2_fast.encoders.checkpointing import checkpoint_activations
from tests.concatenation import concatenating_attention
from tests.models import (
    BACKBONES,
    P,
    assert_close_to_model,
    make_batch,
    one_thread,  # noqa: F401
    outputs_of,
    real_tokens,
    set_fields,
    step_results,
    tiny_model,
)

BOTH = {"train_biases": True, "train_norms": True}
NORMS = {"train_norms": True}
# One of each kind of norm and of block; what has no biases, or some that are not served.
FAMILIES = {
    "bert": BOTH,
    "deberta": BOTH,
    "deberta-v2": BOTH,
    "esm": BOTH,
    "gemma3_text": NORMS,
    "glm2021": BOTH,
    "llama": NORMS,
    "mobilebert": BOTH,
    "modernbert": NORMS,
    "qwen2": BOTH,
    "qwen3": NORMS,
    "t5": NORMS,
}
CASES = [(name, way) for name in FAMILIES if name in BACKBONES for way in BACKBONES[name]]
VECTORS = "prefix_encoder.vectors."


def head_of(model_type: str) -> str:
    return (
        "sequence"
        if model_type in ("llama", "gemma3_text", "qwen2", "qwen3", "glm2021")
        else "token"
    )


def moved(model_type: str = "bert", dtype: torch.dtype = torch.float32, plain=None, **fields):
    """A plain model and an attached one whose vectors have moved away from the plain one's."""
    plain = tiny_model(model_type, head_of(model_type)).to(dtype) if plain is None else plain
    config = PTuningV2Config(num_virtual_tokens=P, **{**FAMILIES[model_type], **fields})
    model = ptv2_fast.attach(copy.deepcopy(plain), config)
    with torch.no_grad():
        for name, parameter in model.prefix_encoder.named_parameters():
            if name == "embedding.weight":
                nn.init.normal_(parameter)
            else:
                parameter.add_(torch.rand_like(parameter) - 0.5)
            parameter.copy_(parameter.to(dtype))  # oracles start from the same values
    return plain, model


def vectors_of(model) -> dict[str, nn.Parameter]:
    """By the names that they have in the backbone."""
    layers = find_attachment(model).family.layers
    base = "" if model.base_model is model else f"{model.base_model_prefix}."
    return {
        f"{base}{layers}.{name.removeprefix(VECTORS)}": parameter
        for name, parameter in model.named_parameters()
        if name.startswith(VECTORS)
    }


def with_vectors(plain, model):
    """The plain model with the vectors of an attached one as its own."""
    changed = copy.deepcopy(plain)
    for name, vector in vectors_of(model).items():
        changed.get_parameter(name).data.copy_(vector.detach())
    return changed


def check_gradients(changed, model, head: str, dtype: torch.dtype) -> None:
    """Outputs and gradients of an attached model, against a plain one and concatenation.

    `changed`: a plain model whose own parameters are what trains inside of the other's layers.
    """
    batch, table = make_batch(head), model.prefix_encoder.embedding.weight
    real, vectors = real_tokens(head, batch), vectors_of(model)

    def results(output: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        output = output * real
        gradients = torch.autograd.grad(output, leaves, grad_out.to(output.dtype))
        return output.detach(), *gradients

    output = outputs_of(head, model(**batch))
    grad_out = torch.randn(output.shape)
    actual = results(output, table, *vectors.values())
    assert all(gradient.dtype == torch.float32 for gradient in actual[1:])
    assert all(gradient.abs().max() > 0 for gradient in actual[1:])

    def concatenated(plain, prefix: Tensor) -> tuple[Tensor, ...]:
        prefix.requires_grad_()
        with concatenating_attention(plain, dict(enumerate(prefix))):
            output = outputs_of(head, plain(**batch))
        own = [plain.get_parameter(name) for name in vectors]
        output, gradient, *others = results(output, prefix, *own)
        return output, gradient.permute(3, 0, 1, 2, 4).reshape(table.shape), *others

    prefix = model.prefix_encoder().detach()
    actual = tuple(each.to(dtype) for each in actual)
    assert_close_to_model(actual, concatenated, changed, prefix, dtype=dtype)


def check_vectors(model_type: str, backbone: str, dtype: torch.dtype) -> None:
    plain, model = moved(model_type, dtype, backbone=backbone)
    check_gradients(with_vectors(plain, model), model, head_of(model_type), dtype)


@pytest.mark.parametrize(("model_type", "backbone"), CASES)
def test_outputs_and_gradients_equal_concatenation(model_type, backbone):
    check_vectors(model_type, backbone, torch.float32)


@pytest.mark.parametrize("backbone", ["frozen", "hook"])
@pytest.mark.parametrize("model_type", ["bert", "esm", "llama"])
def test_bfloat16_gradients_equal_concatenation(model_type, backbone):
    check_vectors(model_type, backbone, torch.bfloat16)


@pytest.mark.parametrize("backbone", ["frozen", "hook"])
@pytest.mark.parametrize("model_type", ["bert", "esm", "llama"])
def test_layers_below_the_lowest_prefix_have_no_backward_pass(model_type, backbone):
    _, model = moved(model_type, layers=[1, 2], backbone=backbone)
    batch = make_batch(head_of(model_type))
    states = model(**batch, output_hidden_states=True).hidden_states
    assert [state.requires_grad for state in states] == [False, False, True, True]
    assert {name.removeprefix(VECTORS)[0] for name in model.state_dict() if VECTORS in name} == {
        "1",
        "2",
    }
    model.prefix_encoder.embedding.requires_grad_(False)  # of which the vectors do not depend
    assert all(
        gradient.abs().max() > 0 for gradient in step_results(model, batch, head_of(model_type))
    )


@pytest.mark.parametrize("backbone", ["frozen", "hook"])
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_an_adapter_holds_them_and_the_backbone_keeps_its_own(model_type, backbone, tmp_path):
    plain, model = moved(model_type, backbone=backbone, layers=[0, 2])
    batch, without = make_batch(), {}
    real = real_tokens(head_of(model_type), batch)
    logits = model(**batch).logits
    with ptv2_fast.disabled(model):
        without["moved"] = model(**batch).logits
    ptv2_fast.save_adapter(model, tmp_path)
    names = [name for name in load_file(tmp_path / "ptv2_adapter.safetensors") if VECTORS in name]
    assert sorted(names) == sorted(name for name in model.state_dict() if VECTORS in name)

    twin = ptv2_fast.load_adapter(copy.deepcopy(plain), tmp_path, is_trainable=True)
    if backbone == "frozen":  # how a loaded adapter runs is chosen anew
        assert torch.equal(twin(**batch).logits, logits)
    torch.testing.assert_close(twin(**batch).logits * real, logits * real)
    assert get_trained(twin) == get_trained(model)
    again = ptv2_fast.attach(copy.deepcopy(plain), find_attachment(model).config)
    with ptv2_fast.disabled(again):
        without["new"] = again(**batch).logits
    assert torch.equal(without["moved"], without["new"])
    load_prefix(again, tmp_path)
    assert all(torch.equal(v, vectors_of(model)[name]) for name, v in vectors_of(again).items())

    ptv2_fast.detach(model)
    for name, tensor in model.state_dict().items():
        if name.startswith(model.base_model_prefix):
            assert torch.equal(tensor, plain.state_dict()[name])
    assert not any("forward" in vars(module) for module in model.modules())


def get_trained(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("backbone", ["frozen", "hook"])
def test_a_copy_has_vectors_of_its_own(backbone, duplicate):
    _, model = moved(backbone=backbone)
    batch = make_batch()
    logits = model(**batch).logits
    twin = duplicate(model)
    assert torch.equal(twin(**batch).logits, logits)
    twin(**batch).logits.sum().backward()
    assert all(vector.grad is None for vector in vectors_of(model).values())
    with torch.no_grad():
        for vector in vectors_of(twin).values():
            assert vector.grad.abs().max() > 0
            vector.add_(1)
    assert not torch.equal(twin(**batch).logits, logits)
    ptv2_fast.detach(twin)
    assert torch.equal(model(**batch).logits, logits)


def test_a_prefix_that_is_drawn_anew_leaves_them():
    _, model = moved(low_rank=2)
    before = {name: value.clone() for name, value in model.prefix_encoder.state_dict().items()}
    model.prefix_encoder.reset_parameters()
    after = model.prefix_encoder.state_dict()
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert changed == ["embedding.weight"]


def test_adapters_with_and_without_them_do_not_mix(tmp_path):
    plain, model = moved()
    ptv2_fast.save_adapter(model, tmp_path)
    other = ptv2_fast.attach(copy.deepcopy(plain), PTuningV2Config(num_virtual_tokens=P))
    for load in (ptv2_fast.load_adapter, load_prefix):
        with pytest.raises(ValueError, match=r"train_biases True against False, train_norms True"):
            load(other, tmp_path)
    path, name = tmp_path / "ptv2_adapter.safetensors", f"{VECTORS}0.output.dense.bias"
    tensors = load_file(path)
    for changed, message in (
        ({**tensors, name: torch.zeros(3)}, rf"expected {name} of shape \[16\], got \[3\]"),
        ({n: t for n, t in tensors.items() if n != name}, rf"missing \['{name}'\]"),
    ):
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            ptv2_fast.load_adapter(copy.deepcopy(plain), tmp_path)


class EightBitLinear(nn.Linear):
    """Stands for a quantised layer."""


def quantise(model) -> None:
    model.bert.encoder.layer[1].output.dense = EightBitLinear(24, 16)


def wrap(model) -> None:
    norm = model.bert.encoder.layer[1].output.LayerNorm
    norm.forward = type(norm).forward.__get__(norm)


@pytest.mark.parametrize(
    ("model_type", "fields", "change", "message"),
    [
        ("bert", {"train_biases": 1}, None, "train_biases: expected True or False, got 1"),
        ("t5", BOTH, None, "train_biases: expected linear layers with biases in the prefixed"),
        ("albert", NORMS, None, "train_norms: expected layers that share no weights, got those of"),
        (
            "bert",
            BOTH,
            quantise,
            r"plain linear layers, got bias of .*EightBitLinear, output.dense of",
        ),
        ("bert", NORMS, wrap, "forward, got one that was replaced .*, output.LayerNorm of layer 1"),
    ],
)
def test_what_is_not_served_is_refused_and_left_alone(model_type, fields, change, message):
    model = tiny_model(model_type, head_of(model_type))
    if change is not None:
        change(model)
    with pytest.raises(ValueError, match=message):
        ptv2_fast.attach(model, PTuningV2Config(**fields))
    assert not hasattr(model, "prefix_encoder")
    assert not any(
        type(vars(m).get("forward")).__name__ == "StandInForward" for m in model.modules()
    )


@pytest.mark.parametrize("backbone", ["frozen", "hook"])
def test_a_module_that_is_replaced_later_is_named(backbone):
    _, model = moved(backbone=backbone)
    layer = model.bert.encoder.layer[2]
    layer.output.dense = copy.deepcopy(layer.output.dense)
    with pytest.raises(ValueError, match=r"expected the output.dense of layer 2 that was attached"):
        model(**make_batch())


def test_a_vector_that_changes_before_its_backward_pass_is_an_error():
    _, model = moved(backbone="frozen")
    loss = model(**make_batch()).logits.sum()
    with torch.no_grad():
        model.prefix_encoder.get_parameter("vectors.1.output.LayerNorm.weight").add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def embedded(model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch by its embeddings, which get a gradient."""
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach()
    mask = batch["attention_mask"]
    return {"inputs_embeds": embeddings.requires_grad_(), "attention_mask": mask}


@pytest.mark.parametrize("backbone", ["frozen", "hook"])
@pytest.mark.parametrize("fields", [NORMS, {"train_biases": True}, {"low_rank": 2}])
def test_a_layer_that_runs_again_has_what_was_disabled_in_its_forward(fields, backbone):
    """Where a backward pass stands changes nothing, as in a loss against the plain model."""
    torch.manual_seed(0)
    _, model = moved(**{"train_biases": False, "train_norms": False, **fields}, backbone=backbone)
    checkpoint_activations(model.train())
    batch = make_batch()
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = {}
    for is_inside in (False, True):
        out = model(**batch).logits
        with ptv2_fast.disabled(model):
            loss = (out - model(**batch).logits.detach()).square().sum()
            if is_inside:
                found["enabled", True] = torch.autograd.grad(loss, leaves)
            given = embedded(model, batch)
            plain = model(**given).logits.square().sum()
            if is_inside:
                found["disabled", True] = torch.autograd.grad(plain, given["inputs_embeds"])
        if not is_inside:
            found["enabled", False] = torch.autograd.grad(loss, leaves)
            found["disabled", False] = torch.autograd.grad(plain, given["inputs_embeds"])
    for which in ("enabled", "disabled"):
        for inside, outside in zip(found[which, True], found[which, False], strict=True):
            assert torch.equal(inside, outside) and inside.abs().max() > 0


@pytest.mark.parametrize("backbone", ["frozen", "hook"])
@pytest.mark.parametrize("how", ["autocast", "before", "after", "backbone_dtype"])
def test_bfloat16_keeps_float32_masters(how, backbone):
    plain = tiny_model()
    fields = {"backbone_dtype": "bf16"} if how == "backbone_dtype" else {}
    if how == "before":
        plain.to(torch.bfloat16)
    _, model = moved(plain=plain, backbone=backbone, **fields)
    if how == "after":
        model.to(torch.bfloat16)
    exact = {name: vector.clone() for name, vector in vectors_of(model).items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        model(**make_batch()).logits.float().square().sum().backward()
    for name, vector in vectors_of(model).items():
        assert vector.dtype == vector.grad.dtype == torch.float32
        assert torch.equal(vector, exact[name]) and vector.grad.abs().max() > 0


def test_they_compile_into_one_graph():
    model_type = "qwen2"  # biases, and norms of transformers' own
    head, batch = head_of(model_type), make_batch()
    plain = tiny_model(model_type, head, num_hidden_layers=1)
    _, model = moved(model_type, plain=plain)
    real = real_tokens(head, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    leaves = list(vectors_of(model).values())
    outputs = [outputs_of(head, forward(**batch)) * real for forward in (model, compiled)]
    gradients = [torch.autograd.grad(output.square().sum(), leaves) for output in outputs]
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_inference_trains_nothing_and_a_run_may_go_on(tmp_path):
    _, model = moved(backbone="frozen", inference_mode=True)
    assert ptv2_fast.get_nb_trainable_parameters(model)[0] == 0
    assert not model(**make_batch()).logits.requires_grad
    for policy in ("none", "ffn+qkv"):
        set_fields(model, recompute=policy)
        find_attachment(model).set_trainable(True)
        assert all(gradient.abs().max() > 0 for gradient in step_results(model, make_batch()))
