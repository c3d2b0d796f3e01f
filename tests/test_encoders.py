"""The promises of attach: what an attached encoder computes, counts, refuses and starts from."""

import copy
import functools
import inspect
import types
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ptv2_fast
from ptv2_fast import PTuningV2Config
from ptv2_fast.encoders import max_input_tokens
from ptv2_fast.encoders.checkpointing import checkpoint_activations
from ptv2_fast.encoders.families import FAMILIES
from tests.concatenation import concatenating_attention
from tests.models import (
    DROPOUT,
    MAX_POSITIONS,
    MODEL_TYPES,
    P,
    assert_close_to_model,
    attached,
    check_equals_concatenation,
    make_batch,
    one_thread,  # noqa: F401
    outputs_of,
    real_tokens,
    step_results,
    tiny_config,
    tiny_model,
)

WITH_POSITION_TABLE = [
    name
    for name in MODEL_TYPES
    if FAMILIES[name].has_position_table(tiny_config(name)) and not FAMILIES[name].keeps_positions
]


@pytest.mark.parametrize("model_type", WITH_POSITION_TABLE)
def test_position_offset_prefix_counts_like_a_cache_of_length_p(model_type):
    plain = tiny_model(model_type, "token")
    model = attached("token", model=copy.deepcopy(plain), position_offset="prefix")
    check_equals_concatenation(plain, model, make_batch(), "token", shifted=True)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
@pytest.mark.parametrize("position_offset", ["none", "prefix"])
def test_embedded_input_equals_token_ids(model_type, position_offset):
    model = attached("token", model_type, position_offset=position_offset)
    input_ids = make_batch(lengths=(11, 11))["input_ids"]
    embeds = model.get_input_embeddings()(input_ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids=input_ids).logits)


def test_explicit_position_ids_are_taken_as_they_are():
    model = attached("token", position_offset="prefix")
    input_ids = make_batch()["input_ids"]
    shifted = torch.arange(P, P + 11).expand(3, 11)
    explicit = model(input_ids=input_ids, position_ids=shifted)
    assert torch.equal(explicit.logits, model(input_ids=input_ids).logits)


def test_layers_outside_the_subset_run_without_a_prefix():
    """Against an attention function of the tests' own, since a cache has one length for all."""
    plain = tiny_model()
    model = attached(model=copy.deepcopy(plain), layers=[2, 1])
    assert model.prefix_encoder.embedding.weight.shape == (P, 2 * 2 * 16)
    batch = make_batch()
    output = model(**batch, output_hidden_states=True)
    assert [h.requires_grad for h in output.hidden_states] == [False, False, True, True]

    def concatenated(plain, prefix: Tensor) -> tuple[Tensor]:
        with concatenating_attention(plain, dict(enumerate(prefix, start=1))):
            return (plain(**batch).logits,)

    assert_close_to_model((output.logits,), concatenated, plain, model.prefix_encoder().detach())


def test_a_layer_that_does_not_call_the_hook_is_named():
    model = attached(layers=[0, 2], backbone="hook")
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"layers \[0, 2\] of BertModel did not call"):
        model(**make_batch())


@pytest.mark.parametrize("backbone", ["hook", "frozen"])
def test_attention_outside_the_backbone_is_refused(backbone):
    model = attached("bare", backbone=backbone)
    with pytest.raises(RuntimeError, match="call the model itself"):
        model.encoder.layer[0](torch.ones(1, 2, 16))
    model.forward = types.MethodType(type(model).forward, model)
    with pytest.raises(RuntimeError, match="leave its backbone's forward in place"):
        model(**make_batch())


@pytest.mark.parametrize("backbone", ["hook", "frozen"])
@pytest.mark.parametrize("head", ["bare", "sequence", "token"])
def test_forward_called_directly_is_a_call(head, backbone):
    model, batch = attached(head, backbone=backbone), make_batch()
    plain = tiny_model(head=head)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    for module in (model, model.base_model):
        kind = "bare" if module is model.base_model else head
        expected = outputs_of(kind, module(**batch))
        # Without hooks the last layer computes every token for the head, in other products.
        actual = outputs_of(kind, module.forward(*batch.values()))
        torch.testing.assert_close(actual, expected)
        gradients = [
            torch.autograd.grad(output.square().sum(), model.prefix_encoder.embedding.weight)[0]
            for output in (actual, expected)
        ]
        torch.testing.assert_close(*gradients)
    with ptv2_fast.disabled(model):
        assert not torch.equal(outputs_of(kind, module.forward(**batch)), actual)
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        model.forward(**batch, output_attentions=True)


