"""Attention that asks transformers for no function, and positions that are a bias of attention."""

import copy
import pickle
import types

import pytest
import torch
import transformers

import ptv2_fast
from ptv2_fast import PTuningV2Config
from ptv2_fast.encoders import max_input_tokens
from ptv2_fast.encoders.attention_hook import PrefixState
from ptv2_fast.encoders.own_attention import call_within
from tests.models import (
    MAX_POSITIONS,
    TEXT_ENCODERS,
    P,
    attached,
    make_batch,
    one_thread,  # noqa: F401
    step_results,
    tiny_config,
    tiny_model,
)


def attention_of(model) -> torch.nn.Module:
    return model.mpnet.encoder.layer[1].attention.attn


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_its_own_attention_and_detach_gives_it_back(duplicate):
    plain, batch = tiny_model("mpnet"), make_batch()
    model = attached(model=copy.deepcopy(plain))
    expected, twin = step_results(model, batch), duplicate(model)
    with torch.no_grad():
        twin.prefix_encoder.embedding.weight.zero_()
        attention_of(twin).q.weight.zero_()
    for actual, wanted in zip(step_results(model, batch), expected, strict=True):
        assert torch.equal(actual, wanted)
    assert not torch.equal(step_results(twin, batch)[0], expected[0])
    ptv2_fast.detach(model)
    assert vars(attention_of(model)).keys() == vars(attention_of(plain)).keys()
    assert torch.equal(model(**batch).logits, plain(**batch).logits)


def test_attention_that_was_replaced_or_is_called_alone_is_refused():
    model = tiny_model("mpnet")
    attention = attention_of(model)
    attention.forward = types.MethodType(type(attention).forward, attention)
    with pytest.raises(ValueError, match="the MPNetSelfAttention of transformers in layer 1, got"):
        ptv2_fast.attach(model, PTuningV2Config())
    del attention.forward
    model = attached(model=model, backbone="hook")
    with pytest.raises(RuntimeError, match="call the model itself"):
        attention(torch.ones(1, 2, 16))
    with pytest.raises(ValueError, match="head_mask: expected None in the attention of layer 1"):
        state = PrefixState({}, 0.0, False, 3, (2, 8))
        call_within(state, attention, torch.ones(1, 2, 16), head_mask=torch.ones(2))


@pytest.mark.parametrize("model_type", TEXT_ENCODERS)
def test_an_encoder_with_a_decoder_is_refused(model_type):
    config = tiny_config(model_type)
    transformers.AutoModelForTextEncoding.from_config(config)  # changes T5's to an encoder's
    for kind in (
        "",
        "ForConditionalGeneration",
        "ForSequenceClassification",
        "ForQuestionAnswering",
    ):
        model = getattr(transformers, f"{type(config).__name__[:-6]}{kind or 'Model'}")(config)
        with pytest.raises(ValueError, match=r"expected an encoder, got a .*, which has a decoder"):
            ptv2_fast.attach(model, PTuningV2Config())


def test_relative_positions_have_no_offset_and_no_end():
    with pytest.raises(ValueError, match="position_offset: expected 'none' for embeddings without"):
        attached("token", "t5", position_offset="prefix")
    model = attached("token", "t5")
    assert max_input_tokens(model) == 512
    assert max_input_tokens(tiny_model("t5", "token", n_positions=64)) == 64
    model(input_ids=torch.randint(2, 60, (1, 600)))


def test_mpnet_counts_positions_from_two_whatever_its_pad_token():
    plain = tiny_model("mpnet", "token", pad_token_id=0)
    model = attached("token", model=plain, position_offset="prefix")
    assert max_input_tokens(model) == MAX_POSITIONS - 2 - P
    batch = make_batch("token", lengths=(MAX_POSITIONS - 2 - P,), width=MAX_POSITIONS - 2 - P)
    taken = torch.arange(2 + P, MAX_POSITIONS)[None]
    assert torch.equal(model(**batch).logits, model(**batch, position_ids=taken).logits)


@pytest.mark.parametrize("model_type", ["mpnet", "t5"])
def test_a_bias_that_would_train_is_refused(model_type):
    """The operator has no gradient for it, and would leave it as it is without a word."""
    table = {"mpnet": "relative_attention_bias", "t5": "layer.0.SelfAttention"}[model_type]
    model = attached("token", model_type, modules_to_save=[table]).train()
    with pytest.raises(ValueError, match="position_bias: expected one without a gradient"):
        model(**make_batch())
