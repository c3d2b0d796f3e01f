"""GLM (2021) against the published formulas, and its inputs."""

import copy

import pytest
import torch
from tokenizers import processors
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ptv2_fast.encoders.families import FAMILIES
from ptv2_fast.encoders.glm import (
    BlankTokens,
    GLMConfig,
    GLMForConditionalGeneration,
    blank_inputs,
    blank_tokens,
)
from ptv2_fast.frozen.spec import POLICIES
from tests.glm_formulas import (
    CLASSES,
    MASK,
    MASKS,
    PADDING,
    START,
    B,
    T,
    output_of,
    published_output,
    tiny,
)
from tests.models import (
    attached,
    one_thread,  # noqa: F401
    set_fields,
    step_results,
    tiny_config,
)
from tests.tiny_run import save_tiny_model


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"{error:.1e} of the largest"


@pytest.mark.parametrize("head", CLASSES)
def test_logits_and_prefix_gradients_are_those_of_the_published_formulas(head):
    plain, ids = tiny(head), torch.randint(2, 56, (B, T))
    default = torch.stack((torch.arange(T), torch.zeros(T, dtype=torch.long))).expand(B, 2, T)
    positions = torch.randint(0, 40, (B, 2, T))
    models = {way: attached(model=copy.deepcopy(plain), backbone=way) for way in ("hook", "frozen")}
    models["hook"].prefix_encoder.load_state_dict(models["frozen"].prefix_encoder.state_dict())
    none = torch.zeros(3, 2, 2, 0, 8)
    for name, (inputs, padding, lengths) in MASKS.items():
        given = {} if name == "nothing" else {"position_ids": positions}
        place = (padding, lengths, ids, given.get("position_ids", default))
        for attention in ("eager", "sdpa"):
            plain.set_attn_implementation(attention)
            output = output_of(plain, head, padding, input_ids=ids, **given, **inputs)
            close(output, published_output(plain, head, none, *place), 2e-5)
        prefix = models["hook"].prefix_encoder().detach().requires_grad_()
        expected = published_output(plain, head, prefix, *place)
        grad_out = torch.randn(expected.shape, dtype=torch.double)
        (gradient,) = torch.autograd.grad(expected, prefix, grad_out)
        gradient = gradient.permute(3, 0, 1, 2, 4).flatten(1)
        assert gradient.abs().min() > 0
        for model in models.values():
            output = output_of(model, head, padding, input_ids=ids, **given, **inputs)
            close(output, expected, 2e-5)
            table = model.prefix_encoder.embedding.weight
            close(*torch.autograd.grad(output, table, grad_out.float()), gradient.double(), 2e-4)


@pytest.mark.parametrize("name", ["lengths", "both"])
def test_policies_give_equal_bits_behind_lengths(name):
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    model = attached(model=tiny("sequence", **dropout), backbone="frozen", strict=True).train()
    batch, expected = {"input_ids": torch.randint(2, 56, (B, T)), **MASKS[name][0]}, None
    batch.setdefault("attention_mask", torch.ones(B, T))
    for policy in POLICIES:
        set_fields(model, recompute=policy)
        results = step_results(model, batch)
        expected = expected or results
        assert all(map(torch.equal, results, expected)), policy


def test_lengths_compile_into_one_graph():
    model = attached(model=tiny("bare", num_hidden_layers=2), backbone="hook")
    batch = {"input_ids": torch.randint(2, 56, (B, T)), **MASKS["both"][0]}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(*(m(**batch).last_hidden_state for m in (compiled, model)))


