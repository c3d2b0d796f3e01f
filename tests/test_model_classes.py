"""Every model class that can carry a prefix, against prefixes that are concatenated row by row.

What one test compares: logits of real tokens and gradients of the prefix, for both kinds of
layers, in eval and training mode, with gradient checkpointing; and the adapter of that model.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import ptv2_fast
from ptv2_fast.encoders.checkpointing import checkpoint_activations
from ptv2_fast.training.auto_classes import auto_class_of
from tests.concatenation import concatenating_attention
from tests.models import (
    BACKBONES,
    HEADS,
    MODELS,
    assert_close_to_plain,
    attached,
    make_batch,
    one_thread,  # noqa: F401
    outputs_of,
    plain_results,
    real_tokens,
    tiny_model,
)

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.mark.parametrize(("model_type", "head"), MODELS)
def test_a_prefix_equals_its_concatenation_in_every_row(model_type, head, tmp_path):
    plain = with_uneven_weights(tiny_model(model_type, head, **SIZES))
    assert auto_class_of(type(plain).__name__) == HEADS[head].__name__
    batch, models = make_batch(head), {}
    for backbone in BACKBONES[model_type]:
        torch.manual_seed(1)  # the same prefix for all
        fields = {"backbone": backbone, "strict": backbone == "frozen"}
        models[backbone] = attached(head, model=copy.deepcopy(plain), **fields)
    model = models[BACKBONES[model_type][0]]
    grad_out = torch.randn(results(head, model, batch).shape)
    expected = concatenated(head, plain, model, batch, grad_out)
    assert expected[1][0].abs().min() > 0  # every entry of every layer's prefix is tested
    with torch.no_grad(), ptv2_fast.disabled(model):
        effect = expected[0][0] - results(head, model, batch)
    assert effect.abs().max() > 0.01 * expected[0][0].abs().max()

    check_adapter(head, plain, model, batch, tmp_path)
    for backbone, model in models.items():
        for mode in modes_of(model):
            name = f"{backbone}, {mode}, result"
            output = results(head, model, batch)
            table = model.prefix_encoder.embedding.weight
            gradient = torch.autograd.grad(output, table, grad_out)[0]
            assert_close_to_plain((output, gradient), expected, name)
            with torch.no_grad():
                assert_close_to_plain((results(head, model, batch),), expected[:1], name)


def with_uneven_weights(model):
    """Weights that give attention and every norm and bias a say, whatever the family draws."""
    # Norms of MobileBERT only scale and shift: its states would grow until attention saturates.
    gain = 0.7 if model.config.model_type == "mobilebert" else 2
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape)
            if weight.dim() > 1:
                weight.copy_(noise * gain * weight.shape[-1] ** -0.5)
            else:
                weight.add_(0.2 * noise)
    return model


def results(head: str, model, batch: dict[str, Tensor]) -> Tensor:
    return outputs_of(head, model(**batch)) * real_tokens(head, batch)


def concatenated(head: str, plain, model, batch: dict[str, Tensor], grad_out: Tensor):
    """The `plain_results` of a plain model with the prefix of an attached one."""

    def run(plain, prefix: Tensor) -> tuple[Tensor, Tensor]:
        prefix.requires_grad_()
        with concatenating_attention(plain, dict(enumerate(prefix))):
            output = results(head, plain, batch)
        gradient = torch.autograd.grad(output, prefix, grad_out.to(output))[0]
        return output.detach(), gradient.permute(3, 0, 1, 2, 4).flatten(start_dim=1)

    return plain_results(run, plain, model.prefix_encoder().detach())


def check_adapter(head: str, plain, model, batch: dict[str, Tensor], folder) -> None:
    """A model whose trained parts were others is the saved one, bit by bit."""
    ptv2_fast.save_adapter(model, folder)
    twin = copy.deepcopy(plain)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.mul_(1 if name in model._keys_to_ignore_on_save else 2)
    ptv2_fast.load_adapter(twin, folder)
    state = twin.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    with torch.no_grad():
        assert torch.equal(results(head, twin, batch), results(head, model, batch))


def modes_of(model) -> Iterator[str]:
    """Puts the model into one mode after the other, without dropout in any."""
    yield "eval"
    model.train()
    yield "train"
    if model.supports_gradient_checkpointing:
        checkpoint_activations(model)
        assert model.is_gradient_checkpointing
        yield "checkpointing"