@pytest.mark.parametrize("position_offset", ["none", "prefix"])
def test_disabled_is_the_plain_model(position_offset):
    plain, batch = tiny_model("roberta"), make_batch()
    model = attached(model=copy.deepcopy(plain), position_offset=position_offset)
    with_prefix = model(**batch).logits
    with ptv2_fast.disabled(model):
        without = model(**batch).logits
    assert_close_to_model((without,), lambda plain: (plain(**batch).logits,), plain)
    assert torch.equal(model(**batch).logits, with_prefix)
    assert not torch.equal(without, with_prefix)


@pytest.mark.parametrize("backbone", ["frozen", "hook"])
@pytest.mark.parametrize(
    ("model_type", "head"), [("bert", "sequence"), ("deberta-v2", "token"), ("llama", "token")]
)
def test_a_gated_prefix_starts_as_the_model_without_one_and_trains(model_type, head, backbone):
    """To the bit of the same kernels, with dropout too; the gates leave 0, the prefix its start."""
    model = tiny_model(model_type, head)
    config = PTuningV2Config(num_virtual_tokens=5, prefix_gate=True, backbone=backbone)
    encoder = ptv2_fast.attach(model, config).train().prefix_encoder
    before, batch, outputs = encoder().clone(), make_batch(head), []
    for context in (nullcontext(), ptv2_fast.disabled(model)):
        torch.manual_seed(3)
        with context:
            outputs.append(model(**batch).logits.detach())
    assert torch.equal(*outputs)
    labels = torch.arange(outputs[0][..., 0].numel()).view(outputs[0].shape[:-1]) % 2
    optimizer, losses = torch.optim.AdamW(encoder.parameters(), lr=0.05, weight_decay=0.0), []
    for _ in range(12):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert (encoder.gate != 0).all() and encoder.gate.abs().max() > 0.1
    assert not (encoder() == before).flatten(2).all(dim=2).any()
    assert losses[-1] < losses[0]


def test_gates_are_those_of_the_hook_path():
    """Of heads that query heads share, and of the first token's row alone."""
    batch = make_batch()
    results = []
    for backbone in ("frozen", "hook"):
        torch.manual_seed(0)
        model = attached("sequence", "eurobert", prefix_gate=True, backbone=backbone)
        results.append(step_results(model, batch))
    for frozen, hook in zip(*results, strict=True):
        torch.testing.assert_close(frozen, hook)


def test_two_forwards_before_one_backward_add_up():
    model, batches = attached(), [make_batch(), make_batch()]
    table = model.prefix_encoder.embedding.weight
    separate = [torch.autograd.grad(model(**b).logits.square().sum(), table)[0] for b in batches]
    losses = [model(**b).logits.square().sum() for b in batches]
    losses[0].backward()
    losses[1].backward()
    assert torch.equal(table.grad, separate[0] + separate[1])