def test_the_activation_of_the_hub_s_code_is_another():
    ids = torch.randint(2, 56, (B, T))
    exact, tanh = (tiny("bare", hidden_act=name) for name in ("gelu", "gelu_pytorch_tanh"))
    difference = (exact(ids)[0] - tanh(ids)[0]).abs().max()
    assert 1e-5 < difference < 1e-2
    frozen = attached(model=copy.deepcopy(exact), backbone="frozen", strict=True)
    hook = attached(model=exact, backbone="hook")
    hook.prefix_encoder.load_state_dict(frozen.prefix_encoder.state_dict())
    torch.testing.assert_close(*(model(ids)[0] for model in (hook, frozen)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": torch.ones(B, 1, T, T)}, r"\[B, T\] = \[3, 9\].* rows and columns"),
        ({"attention_mask": PADDING, "context_lengths": torch.tensor([1, 2])}, r"\[B\] = \[3\]"),
        ({"attention_mask": 2, "context_lengths": 2}, "beside context_lengths"),
        ({"context_lengths": torch.tensor([0, 10, -1])}, r"values in 0\.\.9, got \[10, -1\]"),
        ({"context_lengths": torch.ones(B)}, "expected integers"),
        ({"position_ids": torch.zeros(B, T).long()}, r"position_ids: .* \[3, 2, 9\]"),
        ({"mems": [torch.zeros(1)]}, "mems: expected None"),
        ({"inputs_embeds": torch.zeros(B, T, 16)}, "inputs_embeds, got both"),
    ],
)
def test_inputs_of_another_form_are_refused(inputs, message):
    plain = tiny("bare")
    for model in (plain, attached(model=copy.deepcopy(plain))):
        with pytest.raises(ValueError, match=message):
            model(input_ids=torch.zeros(B, T).long(), **inputs)
    with pytest.raises(ValueError, match="expected at most 40 tokens, got 41"):
        plain(torch.zeros(1, 41).long())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool_token": "pad"}, "pool_token: expected 'cls'"),
        ({"relative_encoding": True}, "relative_encoding: expected False"),
        ({"block_position_encoding": False}, "block_position_encoding: expected True"),
        ({"num_attention_heads": 3}, "hidden_size: expected a multiple of the 3 heads"),
    ],
)
def test_options_that_are_not_served_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("glm2021", **changes)
    with pytest.raises(ValueError, match="name: expected one of base, large"):
        GLMConfig.of_size("4b")


def test_pieces_stand_at_their_blanks():
    """Two pieces, and one in a shorter text."""
    ids = torch.tensor([
        [2, 7, MASK, 8, MASK, START, 9, 10, START, 11],
        [2, MASK, 7, START, 9, 0, 0, 0, 0, 0],
    ])  # fmt: skip
    inputs = blank_inputs(ids, BlankTokens((MASK,), START))
    assert inputs["context_lengths"].tolist() == [5, 3]
    positions, blocks = inputs["position_ids"].unbind(1)
    assert positions.tolist()[0] == [0, 1, 2, 3, 4, 2, 2, 2, 4, 4]
    assert blocks.tolist()[0] == [0, 0, 0, 0, 0, 1, 2, 3, 1, 2]
    assert positions.tolist()[1][:5] == [0, 1, 2, 1, 1] and blocks.tolist()[1][:5] == [
        0,
        0,
        0,
        1,
        2,
    ]
    assert GLMForConditionalGeneration(tiny_config("glm2021"))(ids, **inputs).logits.shape[2] == 60
    for bad, message in (
        ([2, MASK, 7, 8], r"<\|startofpiece\|> in each text, got none in text 0"),
        ([2, 7, START, 8], r"\[MASK\] for each <\|startofpiece\|>, got 0 for 1 in text 0"),
        ([2, MASK, START, MASK, START], "got 1 for 2 in text 0"),
    ):
        with pytest.raises(ValueError, match=message):
            blank_inputs(torch.tensor([bad]), BlankTokens((MASK,), START))


def test_a_tokenizer_needs_the_tokens_of_blanks(tmp_path):
    save_tiny_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    with pytest.raises(ValueError, match=r"tokenizer: .* without <\|startofpiece\|>$"):
        blank_tokens(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|startofpiece|>", "[gMASK]"]})
    found = blank_tokens(tokenizer)
    assert tokenizer.convert_ids_to_tokens([*found.masks, found.start]) == [
        "[MASK]", "[gMASK]", "<|startofpiece|>",
    ]  # fmt: skip


def test_a_classifier_s_tokenizer_begins_with_cls(tmp_path):
    save_tiny_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    check = FAMILIES["glm2021"].check_tokenizer
    check(tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    with pytest.raises(ValueError, match=r"puts its cls_token in front .* cls_token '\[CLS\]'"):
        check(tokenizer)
    tokenizer.cls_token = None
    with pytest.raises(ValueError, match="with the cls_token None"):
        check(tokenizer)


def test_positions_that_train_get_the_same_gradient_in_frozen_blocks():
    plain, ids = tiny("sequence"), torch.randint(2, 56, (B, T))
    positions, gradients = torch.randint(0, 40, (B, 2, T)), []
    for way in ("hook", "frozen"):
        torch.manual_seed(1)
        fields = {"modules_to_save": ["block_position_embeddings"], "layers": [1, 2]}
        model = attached(model=copy.deepcopy(plain), backbone=way, **fields)
        table = model.glm.transformer.block_position_embeddings.weight
        assert table.requires_grad
        model(input_ids=ids, position_ids=positions).logits.sum().backward()
        gradients.append(table.grad.double())
    close(*gradients, 2e-4)
