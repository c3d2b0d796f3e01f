"""Causal masks, windows and rotated positions, with a prefix in front of them."""

import contextlib
import copy

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import ptv2_fast
from bench.models import cache_argument
from ptv2_fast import PTuningV2Config
from ptv2_fast.encoders import max_input_tokens
from ptv2_fast.encoders.families import FAMILIES
from tests.concatenation import attend, concatenating_attention
from tests.models import (
    MAX_POSITIONS,
    MODEL_TYPES,
    TEXT_ENCODERS,
    P,
    assert_close_to_model,
    attached,
    make_batch,
    one_thread,  # noqa: F401
    outputs_of,
    real_tokens,
    tiny_config,
    tiny_model,
    unshifted_positions,
)


def served(cases: list) -> list:
    """Those cases whose model type, which they begin with or are, the installed versions serve."""
    return [case for case in cases if (case if isinstance(case, str) else case[0]) in MODEL_TYPES]


ABSOLUTE = {"position_embedding_type": "absolute", "emb_layer_norm_before": False}
# Other configurations than those that tests/models.py makes: model type, changes, fields of attach.
VARIANTS = [
    ("esm", ABSOLUTE, {}),
    ("gemma3_text", {"use_bidirectional_attention": False}, {}),
    ("gemma3_text", {"sliding_window": 30}, {"layers": [1, 2]}),
    ("llama", {"num_key_value_heads": 2}, {}),
    ("mistral", {"sliding_window": 1}, {"layers": [0, 2]}),
    ("mistral", {"sliding_window": None}, {}),
    ("modernbert", {"local_attention": 0}, {}),
    ("modernbert", {"classifier_pooling": "mean", "attention_bias": True, "norm_bias": True}, {}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}, {}),
]


def left_padded(head: str = "sequence") -> dict[str, Tensor]:
    return {name: tensor.flip(1) for name, tensor in make_batch(head).items()}


def unpadded(head: str = "sequence") -> dict[str, Tensor]:
    return {"input_ids": make_batch(head, lengths=(11, 11, 11))["input_ids"]}


def with_hole(head: str = "sequence") -> dict[str, Tensor]:
    """Tokens that are not attended stand between others."""
    batch = make_batch(head)
    batch["attention_mask"][:2, 3:5] = 0
    return batch


def check(plain, model, batch: dict[str, Tensor], head: str = "sequence") -> None:
    """Outputs of real tokens and prefix gradients against prefixes concatenated row by row."""
    real = real_tokens(head, batch) if "attention_mask" in batch else 1
    grad_out = torch.randn(outputs_of(head, model(**batch)).shape)

    def results(model, prefix: Tensor) -> tuple[Tensor, Tensor]:
        output = outputs_of(head, model(**batch)) * real
        return output.detach(), torch.autograd.grad(output, prefix, grad_out.to(output))[0]

    def concatenated(plain, prefix: Tensor) -> tuple[Tensor, Tensor]:
        layers = dict(zip(model.prefix_encoder.layers, prefix.requires_grad_(), strict=True))
        with concatenating_attention(plain, layers):
            output, gradient = results(plain, prefix)
        return output, gradient.permute(3, 0, 1, 2, 4).flatten(start_dim=1)

    actual = results(model, model.prefix_encoder.embedding.weight)
    assert actual[1].abs().min() > 0
    assert_close_to_model(actual, concatenated, plain, model.prefix_encoder().detach())


@pytest.mark.parametrize(("model_type", "changes", "fields"), served(VARIANTS))
def test_a_configuration_equals_concatenation(model_type, changes, fields):
    plain = tiny_model(model_type, **changes)
    model = attached(model=copy.deepcopy(plain), backbone="hook", **fields)
    check(plain, model, make_batch())


@pytest.mark.parametrize("make", [left_padded, unpadded])
@pytest.mark.parametrize(
    "model_type", served(["gemma3_text", "llama", "mistral", "modernbert", "esm"])
)
def test_left_padding_and_no_mask_equal_concatenation(model_type, make):
    head = "bare"
    plain = tiny_model(model_type, head)
    check(plain, attached(head, model=copy.deepcopy(plain), backbone="hook"), make(head), head)


@pytest.mark.filterwarnings("ignore:the backbone runs without frozen blocks")
@pytest.mark.parametrize(
    "model_type",
    served(["bert", "deberta-v2", "mistral", "modernbert", "mpnet", "t5"]),
)
def test_masks_with_holes_equal_concatenation(model_type):
    """Windows, biases and scores by distance count the columns, hidden ones as well."""
    plain = tiny_model(model_type, "bare")
    check(plain, attached("bare", model=copy.deepcopy(plain)), with_hole("bare"), "bare")