@pytest.mark.parametrize("lengths", [(11, 11, 11), (11, 7, 4)], ids=["unpadded", "padded"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients_with_dropout(lengths, use_reentrant):
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    model = attached(model=tiny_model(**dropout), prefix_dropout=0.2, backbone="hook").train()
    batch, table = make_batch(lengths=lengths), model.prefix_encoder.embedding.weight

    def gradient() -> Tensor:
        torch.manual_seed(1)
        return torch.autograd.grad(model(**batch).logits.square().sum(), table)[0]

    whole = gradient()
    checkpoint_activations(model, use_reentrant)
    if use_reentrant:
        with pytest.warns(UserWarning, match="switched to use_reentrant=False"):
            gradient()
    calls = count_calls(model)
    assert torch.equal(gradient(), whole)
    assert whole.view(P, 3, -1).abs().amax(dim=(0, 2)).min() > 0
    # Each layer runs once forward and once again in the backward pass.
    assert calls == [3 * 2]


def test_a_layer_of_many_numbers_is_not_recomputed():
    """transformers checkpoints no ALBERT; whoever does gets no gradient of another layer."""
    model = attached("token", "albert", backbone="hook")
    with pytest.raises(ValueError, match="cannot checkpoint"):
        checkpoint_activations(model)
    layer = layers_of(model)[0]
    call = functools.partial(type(layer).forward, layer)
    layer.forward = functools.partial(checkpoint, call, use_reentrant=False)
    loss = model(**make_batch()).logits.sum()
    with pytest.raises(RuntimeError, match="no way to recompute one"):
        loss.backward()


def layers_of(model) -> list[torch.nn.Module]:
    return FAMILIES[model.config.model_type].layer_modules(model.base_model)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_layers_below_the_lowest_prefix_have_no_backward_pass(model_type):
    model = attached(model_type=model_type, layers=[2], backbone="hook").train()
    checkpoint_activations(model)  # makes the embeddings require grad
    calls = count_calls(model)
    output = model(**make_batch(), output_hidden_states=True)
    assert [h.requires_grad for h in output.hidden_states[1:]] == [False, False, True]
    output.logits.sum().backward()
    assert calls == [3 + 1]  # only the prefixed layer is recomputed


def test_a_gradient_that_the_caller_asks_for_passes_through():
    model = attached("token")
    embeds = model.get_input_embeddings()(make_batch()["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embeds).logits.square().sum().backward()
    assert embeds.grad.abs().amax(dim=-1).min() > 0


def count_calls(model) -> list[int]:
    """A counter of the query projections' calls."""
    calls = [0]

    def count(*unused) -> None:
        calls[0] += 1

    family = FAMILIES[model.config.model_type]
    for layer in layers_of(model):
        attention = layer.get_submodule(family.attention)
        attention.get_submodule(family.query).register_forward_hook(count)
    return calls


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [({}, {"prefix_dropout": 0.5}), ({"attention_probs_dropout_prob": 0.5}, {})],
    ids=["prefix", "attention"],
)
def test_dropout_acts_in_training_only(overrides, fields):
    model, batch = attached(model=tiny_model(**overrides), **fields), make_batch()
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_compiles_into_one_graph(model_type):
    model = attached("token", model_type, position_offset="prefix").train()
    batch, table = make_batch(), model.prefix_encoder.embedding.weight
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    real = real_tokens("token", batch)
    outputs = [forward(**batch).logits * real for forward in (model, compiled)]
    gradients = [torch.autograd.grad(output.square().sum(), table)[0] for output in outputs]
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_forward_itself_is_compiled_and_traced():
    model = attached(model=tiny_model(head="bare", num_hidden_layers=1))
    batch = make_batch(lengths=(11, 11, 11))
    model.config.return_dict = False
    expected = model(**batch)[0]
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch)[0], expected)
    traced = torch.jit.trace(model.forward, tuple(batch.values()), check_trace=False)
    torch.testing.assert_close(traced(*batch.values())[0], expected)


@pytest.mark.parametrize("how", ["autocast", "before", "after"])
def test_bfloat16_keeps_a_float32_master(how):
    model = tiny_model()
    if how == "before":
        model.to(torch.bfloat16)
    attached(model=model)
    exact = model.prefix_encoder.embedding.weight.clone()
    if how == "after":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        logits = model(**make_batch()).logits
    logits.float().square().sum().backward()
    weight = model.prefix_encoder.embedding.weight
    assert logits.dtype == torch.bfloat16
    assert weight.dtype == weight.grad.dtype == torch.float32 and torch.equal(weight, exact)
    assert torch.isfinite(weight.grad).all() and weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("model_type", "position_offset", "limit"),
    [
        ("bert", "none", 40),
        ("bert", "prefix", 35),
        ("roberta", "none", 38),
        ("roberta", "prefix", 33),
    ],
)
def test_the_longest_input_runs_and_one_token_more_names_the_remaining(
    model_type, position_offset, limit
):
    model = attached("token", model_type, position_offset=position_offset)
    assert max_input_tokens(model) == limit
    model(**make_batch(lengths=(limit, 3), width=limit))
    with pytest.raises(ValueError, match=f"expected at most {limit} tokens, got {limit + 1}; .*"):
        model(**make_batch(lengths=(limit + 1, 3), width=limit + 1))
    if position_offset == "prefix":
        with pytest.raises(ValueError, match=f"{limit} remain, because position_offset='prefix'"):
            model(**make_batch(lengths=(limit + 1,), width=limit + 1))


