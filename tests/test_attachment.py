"""What attach changes, refuses and restores, and copies of attached models."""

import copy
import functools
import inspect
import io
import pickle
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

import ptv2_fast
from ptv2_fast import PrefixEncoder, PTuningV2Config
from ptv2_fast.encoders.families import FAMILIES
from ptv2_fast.encoders.family import Family
from ptv2_fast.encoders.first_token import reads_first_token_only
from tests.models import (
    BACKBONES,
    MAX_POSITIONS,
    MODEL_TYPES,
    MODELS,
    P,
    attached,
    make_batch,
    one_thread,  # noqa: F401
    outputs_of,
    tiny_config,
    tiny_model,
)


@pytest.mark.parametrize(
    ("fields", "overrides", "message"),
    [
        ({"layers": [3]}, {}, r"layers: expected indices in the range 0\.\.2"),
        ({"modules_to_save": ["poolr"]}, {}, "modules_to_save: .* got 'poolr'"),
        ({"num_virtual_tokens": 40, "position_offset": "prefix"}, {}, "no position remains"),
        ({}, {"hidden_size": 20}, "expected a head_dim that is a multiple of 8 up to 256, got 10"),
        ({}, {"is_decoder": True}, "expected an encoder with config.is_decoder False, got True"),
        (
            {},
            {"position_embedding_type": "relative_key"},
            "config.position_embedding_type 'absolute', got 'relative_key'",
        ),
    ],
)
def test_what_cannot_be_attached_is_refused_and_left_alone(fields, overrides, message):
    model = tiny_model(**overrides)
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        ptv2_fast.attach(model, PTuningV2Config(**fields))
    assert state_of(model) == before


def test_an_unsupported_model_names_the_supported_ones():
    with pytest.raises(ValueError, match=r"one of albert, bert, .*; got 'rembert'"):
        ptv2_fast.attach(tiny_model("rembert"), PTuningV2Config())
    with pytest.raises(ValueError, match="expected a transformers PreTrainedModel"):
        ptv2_fast.attach(torch.nn.Linear(2, 2), PTuningV2Config())
    for name in ("max_position_embeddings", "pad_token_id"):
        config = transformers.PreTrainedConfig()
        vars(config).update({"max_position_embeddings": 8, "pad_token_id": 1, name: None})
        with pytest.raises(ValueError, match=f"an integer config.{name}, got None"):
            FAMILIES["roberta"].max_positions(config)


class OwnModel(transformers.PreTrainedModel):
    """Stands for the code of a checkpoint, that has the parts of a BERT."""

    config_class = transformers.BertConfig


class RemoteModel(transformers.BertModel):
    __module__ = "transformers_modules.someone.modeling"


@pytest.mark.parametrize("kind", [OwnModel, RemoteModel])
def test_a_backbone_that_is_not_of_transformers_says_so(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, RemoteModel.__module__, sys.modules[__name__])
    message = f"of transformers' own code, got {kind.__name__} of {kind.__module__}"
    with pytest.raises(ValueError, match=message):
        ptv2_fast.attach(kind(tiny_config()), PTuningV2Config())


def call_twice(model) -> None:
    attention = model.bert.encoder.layer[1].attention
    forward = type(attention.self).forward.__get__(attention.self)
    attention.self.forward = lambda *args, **kwargs: (
        forward(*args, **kwargs) and forward(*args, **kwargs)
    )


def call_another(model) -> None:
    for module in (model, model.bert):
        module.set_attn_implementation = lambda name: None


