"""What silently gave another number: heads that read every token, calls of several threads."""

import copy
import threading
import types

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ptv2_fast
from ptv2_fast import PTuningV2Config
from tests.models import (
    MODELS,
    WAYS,
    attached,
    make_batch,
    one_thread,  # noqa: F401
    tiny_model,
)


class MeanHead(nn.Module):
    """Reads every state."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 3)

    def forward(self, features, **kwargs):
        return self.out(features.mean(1))


class MeanPooler(nn.Module):
    """As `MeanHead`, in place of a pooler."""

    def forward(self, states):
        return states.mean(1)


def mean_forward(self, input_ids, attention_mask=None, **kwargs):
    states = self.base_model(input_ids, attention_mask=attention_mask, **kwargs)[0]
    return types.SimpleNamespace(logits=states.mean(1))


def with_head(model):
    model.classifier = MeanHead()


def with_pooler(model):
    model.bert.pooler = MeanPooler()


def with_forward(model):
    model.forward = types.MethodType(mean_forward, model)


def with_encoder_forward(model):
    inner = model.bert.encoder.forward

    def summed(*args, **kwargs):
        output = inner(*args, **kwargs)
        states = output[0]
        output["last_hidden_state"] = states + states.mean(1, keepdim=True)
        return output

    model.bert.encoder.forward = summed


def keep(model):
    pass


READERS = [
    ("electra", "choice", {"summary_type": "mean"}, keep),
    ("electra", "choice", {"summary_type": "last"}, keep),
    ("roberta", "sequence", {}, with_head),
    ("bert", "sequence", {}, with_pooler),
    ("bert", "sequence", {}, with_forward),
    ("bert", "sequence", {}, with_encoder_forward),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("kind", "head", "overrides", "change"), READERS)
def test_a_head_that_reads_every_token_gets_every_token(kind, head, overrides, change, when):
    plain = tiny_model(kind, head, **overrides)
    if when == "before":
        change(plain)
    batch = make_batch(head, lengths=(11, 11, 11))
    logits = []
    for backbone in ("hook", "frozen"):
        # A replaced forward is bound to its own model: the same one serves both.
        torch.manual_seed(0)
        model = attached(model=plain, backbone=backbone)
        if when == "after":
            torch.manual_seed(0)
            change(model)
        with torch.no_grad():
            logits.append(model(**batch).logits)
        ptv2_fast.detach(model)
        vars(model).pop("forward", None) if when == "after" else None
        if when == "after":
            vars(model.base_model.encoder).pop("forward", None)
    torch.testing.assert_close(logits[1], logits[0])


@pytest.mark.parametrize("place", ["bert.pooler", "bert", "bert.encoder"])
def test_a_hook_sees_every_state(place):
    model, seen = attached(backbone="frozen"), []
    batch = make_batch()

    def look(module, args, output):
        first = args[0] if place == "bert.pooler" else output[0]
        seen.append(first.detach())

    handle = model.get_submodule(place).register_forward_hook(look)
    model(**batch)
    handle.remove()
    real = batch["attention_mask"].bool()
    assert (seen[0][real].abs().sum(-1) > 0).all()


def test_an_interrupted_forward_leaves_nothing_behind():
    model, batch = attached(backbone="frozen"), make_batch()
    expected = model.bert(**batch).last_hidden_state

    def interrupt(*unused):
        raise KeyboardInterrupt

    handle = model.classifier.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    handle.remove()
    assert torch.equal(model.bert(**batch).last_hidden_state, expected)


def from_another_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_a_second_thread_gets_whole_states_and_its_prefix():
    model, batch = attached(backbone="frozen"), make_batch()
    expected, results = model.bert(**batch).last_hidden_state, []

    def call():
        return model.bert(**batch).last_hidden_state

    handle = model.classifier.register_forward_hook(
        lambda *unused: results.append(from_another_thread(call))
    )
    model(**batch)
    handle.remove()
    with ptv2_fast.disabled(model):
        results.append(from_another_thread(call))
        assert not torch.equal(call(), expected)
    for result in results:
        assert torch.equal(result, expected)


def test_who_listens_to_layers_gets_what_the_layers_give():
    model, batch, seen = attached(), make_batch(), []
    handle = model.bert.encoder.layer[1].register_full_backward_hook(
        lambda module, grad_in, grad_out: seen.append(grad_out[0].shape)
    )
    with pytest.warns(UserWarning, match="backward pass"):
        model(**batch).logits.sum().backward()
    handle.remove()
    assert seen == [torch.Size([3, 11, 16])]
    twin = attached(model=copy.deepcopy(ptv2_fast.detach(model)), backbone="hook")
    ptv2_fast.attach(model, PTuningV2Config(num_virtual_tokens=5))
    counts = []
    for each in (model, twin):
        with FlopCounterMode(display=False) as counter:
            each(**batch)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_a_compiled_model_knows_that_it_is_disabled():
    model, batch = attached("token"), make_batch(lengths=(11, 11, 11))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(**batch)
        with ptv2_fast.disabled(model):
            torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)


def test_one_backbone_carries_one_prefix():
    config = PTuningV2Config(num_virtual_tokens=5)
    first, second = attached(), tiny_model()
    second.bert = first.bert
    for model in (second, first.bert):
        with pytest.raises(ValueError, match="that another attached model shares"):
            ptv2_fast.attach(model, config)
    ptv2_fast.detach(first)
    ptv2_fast.attach(first.bert, config)
    with pytest.raises(ValueError, match="that another attached model shares"):
        ptv2_fast.attach(first, config)
    ptv2_fast.detach(first.bert)
    ptv2_fast.attach(second, config)
    for name in ("encoder.layer.2", "embeddings"):  # an offset would shift the other's positions
        third = tiny_model()
        third.bert.set_submodule(name, second.bert.get_submodule(name))
        with pytest.raises(ValueError, match=rf"model shares \(bert\.{name}\)"):
            ptv2_fast.attach(third, PTuningV2Config(position_offset="prefix"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_weights_written_through_data_count_at_once(precision):
    """No version counter tells of such a write."""
    model, batch = attached("token"), make_batch(lengths=(11, 11, 11))
    if precision == "bfloat16":
        model.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        model(**batch)
        for name, parameter in model.bert.encoder.named_parameters():
            parameter.data.add_(0.5 if name.endswith("bias") else 0.25)
        written = model(**batch).logits
        fresh = copy.deepcopy(model)  # copies hold no fused weights
        assert torch.equal(written, fresh(**batch).logits)


def test_a_trace_serves_another_mask():
    model = attached("token", backbone="auto").double()
    batch, other = make_batch(), make_batch(lengths=(5, 11, 8))
    model.config.return_dict = False
    with torch.no_grad():
        example = (batch["input_ids"], batch["attention_mask"])
        traced = torch.jit.trace(model, example, check_trace=False)
        actual = traced(other["input_ids"], other["attention_mask"])[0]
        real = other["attention_mask"].bool()
        torch.testing.assert_close(actual[real], model(**other)[0][real])


def test_inference_mode_first_and_then_training_by_the_hook_path():
    model, batch = attached(), make_batch()
    with torch.inference_mode():
        model(**batch)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model.bert.encoder.layer[0].attention.self.query.register_forward_hook(lambda *unused: None)
    with pytest.warns(UserWarning, match="without frozen blocks"):
        model(**batch).logits.sum().backward()
    assert model.prefix_encoder.embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("backbone", ["hook", "frozen"])
def test_what_is_unfrozen_or_watched_below_the_layers_gets_its_gradient(backbone):
    model, batch = attached(backbone=backbone), make_batch()
    bias = model.bert.embeddings.LayerNorm.bias.requires_grad_()
    model(**batch).logits.sum().backward()
    assert bias.grad.abs().sum() > 0
    bias.requires_grad_(False)
    seen = []

    def watch(module, args, output):  # as captum does
        seen.append(output.detach().requires_grad_())
        return seen[0]

    model.bert.embeddings.register_forward_hook(watch)
    (gradient,) = torch.autograd.grad(model(**batch).logits.sum(), seen)
    assert gradient.abs().sum() > 0


def unfreeze_a_layer(model):
    model.bert.encoder.layer[1].requires_grad_()


def unfreeze_a_bias(model):
    model.bert.embeddings.LayerNorm.bias.requires_grad_()


def widen_head(model):
    model.classifier = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3))


@pytest.mark.parametrize("backbone", ["hook", "auto"])
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (unfreeze_a_layer, "bert.encoder.layer.1.attention.self.query.weight"),
        (unfreeze_a_bias, "bert.embeddings.LayerNorm.bias"),
        (widen_head, "classifier.1.weight"),
    ],
    ids=["layer", "bias", "head"],
)
@pytest.mark.filterwarnings("ignore:the backbone runs without frozen blocks")
def test_what_trains_and_is_not_saved_is_named_before_it_trains(change, name, backbone, tmp_path):
    model, batch = attached(backbone=backbone).train(), make_batch()
    model(**batch)
    change(model)
    message = f"holds all that trains, got .* {name}.*modules_to_save"
    for call in (lambda: model(**batch), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=message):
            call()
    parameter = model.get_parameter(name)
    model.eval()(**batch).logits.sum().backward()
    assert parameter.grad.abs().sum() > 0
    with torch.no_grad():
        model.train()(**batch)


def test_what_is_chosen_trains_and_is_saved(tmp_path):
    model, batch = attached(modules_to_save=["embeddings"]).train(), make_batch()
    model(**batch).logits.sum().backward()
    assert model.bert.embeddings.LayerNorm.bias.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:the backbone runs without frozen blocks")
def test_lora_on_an_attached_model_does_not_freeze_the_prefix_silently():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    model, batch = attached(), make_batch()
    lora_model = peft.get_peft_model(model, lora).train()
    with pytest.raises(ValueError, match=r"lora_A.*the prefix itself is frozen, as PEFT leaves"):
        lora_model(**batch)
    with torch.no_grad():
        lora_model(**batch)
    kept = peft.get_peft_model(attached(inference_mode=True), lora).train()
    kept(**batch).logits.sum().backward()
    assert kept.prefix_encoder.embedding.weight.grad is None
    model = attached().train()
    model.prefix_encoder.requires_grad_(False)
    with pytest.warns(UserWarning, match="the prefix does not train") as warned:
        model(**batch)
        model(**batch)
    assert len(warned) == 1


@pytest.mark.parametrize(
    ("kind", "backbone"), [(kind, way) for kind, way in WAYS if (kind, "question") in MODELS]
)
def test_the_loss_over_positions_of_a_padded_batch_is_the_mean_of_its_texts(kind, backbone):
    model, batch = attached("question", kind, backbone=backbone), make_batch()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # what makes something of nothing
            nn.init.normal_(parameter, std=0.3)
    batch["start_positions"] = torch.tensor([0, 6, 2])
    batch["end_positions"] = torch.tensor([3, 6, 2])
    table, alone = model.prefix_encoder.embedding.weight, []
    for row, length in enumerate((11, 7, 4)):
        text = {
            name: batch[name][row : row + 1, :length] for name in ("input_ids", "attention_mask")
        }
        text |= {name: batch[name][row : row + 1] for name in batch if "positions" in name}
        alone.append(model(**text).loss)
    loss, expected = model(**batch).loss, torch.stack(alone).mean()
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, table)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert any(part._forward_hooks for part in model.children())
    ptv2_fast.detach(model)
    assert not any(part._forward_hooks for part in model.children())


@pytest.mark.parametrize("summary", ["mean", "last"])
def test_a_summary_that_reads_pads_gets_their_states(summary):
    plain, batch = tiny_model("electra", "choice", summary_type=summary), make_batch("choice")
    torch.manual_seed(0)
    expected = attached(model=copy.deepcopy(plain), backbone="hook")(**batch).logits
    torch.manual_seed(0)
    model = attached(model=plain, backbone="frozen")
    with pytest.warns(UserWarning, match="summary reads pad tokens"):
        torch.testing.assert_close(model(**batch).logits, expected)