def test_pads_of_roberta_take_no_position():
    """A batch wider than the position table, whose texts fit, equals the batch without the pads."""
    model = attached("token", "roberta", position_offset="prefix")
    wide = make_batch(lengths=(33, 20), width=38)
    narrow = {name: tensor[:, :33] for name, tensor in wide.items()}
    real = narrow["attention_mask"].bool()
    assert_close_to_model(
        (model(**wide).logits[:, :33][real],), lambda m: (m(**narrow).logits[real],), model
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"output_attentions": True}, "output_attentions: expected False"),
        ({"past_key_values": object()}, "past_key_values: expected None"),
        ({"cache": object()}, "cache: expected None"),
        ({"attention_mask": torch.ones(3, 1, 11, 11)}, r"attention_mask: expected shape \[B, T\]"),
        ({"attention_mask": torch.ones(3, 10)}, r"= \[3, 11\], got \[3, 10\]"),
        ({"encoder_hidden_states": torch.ones(3, 2, 16)}, "encoder_hidden_states: expected None"),
        ({"is_causal": True}, "is_causal: expected False"),
    ],
)
def test_what_is_not_served_is_refused(extra, message):
    with pytest.raises(ValueError, match=message):
        attached()(**{**make_batch(), **extra})


@pytest.mark.parametrize("backbone", ["frozen", "hook"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_bias", torch.ones(1, 2, 11, 11)),
        ("softcap", 30.0),
        ("s_aux", torch.ones(2)),
        ("head_mask", torch.ones(2)),
        ("sliding_window", 4),
        ("cu_seq_lens_q", torch.tensor([0, 11])),
        ("unheard_of", True),
    ],
)
def test_an_argument_of_attention_that_is_not_served_is_named(name, value, backbone):
    model, batch = attached(backbone=backbone), make_batch()
    without = model(**batch).logits
    harmless = {name: None, "use_mask": False, "num_items_in_batch": 3}
    assert torch.equal(model(**batch, **harmless).logits, without)
    kind = type(value).__name__
    with pytest.raises(ValueError, match=f"{name}: expected None in .* layer 0, got a {kind}"):
        model(**batch, **{name: value})


def test_a_data_parallel_replica_is_refused():
    model = attached()
    model.bert._is_replica = True  # what torch.nn.parallel.replicate sets on its copies
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        model(**make_batch())


@pytest.mark.parametrize("layers", [None, [0, 2]])
@pytest.mark.parametrize("model_type", ["albert", "bert", "distilbert", "mpnet"])
def test_tokens_init_is_the_keys_and_values_of_the_given_tokens(model_type, layers):
    model = tiny_model(model_type, "bare", **DROPOUT, dropout=0.5).train()
    input_ids = torch.randint(2, 60, (P + 2,))
    config = PTuningV2Config(num_virtual_tokens=P, init="tokens", layers=layers)
    plain = copy.deepcopy(model).eval()
    ptv2_fast.attach(model, config, init_input_ids=input_ids)
    assert model.training and all(layer.training for layer in layers_of(model))

    hidden_states = plain(input_ids[None, :P], output_hidden_states=True).hidden_states
    for layer, (key, value, _) in model.prefix_encoder.layer_prefixes().items():
        family = FAMILIES[model_type]
        attention = layers_of(plain)[layer].get_submodule(family.attention)
        for actual, name in ((key, family.key), (value, family.value)):
            projection = attention.get_submodule(name)
            expected = projection(hidden_states[layer])[0].view(P, 2, 8).transpose(0, 1)
            assert torch.equal(actual, expected)


def test_tokens_init_refuses_bad_ids():
    config = PTuningV2Config(num_virtual_tokens=P, init="tokens")
    for input_ids, message in (
        (torch.ones(P - 1, dtype=torch.long), "at least 5 token ids, got 4"),
        (torch.full((P,), 60), r"expected ids in 0\.\.59, got 60\.\.60"),
    ):
        model = tiny_model()
        with pytest.raises(ValueError, match=message):
            ptv2_fast.attach(model, config, input_ids)
        assert not hasattr(model, "prefix_encoder")
    with pytest.raises(ValueError, match="init_input_ids: expected None with init='normal'"):
        ptv2_fast.attach(tiny_model(), PTuningV2Config(), torch.ones(20, dtype=torch.long))


def test_tokens_init_draws_ids_and_splits_a_prefix_longer_than_the_positions():
    config = PTuningV2Config(num_virtual_tokens=MAX_POSITIONS + 3, init="tokens")
    table = ptv2_fast.attach(tiny_model(), config).prefix_encoder.embedding.weight
    assert torch.isfinite(table).all() and (table.std(dim=0) > 0.1).all()