def test_a_position_table_of_esm_is_shifted():
    plain, batch = tiny_model("esm", "token", **ABSOLUTE), make_batch()
    model = attached("token", model=copy.deepcopy(plain), position_offset="prefix")
    positions = unshifted_positions(plain, batch["input_ids"])

    def shifted(plain, prefix: Tensor) -> tuple[Tensor]:
        with concatenating_attention(plain, dict(enumerate(prefix))):
            logits = plain(**batch, position_ids=positions + P).logits
        return (logits * batch["attention_mask"][..., None],)

    logits = model(**batch).logits * batch["attention_mask"][..., None]
    assert_close_to_model((logits.detach(),), shifted, plain, model.prefix_encoder().detach())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_only_positions_of_a_table_can_be_shifted(model_type):
    model, family = tiny_model(model_type, "bare"), FAMILIES[model_type]
    config = PTuningV2Config(position_offset="prefix", backbone="hook")
    if family.has_position_table(model.config) and not family.keeps_positions:
        ptv2_fast.attach(model, config)
        return
    name = type(model).__name__
    with pytest.raises(ValueError, match=f"position_offset: expected 'none'.*{name}"):
        ptv2_fast.attach(model, config)


def test_rotated_positions_have_no_last_one():
    """Texts longer than those that a model was made for run, as they do without a prefix."""
    model = attached(model_type="llama")
    assert max_input_tokens(model) == MAX_POSITIONS
    model(**make_batch(lengths=(MAX_POSITIONS + 2,), width=MAX_POSITIONS + 2))


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 20,
}
BY_LAYER = {
    "full_attention": DYNAMIC,
    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
}
UNSERVED = [
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping None, got 50.0"),
    ("deberta", {"talking_head": True}, "talking_head False, got True"),
    ("deberta", {"pos_att_type": "c2p|p2p"}, "pos_att_type of c2p and p2c, got 'p2p'"),
    ("deberta-v2", {"pos_att_type": "p2p"}, "pos_att_type of c2p and p2c, got 'p2p'"),
    ("esm", {"is_decoder": True}, "is_decoder False, got True"),
    ("esm", {"position_embedding_type": "relative_key"}, "'absolute', got 'relative_key'"),
    ("llama", {"rope_parameters": DYNAMIC}, "rope_parameters .* 'dynamic'"),
    ("nomic_bert", {"rope_parameters": LONG}, "rope_parameters .* 'longrope'"),
    ("modernbert", {"rope_parameters": BY_LAYER}, "rope_parameters .* 'dynamic'"),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), served(UNSERVED))
def test_an_option_that_is_not_served_is_named(model_type, changes, message):
    with pytest.raises(ValueError, match=rf"^model: expected .*config\..*{message}"):
        ptv2_fast.attach(tiny_model(model_type, **changes), PTuningV2Config())


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 20},
    ],
)
def test_rotations_that_are_the_same_for_every_batch_are_served(scaling):
    plain = tiny_model("llama", rope_parameters={"rope_theta": 1e4, **scaling})
    check(plain, attached(model=copy.deepcopy(plain)), make_batch())


def test_keys_of_other_heads_than_the_configuration_says_are_refused():
    model = tiny_model("llama")
    model.config.num_key_value_heads = 2
    with pytest.raises(ValueError, match=r"expected 2 heads of width 8 .* layer 0, .* got 1 of"):
        ptv2_fast.attach(model, PTuningV2Config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_causal": False}, "is_causal: expected True in layer 0, by its mask, got False"),
        ({"sliding_window": 3}, "sliding_window: expected 4 in layer 0, by its mask, got 3"),
    ],
)
def test_a_layer_and_a_mask_that_differ_are_refused(changes, message):
    model = tiny_model("qwen2", layer_types=["sliding_attention"] * 3)
    vars(model.model.layers[0].self_attn).update(changes)
    with pytest.raises(ValueError, match=message):
        ptv2_fast.attach(model, PTuningV2Config())


