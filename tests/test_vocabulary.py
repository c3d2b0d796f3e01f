"""The vocabulary of an adapter: tokens that were added come along, another size is refused."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

import ptv2_fast
from ptv2_fast import PTuningV2Config
from tests.adapter_files import (
    FILES,
    HUGE,
    assert_refused,
    attached,
    edit_config,
    edit_tensors,
    plain_twin,
)
from tests.models import one_thread, tiny_config, tiny_model  # noqa: F401

ADDED = {"input_ids": torch.tensor([[5, 60, 7, 63]])}  # two of the tokens 60..63


def grown(directory, size: int = 64, kind=AutoModelForSequenceClassification):
    """A model whose vocabulary was resized after loading a base model of 60 tokens."""
    if not directory.exists():
        kind.from_config(tiny_config()).save_pretrained(directory)
    model = kind.from_pretrained(directory).eval()
    if size != 60:
        model.resize_token_embeddings(size)
    return model


def attach_random(model, **fields):
    ptv2_fast.attach(model, PTuningV2Config(num_virtual_tokens=5, **fields))
    torch.nn.init.normal_(model.prefix_encoder.embedding.weight)
    return model


@pytest.mark.parametrize("size", [60, 64])
@pytest.mark.parametrize("save", [ptv2_fast.save_adapter, lambda m, d: m.save_pretrained(d)])
@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForMaskedLM])
def test_added_tokens_come_along(size, save, kind, tmp_path):
    model = attach_random(grown(tmp_path / "base", kind=kind))
    save(model, tmp_path / "a")
    twin = grown(tmp_path / "base", size, kind)
    ptv2_fast.load_adapter(twin, tmp_path / "a", is_trainable=True)
    assert twin.config.vocab_size == 64
    assert torch.equal(twin(**ADDED).logits, model(**ADDED).logits)
    save(twin, tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()
    weights = next((tmp_path / "a").glob("*.safetensors"))
    assert load_file(weights)["added_token_embeddings"].shape == (4, 16)


def test_tokens_added_after_attach_come_along_without_a_base_model(tmp_path):
    model = attach_random(tiny_model())
    twin = plain_twin(model)
    model.resize_token_embeddings(64)
    ptv2_fast.save_adapter(model, tmp_path)
    ptv2_fast.load_adapter(twin, tmp_path)
    assert torch.equal(twin(**ADDED).logits, model(**ADDED).logits)
    twin = attach_random(tiny_model())
    ptv2_fast.load_adapter(twin, tmp_path)
    assert twin.get_input_embeddings().weight.shape[0] == 64
    assert not twin.get_input_embeddings().weight.requires_grad


def test_a_state_dict_brings_added_tokens(tmp_path):
    model = attach_random(grown(tmp_path / "base"))
    model.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    twin = attach_random(grown(tmp_path / "base"))
    assert not torch.equal(twin(**ADDED).logits, model(**ADDED).logits)
    assert not twin.load_state_dict(tensors, strict=False).unexpected_keys
    assert torch.equal(twin(**ADDED).logits, model(**ADDED).logits)
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(64\) first"):
        attach_random(grown(tmp_path / "base", 60)).load_state_dict(tensors, strict=False)


def test_whole_embeddings_that_are_saved_hold_the_added_tokens(tmp_path):
    model = attach_random(grown(tmp_path / "base"), modules_to_save=["word_embeddings"])
    ptv2_fast.save_adapter(model, tmp_path / "a")
    assert "added_token_embeddings" not in load_file(tmp_path / "a" / FILES[1])
    twin = ptv2_fast.load_adapter(grown(tmp_path / "base"), tmp_path / "a")
    assert torch.equal(twin(**ADDED).logits, model(**ADDED).logits)


@pytest.mark.parametrize(("ours", "others"), [(64, 60), (60, 64), (64, 62)])
def test_another_vocabulary_is_refused(ours, others, tmp_path):
    ptv2_fast.save_adapter(attached("bert", "token", {"vocab_size": ours}), tmp_path)
    message = rf"{ours} tokens .* got {others}; call model.resize_token_embeddings\({ours}\)"
    assert_refused(tiny_model(head="token", vocab_size=others), tmp_path, message)
    with pytest.raises(ValueError, match=message):
        ptv2_fast.load_adapter(attached("bert", "token", {"vocab_size": others}), tmp_path)
    edit_config(tmp_path, "vocab_size")  # as older versions wrote it
    ptv2_fast.load_adapter(tiny_model(head="token", vocab_size=others), tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: edit_config(d, vocab_size=HUGE), "expected added_token_embeddings for the"),
        (lambda d: edit_config(d, base_vocab_size="60"), "expected added_token_embeddings for the"),
        (lambda d: edit_config(d, "vocab_size"), "expected added_token_embeddings for the"),
        (lambda d: edit_tensors(d, added_token_embeddings=torch.ones(4)), r"got \[4\] for 60 and"),
        (lambda d: edit_tensors(d, added_token_embeddings=torch.ones(4, 9)), r"\[4, 9\]"),
        (lambda d: edit_tensors(d, added_token_embeddings=None), "64 tokens .* got 60"),
        (
            lambda d: edit_tensors(d, added_token_embeddings=torch.full((4, 16), math.nan)),
            "finite numbers in added_token_embeddings",
        ),
        (lambda d: edit_tensors(d, surplus=torch.ones(1)), r"unexpected \['surplus'\]"),
    ],
)
def test_added_tokens_that_are_wrong_change_nothing(damage, message, tmp_path):
    ptv2_fast.save_adapter(attach_random(grown(tmp_path / "base")), tmp_path / "a")
    damage(tmp_path / "a")
    twin = grown(tmp_path / "base", 60)
    before = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    assert_refused(twin, tmp_path / "a", message)
    assert twin.config.vocab_size == 60
    assert all(torch.equal(before[name], tensor) for name, tensor in twin.state_dict().items())
    assert all(parameter.requires_grad for parameter in twin.parameters())
