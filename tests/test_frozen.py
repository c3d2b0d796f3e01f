"""Frozen blocks: every policy, dropout, precision and layout against plain torch, and fallbacks."""

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ptv2_fast
from ptv2_fast import PTuningV2Config
from ptv2_fast.encoders.attachment import find_attachment
from ptv2_fast.frozen import engine
from ptv2_fast.frozen.memory import POLICIES, BlockShape, kept_bytes_per_token
from ptv2_fast.ops.dropout import (
    ATTENTION_OUTPUT_STREAM,
    FEED_FORWARD_STREAM,
    dropout_multiplier,
)
from ptv2_fast.ops.options import Options
from ptv2_fast.ops.reference import reference_attention
from ptv2_fast.training.measure import kept_bytes
from tests.models import (
    assert_close_to_model,
    attached,
    make_batch,
    one_thread,  # noqa: F401
    outputs_of,
    real_tokens,
    tiny_model,
)

DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
WITHOUT_FALLBACK = {"backbone": "frozen", "strict": True}


def results(model, batch, head: str = "sequence", seed: int = 1) -> list[Tensor]:
    """The output of real tokens and all gradients, with the same draws for every call."""
    torch.manual_seed(seed)
    output = outputs_of(head, model(**batch)) * real_tokens(head, batch)
    grad_out = torch.randn(output.shape).to(output.dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, trained, grad_out)]