def packed(model) -> None:
    ids = make_batch(lengths=(11,))["input_ids"]
    model(input_ids=ids, position_ids=torch.tensor([[*range(6), *range(5)]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (packed, "attention_mask: expected a padding mask.* packed"),
        (lambda model: model(**make_batch(), use_cache=True), "use_cache: expected None or False"),
        (lambda model: model(**make_batch(), cache=object()), "cache: expected None"),
        (lambda model: model(**make_batch(), past_key_values=object()), "past_key_values: exp"),
        (
            lambda model: model(
                input_ids=make_batch()["input_ids"], attention_mask={"full_attention": None}
            ),
            r"attention_mask: expected a tensor \[B, T\], got a dict",
        ),
    ],
)
@pytest.mark.parametrize("model_type", ["gemma3_text", "mistral"])
def test_what_a_decoder_is_not_served_with_is_refused(model_type, call, message):
    model = attached("bare", model_type)
    with pytest.raises(ValueError, match=message):
        call(model)


def test_a_decoder_keeps_no_cache_and_does_not_generate():
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    ids = make_batch(lengths=(11,))["input_ids"]
    name = cache_argument(model.base_model)
    assert getattr(model(ids), name) is not None
    attached(model=model)
    assert getattr(model(ids), name) is None
    with pytest.raises(ValueError, match=f"{name}: expected None|use_cache: expected None"):
        model.generate(ids, max_new_tokens=2)
    ptv2_fast.detach(model)
    assert getattr(model(ids), name) is not None


@contextlib.contextmanager
def attention_function(model, function):
    """Within the context the layers of a plain model call this function."""
    AttentionInterface.register("test_masks", function)
    ALL_MASK_ATTENTION_FUNCTIONS.register("test_masks", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation("test_masks")
    yield
    model.set_attn_implementation("eager")


def recorded_keys(model, ids: Tensor, **inputs) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, [H_kv, T, D], that reach the attention of each layer for one text."""
    found = []

    def record(module, query, key, value, mask, scaling, **unused):
        found.append((key[0], value[0]))
        return attend(query, key, value, None, (mask,), scaling), None

    with attention_function(model, record):
        model(input_ids=ids[None], **inputs)
    return found


WITHOUT_TABLE = [n for n in MODEL_TYPES if not FAMILIES[n].has_position_table(tiny_config(n))]
ROTATED = [n for n in WITHOUT_TABLE if n not in TEXT_ENCODERS]  # those add a bias instead


@pytest.mark.parametrize("model_type", ROTATED)
def test_tokens_init_takes_keys_before_they_are_rotated(model_type):
    """At position 0 nothing is rotated; the positions do not change what the first layer gets."""
    plain, ids = tiny_model(model_type, "bare"), torch.randint(5, 60, (P,))
    config = PTuningV2Config(num_virtual_tokens=P, init="tokens", backbone="hook")
    prefixes = ptv2_fast.attach(copy.deepcopy(plain), config, ids).prefix_encoder.layer_prefixes()
    for layer, (key, value) in enumerate(recorded_keys(plain, ids)):
        torch.testing.assert_close(prefixes[layer][0][:, 0], key[:, 0])
        torch.testing.assert_close(prefixes[layer][1], value)
    if model_type == "esm":  # some versions of which take no other positions than the columns
        return
    at_zero = {
        "position_ids": torch.zeros(1, P, dtype=torch.long),
        "attention_mask": torch.ones(1, P, dtype=torch.long),
    }
    torch.testing.assert_close(prefixes[0][0], recorded_keys(plain, ids, **at_zero)[0][0])


@pytest.mark.parametrize("model_type", ROTATED)
def test_rotations_in_float32_run_under_autocast(model_type):
    model, batch = attached(model_type=model_type, backbone="hook").train(), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**batch).logits
    logits.float().square().sum().backward()
    gradient = model.prefix_encoder.embedding.weight.grad
    assert torch.isfinite(gradient).all() and gradient.abs().min() > 0


@pytest.mark.parametrize("model_type", served(["eurobert", "llama"]))
def test_embedded_input_and_trained_embeddings_run_in_another_dtype(model_type):
    """Rotations have the dtype of the input, which a bf16 backbone does not have here."""
    fields = {"backbone_dtype": "bf16", "backbone": "hook", "modules_to_save": ["embed_tokens"]}
    model, batch = attached("token", model_type, **fields).train(), make_batch()
    embeds = model.get_input_embeddings()(batch["input_ids"])
    loss = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits.sum()
    assert embeds.dtype == loss.dtype == torch.float32
    loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0


def test_the_contact_head_of_esm_is_left_alone():
    model = attached("token", "esm")
    saved = set(model.state_dict()) - model._keys_to_ignore_on_save
    head = {"classifier.weight", "classifier.bias"}
    assert saved == head | {"prefix_encoder.embedding.weight"}
    attention = model.esm.encoder.layer[1].attention.self
    assert attention.layer_idx == 1
    ptv2_fast.detach(model)
    assert attention.layer_idx is None


@pytest.mark.parametrize(
    ("model_type", "make"),
    [("gemma3_text", make_batch), ("mistral", unpadded)],
)
def test_structured_masks_compile_into_one_graph(model_type, make):
    plain, batch = tiny_model(model_type, "bare", num_hidden_layers=2, layer_types=None), make()
    model = attached(model=plain, backbone="hook").train()
    table = model.prefix_encoder.embedding.weight
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    outputs = [forward(**batch).last_hidden_state for forward in (model, compiled)]
    gradients = [torch.autograd.grad(output.square().sum(), table)[0] for output in outputs]
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0])