def demand_a_cap(model) -> None:
    layer = model.bert.encoder.layer[0]
    layer.forward = functools.partial(type(layer).forward, layer, softcap=30.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (call_twice, "expected one call of 'ptv2_prefix' by every layer of BertModel, got 2 by"),
        (call_another, r"layers \[0, 1, 2\] of BertModel did not call the attention function"),
        (demand_a_cap, "softcap: expected None in the attention of layer 0, got a float"),
    ],
)
@pytest.mark.filterwarnings("ignore:the backbone runs without frozen blocks")
def test_attention_that_misses_the_operator_is_refused_and_left_alone(change, message):
    model = tiny_model()
    change(model)
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        ptv2_fast.attach(model, PTuningV2Config(backbone_dtype="bf16"))
    assert state_of(model) == before
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_an_attention_of_its_own_code_is_refused(monkeypatch):
    """A model of transformers that calls no attention function, whatever its row says."""
    monkeypatch.setitem(FAMILIES, "rembert", Family())
    with pytest.raises(ValueError, match=r"layers \[0, 1, 2\] of RemBertModel did not call"):
        ptv2_fast.attach(tiny_model("rembert"), PTuningV2Config(backbone="hook"))


def test_the_proof_at_attach_leaves_no_trace():
    model, calls = tiny_model(hidden_dropout_prob=0.5).train(), []
    model.bert.encoder.layer[1].eval()
    for module in (model.bert, model.bert.encoder.layer[0].attention.self):
        module.register_forward_hook(lambda *unused: calls.append(1))
        module.register_forward_pre_hook(lambda *unused: calls.append(1))
    modes = [module.training for module in model.modules()]
    buffers = copy.deepcopy(dict(model.named_buffers()))
    config = PTuningV2Config(backbone="hook")
    torch.manual_seed(0)
    PrefixEncoder(config, num_layers=3, num_heads=2, head_dim=8)
    drawn = torch.get_rng_state()
    torch.manual_seed(0)
    ptv2_fast.attach(model, config)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [m.training for n, m in model.named_modules() if "prefix" not in n] == modes
    assert all(torch.equal(buffers[name], value) for name, value in model.named_buffers())
    assert calls == []
    model(**make_batch())
    assert len(calls) == 4
    with torch.device("meta"):
        ptv2_fast.attach(tiny_model(), PTuningV2Config())


def test_one_remaining_position_is_enough():
    fields = {"num_virtual_tokens": MAX_POSITIONS - 1, "position_offset": "prefix"}
    attached(**fields)(torch.ones(1, 1, dtype=torch.long))


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


class WordsOnly(torch.nn.Module):
    """Embeddings without positions."""

    def __init__(self, words: torch.nn.Embedding) -> None:
        super().__init__()
        self.word_embeddings = words

    def forward(
        self, input_ids, token_type_ids=None, position_ids=None, inputs_embeds=None, **unused
    ):
        return self.word_embeddings(input_ids)


def test_embeddings_that_shift_no_positions_are_refused_with_an_offset():
    model = tiny_model()
    model.bert.embeddings = WordsOnly(model.bert.embeddings.word_embeddings)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"position_offset: expected 'none'.* WordsOnly"):
        ptv2_fast.attach(model, PTuningV2Config(position_offset="prefix"))
    assert state_of(model) == before
    attached(model=model)


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
    names = load_file(tmp_path / "ptv2_adapter.safetensors").keys()
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
    states = model.bert.forward(**batch).last_hidden_state
    assert torch.equal(twin.bert.forward(**batch).last_hidden_state, states)
    twin(**batch).logits.sum().backward()
    assert model.prefix_encoder.embedding.weight.grad is None
    with torch.no_grad():
        twin.prefix_encoder.embedding.weight.add_(1)
    assert not torch.equal(twin.bert.forward(**batch).last_hidden_state, states)
    twin.save_pretrained(tmp_path)
    plain = ptv2_fast.detach(duplicate(model))
    ptv2_fast.load_adapter(plain, tmp_path)
    assert torch.equal(plain(**batch).logits, twin(**batch).logits)
    ptv2_fast.detach(twin)
    assert torch.equal(model(**batch).logits, logits)


