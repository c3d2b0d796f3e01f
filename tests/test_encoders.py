"""Attached encoders against prefix tuning by concatenation, and the promises of attach."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

import ptv2_fast
from ptv2_fast import PTuningV2Config
from ptv2_fast.encoders import max_input_tokens
from tests.models import (
    HEADS,
    MAX_POSITIONS,
    MODEL_TYPES,
    assert_close_to_model,
    concatenated_forward,
    make_batch,
    one_thread,  # noqa: F401
    outputs_of,
    tiny_config,
    tiny_model,
)

P = 5


def attached(head: str = "sequence", model_type: str = "bert", model=None, **fields):
    """An attached model whose prefix is as large as real keys and values."""
    model = tiny_model(model_type, head) if model is None else model
    ptv2_fast.attach(model, PTuningV2Config(**{"num_virtual_tokens": P, **fields}))
    for parameter in model.prefix_encoder.parameters():
        torch.nn.init.normal_(parameter)
    return model


def results(output: Tensor, table: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    return output.detach(), torch.autograd.grad(output, table, grad_out.to(output.dtype))[0]


def assert_equals_concatenation(plain, model, batch, head: str, shifted: bool) -> None:
    """Outputs and prefix gradients against transformers' cache."""
    output = outputs_of(head, model(**batch))
    grad_out = torch.randn(output.shape)
    table = model.prefix_encoder.embedding.weight
    actual = results(output, table, grad_out)
    assert actual[1].abs().min() > 0  # every entry of every layer's prefix is tested

    def concatenated(plain, prefix: Tensor) -> tuple[Tensor, Tensor]:
        prefix.requires_grad_()
        output = outputs_of(head, concatenated_forward(plain, prefix, batch, shifted))
        output, gradient = results(output, prefix, grad_out)
        return output, gradient.permute(3, 0, 1, 2, 4).reshape(table.shape)

    assert_close_to_model(actual, concatenated, plain, model.prefix_encoder().detach())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_outputs_and_prefix_gradients_equal_concatenation(model_type, head):
    plain = tiny_model(model_type, head)
    model = attached(head, model=copy.deepcopy(plain))
    assert_equals_concatenation(plain, model, make_batch(head), head, shifted=False)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_position_offset_prefix_counts_like_a_cache_of_length_p(model_type):
    plain = tiny_model(model_type, "token")
    model = attached("token", model=copy.deepcopy(plain), position_offset="prefix")
    assert_equals_concatenation(plain, model, make_batch(), "token", shifted=True)


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
    """Against an attention function of the test's own, since a cache has one length for all."""

    def concatenate(module, query, key, value, attention_mask, scaling=None, **kwargs):
        batch_size = len(query)
        if module.layer_idx in chosen:
            prefix_key, prefix_value = chosen[module.layer_idx]
            key = torch.cat((prefix_key.expand(batch_size, -1, -1, -1), key), dim=2)
            value = torch.cat((prefix_value.expand(batch_size, -1, -1, -1), value), dim=2)
            attention_mask = torch.nn.functional.pad(attention_mask, (P, 0), value=True)
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~attention_mask, -1e9)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("test_subset", concatenate)
    ALL_MASK_ATTENTION_FUNCTIONS.register("test_subset", sdpa_mask)
    plain = tiny_model()
    model = attached(model=copy.deepcopy(plain), layers=[2, 1])
    assert model.prefix_encoder.embedding.weight.shape == (P, 2 * 2 * 16)
    batch = make_batch()
    output = model(**batch, output_hidden_states=True)
    assert [h.requires_grad for h in output.hidden_states] == [False, False, True, True]

    def concatenated(plain, prefix: Tensor) -> tuple[Tensor]:
        chosen.update(enumerate(prefix, start=1))
        return (plain(**batch).logits,)

    chosen: dict[int, Tensor] = {}
    plain.set_attn_implementation("test_subset")
    assert_close_to_model((output.logits,), concatenated, plain, model.prefix_encoder().detach())


def test_a_layer_that_does_not_call_the_hook_is_named():
    model = attached(layers=[0, 2])
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"layers \[0, 2\] of BertModel did not call"):
        model(**make_batch())


def test_attention_outside_the_backbone_is_refused():
    model = attached("bare")
    with pytest.raises(RuntimeError, match="call the model itself"):
        model.forward(**make_batch())


