"""DeBERTa v1, v2 and v3: every form of their attention, and tables that are computed once."""

import copy
import itertools
import pickle

import pytest
import torch

import ptv2_fast
from ptv2_fast import PTuningV2Config
from ptv2_fast.encoders import disentangled, max_input_tokens
from ptv2_fast.encoders.attachment import find_attachment
from ptv2_fast.frozen.memory import kept_bytes_per_token
from ptv2_fast.frozen.spec import POLICIES, Surroundings
from ptv2_fast.training.measure import kept_bytes
from tests.concatenation import concatenating_attention
from tests.models import (
    BACKBONES,
    MAX_POSITIONS,
    WITHOUT_FALLBACK,
    attached,
    make_batch,
    one_thread,  # noqa: F401
    step_results,
    tiny_model,
)
from tests.test_model_classes import with_uneven_weights

TERMS = ("c2p|p2c", "c2p", "p2c", None)
SPANS = (4, 12)  # shorter and longer than a text of 11 tokens
V1 = [
    ("deberta", {"pos_att_type": terms, "max_relative_positions": span})
    for terms, span in itertools.product(TERMS, SPANS)
]
V2 = [
    (
        "deberta-v2",
        {
            "pos_att_type": terms,
            "share_att_key": is_shared,
            "position_buckets": buckets,
            "max_relative_positions": span,
            "conv_kernel_size": kernel,
            "norm_rel_ebd": norm,
        },
    )
    for terms, is_shared, (buckets, span), (kernel, norm) in itertools.product(
        TERMS,
        (False, True),
        ((-1, 4), (4, 9), (8, 64)),
        ((0, "none"), (3, "layer_norm")),
    )
]
OTHERS = [
    ("deberta", {"relative_attention": False}),
    ("deberta", {"position_biased_input": False, "type_vocab_size": 2}),
    ("deberta-v2", {"relative_attention": False}),
    ("deberta-v2", {"position_biased_input": False, "conv_kernel_size": 5, "conv_act": "gelu"}),
    ("deberta-v2", {"max_relative_positions": -1, "position_buckets": -1}),
]


def logits_and_gradient(model, batch, leaf) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(**batch).logits * batch["attention_mask"][..., None]
    grad_out = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    return logits.detach(), torch.autograd.grad(logits, leaf, grad_out)[0]


@pytest.mark.parametrize("cases", [V1 + OTHERS, V2[:24], V2[24:]], ids=["v1", "v2", "v2 more"])
def test_every_form_equals_an_eager_rendering(cases):
    """Within the bounds for float32: 2e-5 of the largest logit, 2e-4 of the largest gradient."""
    for model_type, changes in cases:
        torch.manual_seed(0)
        plain = tiny_model(model_type, "token", num_hidden_layers=2, **changes)
        plain, batch = with_uneven_weights(plain), make_batch("token")
        expected = None
        for backbone in BACKBONES[model_type]:
            torch.manual_seed(1)
            fields = {"backbone": backbone, "strict": backbone == "frozen"}
            model = attached("token", model=copy.deepcopy(plain), **fields)
            if expected is None:
                prefix = model.prefix_encoder().detach().requires_grad_()
                with concatenating_attention(plain, dict(enumerate(prefix))):
                    logits, gradient = logits_and_gradient(plain, batch, prefix)
                expected = logits, gradient.permute(3, 0, 1, 2, 4).flatten(start_dim=1)
                assert expected[1].abs().min() > 0
            actual = logits_and_gradient(model, batch, model.prefix_encoder.embedding.weight)
            for tensor, wanted, bound in zip(actual, expected, (2e-5, 2e-4), strict=True):
                error = (tensor - wanted).abs().max() / wanted.abs().max()
                assert error <= bound, (model_type, changes, backbone, error)


@pytest.fixture
def tables(monkeypatch) -> list[int]:
    """The rows of every set of tables that is computed."""
    made, compute = [], disentangled._tables

    def counted(attention, projections, embeddings, dtype):
        made.append(len(embeddings))
        return compute(attention, projections, embeddings, dtype)

    monkeypatch.setattr(disentangled, "_tables", counted)
    return made