def rounded(forward):
    """Someone's wrapper around a forward."""

    def wrapper(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state.half().float()
        return output

    return wrapper


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_wrapped_forward_has_the_prefix_while_it_is_attached(when):
    model, batch = tiny_model(head="bare"), make_batch()
    without = model(**batch).last_hidden_state.half().float()
    if when == "before":
        model.forward = wrapper = rounded(model.forward)
    attached(model=model)
    if when == "after":
        expected = model(**batch).last_hidden_state.half().float()
        model.forward = wrapper = rounded(model.forward)
    else:
        expected = model.forward(**batch).last_hidden_state
    for _ in range(2):
        assert torch.equal(model(**batch).last_hidden_state, expected)
        assert not torch.equal(expected, without)
        ptv2_fast.detach(model)
        assert vars(model)["forward"] is wrapper
        assert torch.equal(model(**batch).last_hidden_state, without)
        attached(model=model)
        expected = model(**batch).last_hidden_state
    ptv2_fast.detach(model)
    del model.forward
    attached(model=model)
    assert not torch.equal(model(**batch).last_hidden_state.half().float(), without)
    ptv2_fast.detach(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("head", ["bare", "sequence"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_mixed_precision_of_accelerate_wraps_and_unwraps(head, when, own_accelerator_state):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, batch = tiny_model(head=head), make_batch()
    if when == "before":
        accelerator.prepare_model(model)
    attached(model=model, backbone="frozen")
    with torch.autocast("cpu", torch.bfloat16):
        expected = outputs_of(head, model(**batch)).float()
    if when == "after":
        signature = inspect.signature(model.forward)
        accelerator.prepare_model(model)
        assert inspect.signature(model.forward) == signature
    for call in (model, model.forward):
        torch.testing.assert_close(outputs_of(head, call(**batch)), expected)
    if head != "bare":  # the shortcut is as legal as it is without
        assert reads_first_token_only(model, model.bert, model.bert.encoder)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.prefix_encoder.embedding.weight.add_(1)
    assert not torch.equal(outputs_of(head, twin(**batch)), expected)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    ptv2_fast.detach(model)
    accelerator.free_memory()


def test_another_wrapper_ends_the_shortcut():
    model = attached(backbone="frozen")
    model.forward = functools.wraps(model.forward)(lambda *args, **kwargs: None)
    assert not reads_first_token_only(model, model.bert, model.bert.encoder)
    del model.forward
    assert reads_first_token_only(model, model.bert, model.bert.encoder)
    model.bert.forward = rounded(model.bert.forward)
    assert not reads_first_token_only(model, model.bert, model.bert.encoder)


@pytest.mark.parametrize("model_type", ["eurobert", "modernbert"])
def test_heads_that_read_all_tokens_end_the_shortcut(model_type):
    if model_type in MODEL_TYPES:
        model = tiny_model(model_type, classifier_pooling="mean")
        assert not reads_first_token_only(model, model.base_model, model.base_model)


def test_who_watches_the_norm_behind_the_layers_gets_all_rows():
    model = tiny_model("roberta-prelayernorm")
    backbone = model.base_model
    parts = model, backbone, backbone.encoder, backbone.LayerNorm
    assert reads_first_token_only(*parts)
    backbone.LayerNorm.register_forward_hook(lambda *unused: None)
    assert not reads_first_token_only(*parts)


@pytest.mark.parametrize(("model_type", "head"), MODELS)
def test_the_shortcut_is_taken_where_other_rows_are_not_read(model_type, head):
    options = {"classifier_pooling": "bos"} if model_type == "eurobert" else {}
    model, batch = tiny_model(model_type, head, **options), make_batch(head)
    family = FAMILIES[model_type]
    encoder = model.base_model.get_submodule(family.encoder)
    reads_first = head == "sequence" or (head == "choice" and model_type != "modernbert")
    reads_first &= "frozen" in BACKBONES[model_type] and not family.is_decoder
    reads_first &= not model_type.startswith("deberta")  # its last block computes all rows
    assert reads_first_token_only(model, model.base_model, encoder) == reads_first
    expected = outputs_of(head, model(**batch))

    def replace_others(module, args, output):
        output.last_hidden_state = torch.cat((output[0][:, :1], output[0][:, 1:] + 1), dim=1)
        return output

    encoder.register_forward_hook(replace_others)
    if reads_first:
        assert torch.equal(outputs_of(head, model(**batch)), expected)