@pytest.mark.parametrize(
    ("fields", "overrides", "message"),
    [
        ({"layers": [3]}, {}, r"layers: expected indices in the range 0\.\.2"),
        ({"modules_to_save": ["poolr"]}, {}, "modules_to_save: .* got 'poolr'"),
        ({"num_virtual_tokens": 40, "position_offset": "prefix"}, {}, "no position remains"),
        ({}, {"hidden_size": 20}, "expected a head_dim that is a multiple of 8 up to 256, got 10"),
        ({}, {"is_decoder": True}, "expected an encoder, got config.is_decoder"),
    ],
)
def test_what_cannot_be_attached_is_refused_and_left_alone(fields, overrides, message):
    model = tiny_model(**overrides)
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        ptv2_fast.attach(model, PTuningV2Config(**fields))
    assert state_of(model) == before


def test_an_unsupported_model_names_the_supported_ones():
    model = tiny_model("distilbert", dim=16, n_heads=2, n_layers=1, hidden_dim=8)
    with pytest.raises(ValueError, match=r"\['bert', 'electra', 'roberta', 'xlm-roberta'\], got"):
        ptv2_fast.attach(model, PTuningV2Config())
    with pytest.raises(ValueError, match="expected a transformers PreTrainedModel"):
        ptv2_fast.attach(torch.nn.Linear(2, 2), PTuningV2Config())


def test_attaching_twice_or_onto_peft_is_refused():
    peft = pytest.importorskip("peft")
    model = attached()
    with pytest.raises(ValueError, match="expected a model without a prefix"):
        ptv2_fast.attach(model, PTuningV2Config())
    lora = tiny_model()
    peft.get_peft_model(lora, peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="without PEFT adapters"):
        ptv2_fast.attach(lora, PTuningV2Config())


def state_of(model) -> tuple:
    """Everything attach may change."""
    hooks = [
        (
            name,
            len(m._forward_pre_hooks),
            len(m._forward_hooks),
            len(m._load_state_dict_pre_hooks),
            id(getattr(m, "config", None)),
        )
        for name, m in model.named_modules()
    ]
    flags = [(name, p.requires_grad, p.dtype) for name, p in model.named_parameters()]
    own = (model.config._attn_implementation, str(model._keys_to_ignore_on_save))
    return hooks, flags, own, sorted(vars(model))


def test_detach_restores_the_model(tmp_path):
    model = tiny_model()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    batch = make_batch()
    logits = model(**batch).logits
    before = state_of(model)
    attached(model=model)
    model(**batch).logits.sum().backward()
    ptv2_fast.detach(model)
    assert state_of(model) == before
    assert torch.equal(model(**batch).logits, logits)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists()
    with pytest.raises(ValueError, match="expected an attached model"):
        ptv2_fast.detach(model)


def test_a_model_that_shares_its_config_is_not_touched():
    plain = tiny_model()
    other = type(plain)(plain.config).eval()
    batch = make_batch()
    logits = other(**batch).logits
    model = attached(model=plain)
    assert other.config._attn_implementation == "eager"
    assert torch.equal(other(**batch).logits, logits)
    configs = {id(m.config) for m in model.modules() if hasattr(m, "config")}
    assert id(other.config) not in configs


def test_the_backbone_is_frozen_and_the_head_and_pooler_train(capsys):
    model = attached()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == [
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
        "prefix_encoder.embedding.weight",
    ]
    assert not [n for n, _ in model.named_parameters() if "prefix" in n and n not in trainable]
    total = sum(p.numel() for p in model.parameters())
    count = 16 * 16 + 16 + 3 * 16 + 3 + P * 2 * 3 * 16
    assert ptv2_fast.get_nb_trainable_parameters(model) == (count, total)
    ptv2_fast.print_trainable_parameters(model)
    line = f"trainable params: {count:,d} || all params: {total:,d} || "
    assert capsys.readouterr().out == line + f"trainable%: {100 * count / total:.4f}\n"


