"""What attach makes of frozen blocks: other weights, dtypes and layers, and when it falls back."""

import copy
import pickle
import warnings

import pytest
import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

import ptv2_fast
from ptv2_fast import PTuningV2Config
from ptv2_fast.encoders.checkpointing import checkpoint_activations
from ptv2_fast.frozen import engine
from ptv2_fast.frozen.spec import POLICIES
from ptv2_fast.training.measure import kept_bytes
from tests.models import (
    BACKBONES,
    DROPOUT,
    MODELS,
    WITHOUT_FALLBACK,
    attached,
    make_batch,
    one_thread,  # noqa: F401
    set_fields,
    step_results,
    tiny_model,
)


def test_checkpointing_flags_choose_a_policy_and_train_the_prefix():
    model, batch = attached(model=tiny_model(**DROPOUT), **WITHOUT_FALLBACK).train(), make_batch()
    whole = step_results(model, batch)
    before = kept_bytes(lambda: model(**batch).logits.sum(), model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint_activations(model, use_reentrant=True)
        for actual, expected in zip(step_results(model, batch), whole, strict=True):
            assert torch.equal(actual, expected)
        assert kept_bytes(lambda: model(**batch).logits.sum(), model) < 0.6 * before


def test_checkpointing_goes_around_frozen_blocks_of_copies_and_comes_back_for_the_others():
    model, batch = attached(model=tiny_model(**DROPOUT)).train(), make_batch()
    whole = step_results(model, batch)
    checkpoint_activations(model)
    model.disable_input_require_grads()  # a hook of transformers that cannot be pickled
    layers = model.bert.encoder.layer
    functions = [layer._gradient_checkpointing_func for layer in layers]
    step_results(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for actual, expected in zip(step_results(twin, batch), whole, strict=True):
            assert torch.equal(actual, expected)
    calls = []
    for layer in layers:  # takes the hook path
        layer.attention.self.query.register_forward_hook(lambda *unused: calls.append(1))
    with pytest.warns(UserWarning, match="runs without frozen blocks"):
        results = step_results(model, batch)
    assert len(calls) == 2 * len(layers)
    assert all(gradient.abs().max() > 0 for gradient in results[1:])
    ptv2_fast.detach(model)
    assert [layer._gradient_checkpointing_func for layer in layers] == functions


@pytest.mark.parametrize("change", ["load", "detach", "convert", "copy"])
def test_changed_weights_are_seen(change):
    model, batch = attached(), make_batch()
    before = model(**batch).logits
    if change == "convert":
        model.to(torch.float64)
        torch.testing.assert_close(model(**batch).logits.float(), before)
        return
    if change == "copy":
        model = copy.deepcopy(model)
        assert torch.equal(model(**batch).logits, before)
    weights = {name: tensor * 1.5 for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    other = attached(backbone="hook")
    other.load_state_dict(weights)
    if change == "detach":
        for each in (model, other):
            ptv2_fast.detach(each)
        storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert len(storages) == len(list(model.parameters()))
    torch.testing.assert_close(model(**batch).logits, other(**batch).logits)


@pytest.mark.parametrize("model_type", BACKBONES)
def test_backbone_dtype_converts_frozen_weights_only_and_detach_converts_back(model_type):
    head = "token" if (model_type, "token") in MODELS else "sequence"
    plain, batch = tiny_model(model_type, head), make_batch()
    for backbone in BACKBONES[model_type]:
        model = attached(
            model=copy.deepcopy(plain), backbone_dtype="bf16", backbone=backbone
        ).train()
        for name, parameter in model.named_parameters():
            frozen = not parameter.requires_grad
            assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name
        output, *gradients = step_results(model, batch, head)
        assert output.dtype == torch.float32
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        assert all(gradient.abs().max() > 0 for gradient in gradients)
        ptv2_fast.detach(model)
        for name, parameter in model.named_parameters():
            expected = plain.get_parameter(name)
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter.bfloat16(), expected.bfloat16())


class Pushed(nn.Module, PyTorchModelHubMixin):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def save_with_accelerate(model, folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.save_model(accelerator.prepare(model), folder)
    return folder / "model.safetensors"


def save_state_of_accelerate(model, folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(folder)
    return save_with_safetensors(model, folder)


def save_with_safetensors(model, folder):
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_model(model, folder / "all.safetensors")
    return folder / "all.safetensors"


def save_for_the_hub(model, folder):
    Pushed(model).save_pretrained(folder)
    return folder / "model.safetensors"


def save_with_torch(model, folder):
    folder.mkdir()
    torch.save(model.state_dict(), folder / "model.pt")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert (folder / "model.pt").stat().st_size < 1.5 * size + 40_000
    return folder / "model.pt"


@pytest.mark.parametrize(
    "save",
    [
        save_with_accelerate,
        save_state_of_accelerate,
        save_with_safetensors,
        save_for_the_hub,
        save_with_torch,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whoever_saves_a_used_model_saves_every_weight(
    save, dtype, tmp_path, own_accelerator_state
):
    """Query, key and value share memory; savers tell tensors that are one by their storage."""
    model, batch = attached(model=tiny_model().to(dtype), **WITHOUT_FALLBACK), make_batch()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(**batch).logits
    path = save(model, tmp_path / "saved")
    read = torch.load if path.suffix == ".pt" else safetensors.torch.load_file
    saved = {name.removeprefix("model."): tensor for name, tensor in read(path).items()}
    assert saved.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.items())
    other = attached(model=tiny_model().to(dtype), **WITHOUT_FALLBACK)
    other(**batch)
    other.load_state_dict(saved)
    assert torch.equal(other(**batch).logits, logits)
    assert torch.equal(model(**batch).logits, logits)


class EightBitLinear(nn.Linear):
    """Stands for a quantised layer: integers and scales, which only its forward understands."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.scale = linear.weight.data.abs().amax(1, keepdim=True) / 127
        codes = (linear.weight.data / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("names", [("query", "key", "value", "dense"), ("value",)])
def test_quantised_layers_are_called(names, monkeypatch):
    monkeypatch.setattr(engine, "CPU_CHUNK", 8)
    plain = tiny_model(head="token", **DROPOUT)
    for layer in plain.bert.encoder.layer:
        for module in list(layer.modules()):
            for name, child in module.named_children():
                if name in names:
                    setattr(module, name, EightBitLinear(child))
    hook = attached("token", model=copy.deepcopy(plain), backbone="hook")
    model = attached("token", model=plain, **WITHOUT_FALLBACK)
    model.load_state_dict(hook.state_dict())
    batch = make_batch("token")
    for actual, expected in zip(
        step_results(model, batch, "token"),
        step_results(hook, batch, "token"),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)
    model.train()
    whole = step_results(model, batch, "token")
    for policy in POLICIES:
        set_fields(model, recompute=policy)
        for actual, expected in zip(step_results(model, batch, "token"), whole, strict=True):
            assert torch.equal(actual, expected)


def lora_on_a_linear(model) -> None:
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["query"]), model)


def unfreeze(model) -> None:
    model.bert.encoder.layer[1].output.dense.weight.requires_grad_()


def listen_inside(model) -> None:
    model.bert.encoder.layer[2].intermediate.dense.register_forward_hook(lambda *unused: None)


def watch_attention(model) -> None:
    model.bert.encoder.layer[0].attention.self.register_full_backward_hook(lambda *unused: None)


def shard(model) -> None:
    class Shard(nn.Parameter):
        pass

    output = model.bert.encoder.layer[1].output.dense
    output.weight = Shard(output.weight.data, requires_grad=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shard, r"layer 1: the weight of down is a .*Shard"),
        (lora_on_a_linear, r"layer 0: query is a peft\.[a-z.]*\.Linear, not a Linear"),
        (unfreeze, "layer 1: its parameters are trained"),
        (watch_attention, "layer 0: attention.self has hooks"),
        (listen_inside, "layer 2: intermediate.dense has hooks"),
    ],
)
def test_what_comes_later_falls_back_with_one_warning_or_raises(change, reason):
    batch, plain = make_batch(), tiny_model()
    model = attached(model=copy.deepcopy(plain))
    before = model(**batch).logits
    change(model)
    with pytest.warns(UserWarning, match=reason) as caught:
        after = [model(**batch).logits for _ in range(2)]
    assert len(caught) == 1
    torch.testing.assert_close(after[0], before)
    for fields in ({"backbone": "frozen"}, {"strict": True}):
        model = attached(model=copy.deepcopy(plain), **fields)
        change(model)
        with pytest.raises(ValueError, match=reason):
            model(**batch)


def test_what_cannot_be_frozen_falls_back_when_attached_or_raises():
    plain, batch = tiny_model(hidden_act="mish"), make_batch()
    reason = "layer 0: expected an activation among gelu, .*, got MishActivation"
    with pytest.warns(UserWarning, match=reason):
        model = attached(model=copy.deepcopy(plain))
    hook = attached(model=copy.deepcopy(plain), backbone="hook")
    hook.load_state_dict(model.state_dict())
    assert torch.equal(model(**batch).logits, hook(**batch).logits)
    for fields in ({"backbone": "frozen"}, {"strict": True}):
        model = copy.deepcopy(plain)
        with pytest.raises(ValueError, match=reason):
            ptv2_fast.attach(model, PTuningV2Config(**fields))
        assert not hasattr(model, "prefix_encoder")


def test_left_padding_takes_the_hook_path():
    model, batch = attached(), make_batch()
    batch = {name: tensor.flip(-1) for name, tensor in batch.items()}
    hook = attached(backbone="hook")
    hook.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="left padding"):
        assert torch.equal(model(**batch).logits, hook(**batch).logits)