@pytest.mark.parametrize("layers", [None, [1], [2]], ids=["all", "middle", "last"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("head", ["sequence", "token"])
def test_policies_give_the_same_bits(head, precision, layers, monkeypatch):
    monkeypatch.setattr(engine, "CPU_CHUNK", 8)  # several chunks, the last one shorter
    plain = tiny_model(head=head, **DROPOUT)
    if precision == "bfloat16":
        plain.to(torch.bfloat16)
    fields = {"layers": layers, "prefix_dropout": 0.2, **WITHOUT_FALLBACK}
    model = attached(head, model=plain, **fields).train()
    batch, all_results = make_batch(head), {}
    for policy in POLICIES:
        set_fields(model, recompute=policy)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            all_results[policy] = results(model, batch, head)
    for policy in POLICIES[1:]:
        for actual, expected in zip(all_results[policy], all_results["none"], strict=True):
            assert torch.equal(actual, expected)
    assert all(tensor.abs().max() > 0 for tensor in all_results["none"])


def reference_forward(plain, prefix: Tensor, batch, seeds: Tensor, prefix_dropout: float) -> Tensor:
    """The logits of a BERT with a prefix [L, 2, H, P, D], padded, by definition."""
    hidden = plain.bert.embeddings(batch["input_ids"])
    rows, tokens, width = hidden.shape
    mask = batch["attention_mask"].bool()
    for index, layer in enumerate(plain.bert.encoder.layer):
        seed = seeds[index : index + 1]
        attention = layer.attention.self
        query, key, value = (
            linear(hidden).unflatten(-1, (2, 8)).transpose(1, 2)
            for linear in (attention.query, attention.key, attention.value)
        )
        options = Options(mask, seed, 8**-0.5, attention.dropout.p, prefix_dropout)
        out, _ = reference_attention(
            query, key, value, prefix[index, :1], prefix[index, 1:], options
        )
        out = out.to(hidden.dtype).transpose(1, 2).flatten(2)
        for part, stream in (
            (layer.attention.output, ATTENTION_OUTPUT_STREAM),
            (layer.output, FEED_FORWARD_STREAM),
        ):
            if stream == FEED_FORWARD_STREAM:
                out = layer.intermediate(hidden)
            multiplier = dropout_multiplier(
                (rows, 1, tokens, width), part.dropout.p, seed, stream, hidden.dtype
            )
            hidden = part.LayerNorm(hidden + part.dense(out) * multiplier[:, 0])
    return plain.classifier(hidden) * batch["attention_mask"][..., None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_outputs_and_gradients_equal_a_reference_that_draws_the_same_counters(p, dtype):
    plain = tiny_model(head="token", hidden_dropout_prob=p, attention_probs_dropout_prob=p)
    plain.to(dtype)
    plain.bert.embeddings.dropout.p = 0.0  # the blocks' draws are the first
    model = attached("token", model=copy.deepcopy(plain), prefix_dropout=p, **WITHOUT_FALLBACK)
    batch, table = make_batch("token"), model.prefix_encoder.embedding.weight
    table.data = table.data.to(dtype).float()  # the oracle starts from the same values
    grad_out = torch.randn(3, 11, 3).to(dtype)
    torch.manual_seed(5)
    seeds = torch.randint(2**63 - 1, (3,))
    torch.manual_seed(5)
    logits = model.train()(**batch).logits * batch["attention_mask"][..., None]
    actual = (logits.detach(), torch.autograd.grad(logits, table, grad_out)[0].to(dtype))

    def reference(plain, prefix: Tensor) -> tuple[Tensor, Tensor]:
        prefix.requires_grad_()
        output = reference_forward(plain, prefix, batch, seeds, p)
        (gradient,) = torch.autograd.grad(output, prefix, grad_out.to(output.dtype))
        return output.detach(), gradient.permute(3, 0, 1, 2, 4).reshape(table.shape)

    prefix = model.prefix_encoder().detach()
    assert_close_to_model(actual, reference, plain.eval(), prefix, dtype=dtype)


@pytest.mark.parametrize("head", ["sequence", "token"])
@pytest.mark.parametrize("lengths", [(11, 11, 11), (11, 7, 1)], ids=["unpadded", "padded"])
def test_dropout_does_not_depend_on_the_width_of_the_batch(lengths, head):
    model = attached(head, model=tiny_model(head=head, **DROPOUT), **WITHOUT_FALLBACK).train()
    model.bert.embeddings.dropout.p = model.dropout.p = 0.0
    narrow = make_batch(head, lengths)
    wide = {
        "input_ids": nn.functional.pad(narrow["input_ids"], (0, 6), value=1),
        "attention_mask": nn.functional.pad(narrow["attention_mask"], (0, 6)),
    }
    if head == "sequence":
        for actual, expected in zip(results(model, wide), results(model, narrow), strict=True):
            assert torch.equal(actual, expected)
    else:
        torch.manual_seed(1)
        expected = model(**narrow).logits * real_tokens(head, narrow)
        torch.manual_seed(1)
        assert torch.equal(model(**wide).logits[:, :11] * real_tokens(head, narrow), expected)


def test_hidden_states_are_those_of_the_hook_path_and_pads_are_zero():
    plain, batch = tiny_model(head="sequence"), make_batch()
    model = attached(model=copy.deepcopy(plain), **WITHOUT_FALLBACK)
    hook = attached(model=plain, backbone="hook")
    hook.load_state_dict(model.state_dict())
    mask = batch["attention_mask"][..., None]
    states = model(**batch, output_hidden_states=True).hidden_states
    expected = hook(**batch, output_hidden_states=True).hidden_states
    for actual, state in zip(states[1:], expected[1:], strict=True):
        assert torch.equal(actual, actual * mask)
        torch.testing.assert_close(actual, state * mask)


def test_a_sequence_classifier_computes_the_rows_its_head_reads():
    model, batch, rows = attached(**WITHOUT_FALLBACK), make_batch(), []
    original = engine.run_block

    def spy(hidden, *arguments):
        result = original(hidden, *arguments)
        rows.append(len(result[0]))
        return result

    engine.run_block = spy
    try:
        alone = model(**batch).logits
        assert rows == [22, 22, 3]
        # Whoever else may look gets all rows.
        assert torch.equal(model.bert(**batch).last_hidden_state[1, 7:], torch.zeros(4, 16))
        with_states = model(**batch, output_hidden_states=True).logits
        handle = model.bert.encoder.register_forward_hook(lambda *unused: None)
        watched = model(**batch).logits
        handle.remove()
        assert rows[3:] == [22] * 9
    finally:
        engine.run_block = original
    torch.testing.assert_close(with_states, alone)
    assert torch.equal(watched, with_states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", POLICIES)
def test_kept_bytes_are_those_of_the_formula(policy, dtype):
    hidden, heads, layers = 64, 4, 5
    overrides = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": 256}
    model = tiny_model(head="token", num_hidden_layers=layers, **overrides, **DROPOUT).to(dtype)
    attached("token", model=model, recompute=policy, **WITHOUT_FALLBACK).train()
    size = dtype.itemsize
    shape = BlockShape(hidden, 256, heads, size, size)

    def kept(lengths) -> int:
        batch = make_batch("token", lengths, width=39)
        return kept_bytes(lambda: model(**batch).logits.sum(), model)

    # A difference of two batches: what does not grow with the tokens is no matter here.
    upper = kept_bytes_per_token(policy, shape)
    lowest = kept_bytes_per_token(policy, shape, is_lowest=True)
    expected = 20 * ((layers - 1) * upper + lowest)
    shared = 20 * (8 + 8)  # once a forward: the coordinates and the places of the rows
    assert kept((38, 20, 9)) - kept((18, 20, 9)) == expected + shared


def test_checkpointing_flags_choose_a_policy_and_train_the_prefix():
    model, batch = attached(model=tiny_model(**DROPOUT), **WITHOUT_FALLBACK).train(), make_batch()
    whole = results(model, batch)
    before = kept_bytes(lambda: model(**batch).logits.sum(), model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        for actual, expected in zip(results(model, batch), whole, strict=True):
            assert torch.equal(actual, expected)
        assert kept_bytes(lambda: model(**batch).logits.sum(), model) < 0.6 * before


def test_a_memory_budget_is_met_or_names_the_least():
    model = attached(model=tiny_model(num_hidden_layers=6), **WITHOUT_FALLBACK).train()
    batch = make_batch()
    free, reference = kept_bytes(lambda: model(**batch).logits.sum(), model), results(model, batch)
    set_fields(model, memory_budget=1)
    with pytest.raises(ValueError, match=r"memory_budget: expected at least \d+ bytes") as error:
        model(**batch)
    least = int(str(error.value).split("at least ")[1].split()[0])
    set_fields(model, memory_budget=least)
    assert kept_bytes(lambda: model(**batch).logits.sum(), model) < free
    for actual, expected in zip(results(model, batch), reference, strict=True):
        assert torch.equal(actual, expected)


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


def test_backbone_dtype_converts_frozen_weights_only_and_detach_converts_back():
    plain, batch = tiny_model(), make_batch()
    for backbone in ("frozen", "hook"):
        model = attached(
            model=copy.deepcopy(plain), backbone_dtype="bf16", backbone=backbone
        ).train()
        for name, parameter in model.named_parameters():
            frozen = not parameter.requires_grad
            assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name
        output, *gradients = results(model, batch)
        assert output.dtype == torch.float32
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        assert all(gradient.abs().max() > 0 for gradient in gradients)
        ptv2_fast.detach(model)
        for name, parameter in model.named_parameters():
            expected = plain.get_parameter(name)
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter.bfloat16(), expected.bfloat16())


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_cached_layers_run_once_for_an_example(place, tmp_path):
    plain = tiny_model(num_hidden_layers=4)
    folder = tmp_path / "states"
    where = "memory" if place == "memory" else str(folder)
    fields = {"layers": [2, 3], **WITHOUT_FALLBACK}
    model = attached(model=copy.deepcopy(plain), cache_frozen_layers=where, **fields).train()
    other = attached(model=plain, **fields).train()
    other.load_state_dict(model.state_dict())
    batch, rows, original = make_batch(), [], engine.run_block

    def spy(hidden, *arguments):
        rows.append(len(hidden))
        return original(hidden, *arguments)

    expected = results(other, batch)
    engine.run_block = spy
    try:
        for _ in range(2):
            for actual, exact in zip(results(model, batch), expected, strict=True):
                torch.testing.assert_close(actual, exact)
        assert rows == [22] * 4 + [22] * 2
        narrower = {name: tensor[1:, :7] for name, tensor in batch.items()}
        new = {name: torch.cat((tensor, tensor[:1])) for name, tensor in narrower.items()}
        new["input_ids"][0, 3] = 59  # one new example; two are known, though in a wider batch
        rows.clear()
        torch.testing.assert_close(model(**new).logits, other(**new).logits)
        assert rows[:4] == [7, 7, 18, 18]
        if place == "disk":  # another run, and then other weights
            again = attached(model=copy.deepcopy(ptv2_fast.detach(other)), **fields,
                             cache_frozen_layers=where)  # fmt: skip
            rows.clear()
            again(**batch)
            assert rows == [22, 22]
            with torch.no_grad():
                again.bert.embeddings.word_embeddings.weight.mul_(2)
            again(**batch)
            assert rows[2:] == [22] * 4
            assert not list(folder.glob("*.tmp"))
    finally:
        engine.run_block = original


@pytest.mark.parametrize(
    ("overrides", "layers", "message"),
    [
        ({}, None, "expected `layers` without the lowest ones"),
        ({"hidden_dropout_prob": 0.1}, [2], "expected a model without dropout, got .*0.1"),
    ],
)
def test_what_cannot_be_cached_is_refused(overrides, layers, message):
    config = PTuningV2Config(layers=layers, cache_frozen_layers="memory")
    with pytest.raises(ValueError, match=message):
        ptv2_fast.attach(tiny_model(**overrides), config)


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
        results(model, batch, "token"), results(hook, batch, "token"), strict=True
    ):
        torch.testing.assert_close(actual, expected)
    model.train()
    whole = results(model, batch, "token")
    for policy in POLICIES:
        set_fields(model, recompute=policy)
        for actual, expected in zip(results(model, batch, "token"), whole, strict=True):
            assert torch.equal(actual, expected)


def lora_on_a_linear(model) -> None:
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["query"]), model)


def unfreeze(model) -> None:
    model.bert.encoder.layer[1].output.dense.weight.requires_grad_()


def listen_inside(model) -> None:
    model.bert.encoder.layer[2].intermediate.dense.register_forward_hook(lambda *unused: None)


def shard(model) -> None:
    class Shard(nn.Parameter):
        pass

    output = model.bert.encoder.layer[1].output.dense
    output.weight = Shard(output.weight.data, requires_grad=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shard, r"layer 1: the weight of output is a .*Shard"),
        (lora_on_a_linear, r"layer 0: query is a peft\.[a-z.]*\.Linear, not a Linear"),
        (unfreeze, "layer 1: its parameters are trained"),
        (listen_inside, "layer 2: intermediate has forward hooks"),
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
    plain, batch = tiny_model(hidden_act="gelu_new"), make_batch()
    reason = "layer 0: expected the activation 'gelu', got NewGELUActivation"
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


def test_a_step_reads_from_the_device_once():
    """Counted by the operators that would wait for a GPU."""
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "item"}
    called: list[str] = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            indices = args[1] if name == "index" else ()
            if name in waits or any(i is not None and i.dtype == torch.bool for i in indices):
                called.append(name)
            return func(*args, **(kwargs or {}))

    model = attached("token", model=tiny_model(head="token", **DROPOUT), prefix_dropout=0.2,
                     **WITHOUT_FALLBACK).train()  # fmt: skip
    batch, lists, original = make_batch("token"), [], Tensor.tolist
    Tensor.tolist = lambda tensor: lists.append(1) or original(tensor)
    try:
        with Listen():
            model(**batch).logits.square().sum().backward()
    finally:
        Tensor.tolist = original
    assert lists == [1] and not called


def test_left_padding_takes_the_hook_path():
    model, batch = attached(), make_batch()
    batch = {name: tensor.flip(-1) for name, tensor in batch.items()}
    hook = attached(backbone="hook")
    hook.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="left padding"):
        assert torch.equal(model(**batch).logits, hook(**batch).logits)


def set_fields(model, **fields) -> None:
    """Change the configuration of an attached model."""
    frozen = find_attachment(model)._frozen
    frozen.config = dataclasses.replace(frozen.config, **fields)