def test_an_output_layer_tied_to_the_embeddings_stays_frozen(tmp_path):
    model = transformers.AutoModelForMaskedLM.from_config(tiny_config())
    attached(model=model)
    ptv2_fast.save_adapter(model, tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "cls.predictions.transform.dense.weight" in names
    assert "cls.predictions.decoder.weight" not in names
    assert not model.get_output_embeddings().weight.requires_grad


def test_modules_to_save_train_inside_the_backbone():
    model = attached(modules_to_save=["token_type_embeddings", "layer.0.output.LayerNorm"])
    model(**make_batch()).logits.sum().backward()
    for module in (
        model.bert.embeddings.token_type_embeddings,
        model.bert.encoder.layer[0].output.LayerNorm,
    ):
        assert module.weight.grad.abs().max() > 0
    assert model.bert.embeddings.word_embeddings.weight.grad is None


def test_inference_mode_trains_nothing():
    assert ptv2_fast.get_nb_trainable_parameters(attached(inference_mode=True))[0] == 0


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
    model = attached(model=tiny_model(**dropout), prefix_dropout=0.2).train()
    batch, table = make_batch(lengths=lengths), model.prefix_encoder.embedding.weight

    def gradient() -> Tensor:
        torch.manual_seed(1)
        return torch.autograd.grad(model(**batch).logits.square().sum(), table)[0]

    whole = gradient()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        with pytest.warns(UserWarning, match="switched to use_reentrant=False"):
            gradient()
    calls = count_calls(model)
    assert torch.equal(gradient(), whole)
    assert whole.view(P, 3, -1).abs().amax(dim=(0, 2)).min() > 0
    # Each layer runs once forward and once again in the backward pass.
    assert calls == [3 * 2]


def test_layers_below_the_lowest_prefix_have_no_backward_pass():
    model = attached(layers=[2]).train()
    model.activation_checkpointing_enable()  # makes the embeddings require grad
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

    for layer in model.bert.encoder.layer:
        layer.attention.self.query.register_forward_hook(count)
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


def test_compiles_into_one_graph():
    model = attached("token", position_offset="prefix").train()
    batch, table = make_batch(), model.prefix_encoder.embedding.weight
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = [forward(**batch).logits for forward in (model, compiled)]
    gradients = [torch.autograd.grad(output.square().sum(), table)[0] for output in outputs]
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0])


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


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_attached_and_independent(duplicate, tmp_path):
    model, batch = attached(position_offset="prefix"), make_batch()
    logits = model(**batch).logits
    twin = duplicate(model)
    assert torch.equal(twin(**batch).logits, logits)
    twin(**batch).logits.sum().backward()
    assert model.prefix_encoder.embedding.weight.grad is None
    with torch.no_grad():
        twin.prefix_encoder.embedding.weight.add_(1)
    twin.save_pretrained(tmp_path)
    plain = ptv2_fast.detach(duplicate(model))
    ptv2_fast.load_adapter(plain, tmp_path)
    assert torch.equal(plain(**batch).logits, twin(**batch).logits)
    ptv2_fast.detach(twin)
    assert torch.equal(model(**batch).logits, logits)


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
        ({"attention_mask": torch.ones(3, 1, 11, 11)}, r"attention_mask: expected shape \[B, T\]"),
        ({"attention_mask": torch.ones(3, 10)}, r"= \[3, 11\], got \[3, 10\]"),
        ({"encoder_hidden_states": torch.ones(3, 2, 16)}, "encoder_hidden_states: expected None"),
        ({"is_causal": True}, "is_causal: expected False"),
    ],
)
def test_what_is_not_served_is_refused(extra, message):
    with pytest.raises(ValueError, match=message):
        attached()(**{**make_batch(), **extra})


def test_a_data_parallel_replica_is_refused():
    model = attached()
    model.bert._is_replica = True  # what torch.nn.parallel.replicate sets on its copies
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        model(**make_batch())


@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_tokens_init_is_the_keys_and_values_of_the_given_tokens(layers):
    model = tiny_model("bert", "bare", hidden_dropout_prob=0.5).train()
    input_ids = torch.randint(2, 60, (P + 2,))
    config = PTuningV2Config(num_virtual_tokens=P, init="tokens", layers=layers)
    plain = copy.deepcopy(model).eval()
    ptv2_fast.attach(model, config, init_input_ids=input_ids)
    assert model.training and model.encoder.layer[0].training

    hidden_states = plain(input_ids[None, :P], output_hidden_states=True).hidden_states
    for layer, (key, value) in model.prefix_encoder.layer_prefixes().items():
        attention = plain.encoder.layer[layer].attention.self
        for actual, projection in ((key, attention.key), (value, attention.value)):
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