@pytest.mark.parametrize("backbone", BACKBONES["deberta-v2"])
@pytest.mark.parametrize("model_type", ["deberta", "deberta-v2"])
def test_tables_are_computed_once_until_a_weight_changes(model_type, backbone, tables):
    model = attached("token", model_type, backbone=backbone)
    batch, encoder = make_batch("token"), model.deberta.encoder
    with torch.inference_mode():
        model(**batch)  # frozen blocks move the weights of a layer into one matrix
        first = model(**batch).logits
    tables.clear()
    assert torch.equal(step_results(model, batch, "token")[0], first * batch_mask(batch))
    assert tables == []
    with torch.no_grad():
        encoder.rel_embeddings.weight.mul_(2)
    second = model(**batch).logits
    assert len(tables) == 3 and not torch.equal(first, second)
    name = "pos_q_proj" if model_type == "deberta" else "key_proj"
    linear = encoder.layer[1].attention.self.get_submodule(name)
    linear.weight.data = linear.weight.data * 2
    assert not torch.equal(model(**batch).logits, second) and len(tables) == 4
    model.double()
    assert model(**batch).logits.dtype == torch.float64 and len(tables) == 7
    twin = pickle.loads(pickle.dumps(model))
    assert find_attachment(twin).relative._tables == {}
    assert torch.equal(twin(**batch).logits, model(**batch).logits)


def batch_mask(batch) -> torch.Tensor:
    return batch["attention_mask"][..., None]


@pytest.mark.parametrize("backbone", BACKBONES["deberta-v2"])
def test_dropout_of_positions_makes_tables_of_the_distances_in_a_text(backbone, tables):
    model = attached("token", "deberta", backbone=backbone, model=tiny_model(
        "deberta", "token", hidden_dropout_prob=0.4, max_relative_positions=12))  # fmt: skip
    model.train()
    tables.clear()
    batch = make_batch("token", lengths=(8, 3), width=8)
    one, same, other = (step_results(model, batch, "token", seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert tables == [15] * 9


def test_positions_that_would_train_are_refused():
    model = attached("token", "deberta-v2", modules_to_save=["rel_embeddings"]).train()
    with pytest.raises(ValueError, match="rel_embeddings: expected relative positions without a"):
        model(**make_batch("token"))


def test_a_last_layer_that_runs_several_times_is_refused():
    model = tiny_model("deberta-v2", "token")
    model.base_model.z_steps = 2
    with pytest.raises(ValueError, match="model: expected z_steps at most 1, got 2"):
        ptv2_fast.attach(model, PTuningV2Config())


@pytest.mark.parametrize("model_type", ["deberta", "deberta-v2"])
def test_without_a_table_of_positions_texts_have_no_end_and_no_offset(model_type):
    plain = tiny_model(model_type, "token", position_biased_input=False)
    with pytest.raises(ValueError, match="position_offset: expected 'none' for embeddings without"):
        attached("token", model=copy.deepcopy(plain), position_offset="prefix")
    model = attached("token", model=plain)
    assert max_input_tokens(model) == MAX_POSITIONS
    model(**make_batch("token", lengths=(MAX_POSITIONS + 9, 3), width=MAX_POSITIONS + 9))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model_type", ["deberta", "deberta-v2"])
def test_policies_give_equal_bits_and_keep_the_sum_of_the_spec(model_type, policy):
    """With dropout; tables of positions are those of the model, and no token has a part in them."""
    plain = tiny_model(model_type, "token", conv_kernel_size=0, attention_probs_dropout_prob=0.3)
    made = {}
    for name in ("none", policy):
        torch.manual_seed(1)
        twin = copy.deepcopy(plain)
        made[name] = attached("token", model=twin, recompute=name, **WITHOUT_FALLBACK).train()
    batch = make_batch("token")
    results = [step_results(model, batch, "token") for model in made.values()]
    for one, other in zip(results[0], results[-1], strict=True):
        assert torch.equal(one, other)
    model, around = made[policy], Surroundings()
    attachment = find_attachment(model)
    shape = attachment.frozen._forwards[0].block.modules.shape(torch.float32)
    blocks = (around.of_lowest(), around, around)
    expected = sum(kept_bytes_per_token(policy, shape, each) for each in blocks)

    def kept(lengths: tuple[int, ...]) -> int:
        batch = make_batch("bare", lengths=lengths, width=39)
        return kept_bytes(lambda: model.base_model(**batch).last_hidden_state.sum(), model)

    # Beside blocks: the coordinates and the places of rows.
    assert kept((38, 20, 6)) - kept((22, 20, 6)) == 16 * (expected + 16)
