"""GLM (2021) against the published formulas in plain torch, and its files and inputs."""

import argparse
import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

import ptv2_fast
from ptv2_fast.encoders.glm import (
    SIZES,
    BlankTokens,
    GLMConfig,
    GLMForConditionalGeneration,
    GLMForMultipleChoice,
    GLMForSequenceClassification,
    GLMForTokenClassification,
    GLMModel,
    blank_inputs,
    blank_tokens,
)
from ptv2_fast.frozen.spec import POLICIES
from tests.models import (
    attached,
    one_thread,  # noqa: F401
    set_fields,
    step_results,
    tiny_config,
)
from tests.tiny_run import save_tiny_model

CLASSES = {
    "bare": GLMModel,
    "sequence": GLMForSequenceClassification,
    "choice": GLMForMultipleChoice,
    "token": GLMForTokenClassification,
    "lm": GLMForConditionalGeneration,
}
B, T, MASK, START = 3, 9, 57, 58
LENGTHS = torch.tensor([4, 9, 0])
PADDING = (torch.arange(T) < torch.tensor([[9], [6], [4]])).long()
HOLES = PADDING.clone()
HOLES[:2, 2] = 0
# Name -> what a forward gets, the padding [B, T] and the lengths of part A [B] that it means.
MASKS = {
    "nothing": ({}, None, None),
    "padding": ({"attention_mask": PADDING}, PADDING, None),
    "lengths": ({"context_lengths": LENGTHS}, None, LENGTHS),
    "published lengths": ({"attention_mask": LENGTHS}, None, LENGTHS),
    "one length": ({"attention_mask": 3}, None, torch.tensor([3, 3, 3])),
    "causal": ({"attention_mask": torch.tensor(0)}, None, torch.zeros(B)),
    "both": ({"attention_mask": HOLES, "context_lengths": LENGTHS}, HOLES, LENGTHS),
}


def tiny(head: str, **changes):
    torch.manual_seed(0)
    model = CLASSES[head](tiny_config("glm2021", **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def published_mask(padding: Tensor | None, lengths: Tensor | None) -> Tensor:
    """As build_mask_matrix, [B, T, T] of 0 and 1."""
    if lengths is None:
        mask = torch.ones(B, T, T)
    else:
        mask = torch.ones(T, T).tril().repeat(B, 1, 1)
        for row, length in enumerate(lengths.tolist()):
            mask[row, :, : int(length)] = 1
    return mask if padding is None else mask * padding[:, None]


def published_states(
    weights: dict[str, Tensor], ids: Tensor, positions: Tensor, mask: Tensor, prefixes: Tensor
) -> Tensor:
    """The published formulas; prefixes [L, 2, H, P, D], positions [B, 2, T]."""

    def linear(states: Tensor, name: str) -> Tensor:
        return states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(states: Tensor, name: str) -> Tensor:
        centred = states - states.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def heads(states: Tensor) -> Tensor:
        return states.view(B, T, prefixes.shape[2], -1).transpose(1, 2)

    hidden = weights["word_embeddings.weight"][ids]
    hidden = hidden + weights["transformer.position_embeddings.weight"][positions[:, 0]]
    hidden = hidden + weights["transformer.block_position_embeddings.weight"][positions[:, 1]]
    seen = torch.cat((torch.ones(B, T, prefixes.shape[3]), mask), dim=2)[:, None].to(hidden)
    for i, (prefix_key, prefix_value) in enumerate(prefixes):
        layer = f"transformer.layers.{i}"
        product = linear(
            norm(hidden, f"{layer}.input_layernorm"), f"{layer}.attention.query_key_value"
        )
        query, key, value = map(heads, product.split(hidden.shape[2], dim=2))
        key = torch.cat((prefix_key.expand(B, -1, -1, -1), key), dim=2)
        value = torch.cat((prefix_value.expand(B, -1, -1, -1), value), dim=2)
        scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
        scores = scores * seen + -65504.0 * (1 - seen)
        out = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        hidden = hidden + linear(out, f"{layer}.attention.dense")
        inner = linear(
            norm(hidden, f"{layer}.post_attention_layernorm"), f"{layer}.mlp.dense_h_to_4h"
        )
        inner = (
            0.5 * inner * (1 + torch.tanh(0.7978845608028654 * inner * (1 + 0.044715 * inner**2)))
        )
        hidden = hidden + linear(inner, f"{layer}.mlp.dense_4h_to_h")
    return norm(hidden, "transformer.final_layernorm")


def published_output(
    model, head: str, prefixes: Tensor, padding, lengths, ids, positions
) -> Tensor:
    """What a head makes of them, in float64; 0 for pads."""
    weights = {n.removeprefix("glm."): t.double() for n, t in model.state_dict().items()}
    mask = published_mask(padding, lengths)
    states = published_states(weights, ids, positions, mask, prefixes.double())
    if head in ("sequence", "choice"):
        inner = torch.tanh(states[:, 0] @ weights["dense.weight"].T + weights["dense.bias"])
        return inner @ weights["out_proj.weight"].T + weights["out_proj.bias"]
    if head == "token":
        states = states @ weights["classifier.weight"].T + weights["classifier.bias"]
    elif head == "lm":
        states = states @ weights["word_embeddings.weight"].T
    return states if padding is None else states * padding[..., None]


def output_of(model, head: str, padding: Tensor | None, **inputs) -> Tensor:
    if head == "choice":  # of the texts as choices of one question
        inputs = {n: t[None] if getattr(t, "ndim", 0) else t for n, t in inputs.items()}
    output = model(**inputs)
    logits = output.last_hidden_state if head == "bare" else output.logits
    logits = logits.T if head == "choice" else logits
    is_by_token = padding is not None and head not in ("sequence", "choice")
    return logits * padding[..., None] if is_by_token else logits


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


def published_shapes(name: str) -> dict[str, list[int]]:
    layers, width, _, positions, words = SIZES[name]
    norm = {"weight": [width], "bias": [width]}
    of_layer = {
        "input_layernorm": norm,
        "attention.query_key_value": {"weight": [3 * width, width], "bias": [3 * width]},
        "attention.dense": {"weight": [width, width], "bias": [width]},
        "post_attention_layernorm": norm,
        "mlp.dense_h_to_4h": {"weight": [4 * width, width], "bias": [4 * width]},
        "mlp.dense_4h_to_h": {"weight": [width, 4 * width], "bias": [width]},
    }
    shapes = {
        "word_embeddings.weight": [words, width],
        "transformer.position_embeddings.weight": [positions + 1, width],
        "transformer.block_position_embeddings.weight": [positions + 1, width],
    }
    stems = {f"transformer.layers.{i}.{n}": s for i in range(layers) for n, s in of_layer.items()}
    for stem, shape in {**stems, "transformer.final_layernorm": norm}.items():
        shapes |= {f"{stem}.{part}": size for part, size in shape.items()}
    return shapes


@pytest.mark.parametrize(
    ("name", "sizes"), [("2b", (36, 2048, 32, 64)), ("10b", (48, 4096, 64, 64)), ("base", None)]
)
def test_published_sizes_have_the_published_names_and_shapes(name, sizes):
    config = GLMConfig.of_size(name)
    with torch.device("meta"):
        model = GLMForConditionalGeneration(config)
    found = {n: list(tensor.shape) for n, tensor in model.state_dict().items()}
    assert found == {f"glm.{n}": shape for n, shape in published_shapes(name).items()}
    if sizes is not None:
        attention = model.glm.transformer.layers[0].attention
        found = (config.num_layers, config.hidden_size, config.num_attention_heads)
        assert (*found, attention.head_dim) == sizes
        ptv2_fast.attach(model, ptv2_fast.PTuningV2Config(num_virtual_tokens=2, strict=True))


def thudm_file(model, path: Path) -> Path:
    """What its training wrote: tensors in half precision beside a good deal else."""
    module = {n.removeprefix("glm."): t.half() for n, t in model.glm.state_dict().items()}
    rest = {"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state()}
    args = argparse.Namespace(num_layers=3)
    torch.save({"module": module, "iteration": 250000, "args": args, **rest}, path)
    return path


def hub_folder(model, folder: Path) -> Path:
    """Two shards and their index."""
    tensors = model.state_dict()
    names, weight_map = sorted(tensors), {}
    for shard, part in enumerate((names[::2], names[1::2])):
        file = f"model-{shard}.safetensors"
        save_file({name: tensors[name].clone() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_published_files_are_loaded_by_name(tmp_path):
    model = tiny("sequence")
    model.to(torch.bfloat16).float()  # which half precision holds
    config = tiny_config("glm2021")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    paths = {
        "thudm": thudm_file(model, tmp_path / "mp_rank_00_model_states.pt"),
        "hub": hub_folder(model, tmp_path),
        "hub in one": tmp_path / "pytorch_model.bin",
    }
    for kind, path in paths.items():
        for head, dtype in (("sequence", torch.float32), ("token", torch.bfloat16), ("bare", None)):
            loaded = CLASSES[head].from_checkpoint(path, config, dtype)
            assert not loaded.training and loaded.dtype == (dtype or torch.float32)
            backbone = loaded if head == "bare" else loaded.glm
            for name, tensor in model.glm.state_dict().items():
                actual = backbone.state_dict()[name].float()
                torch.testing.assert_close(actual, tensor, rtol=2**-7, atol=2**-14)
            if head == "sequence" and kind != "thudm":
                assert torch.equal(loaded.out_proj.weight, model.out_proj.weight)
            elif head == "token" or (kind == "thudm" and head == "sequence"):
                new = loaded.classifier if head == "token" else loaded.dense
                assert new.bias.abs().max() == 0 and 0.1 < new.weight.float().std() < 0.5
    assert torch.equal(loaded(torch.tensor([[3, 4]]))[0], model.glm(torch.tensor([[3, 4]]))[0])
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert type(again) is GLMModel and again.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 32},
            r"expected glm.word_embeddings.weight of shape \[60, 32\], got \[60, 16\]",
        ),
        (
            {"num_hidden_layers": 4},
            r"expected the weights of a GLM \(2021\) with glm.transformer.layers.3.input_layernorm."
            r"weight of shape \[16\], got none",
        ),
        (
            {"num_hidden_layers": 2},
            r"got glm.transformer.layers.2.attention.dense.bias of shape \[16\]",
        ),
        (
            {"max_position_embeddings": 80},
            r"glm.transformer.position_embeddings.weight of shape \[81, 16\], got \[41, 16\]",
        ),
    ],
)
def test_a_file_of_another_size_is_refused(changes, message, tmp_path):
    path = thudm_file(tiny("sequence"), tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match=message):
        GLMForSequenceClassification.from_checkpoint(path, tiny_config("glm2021", **changes))


def test_other_files_are_refused(tmp_path):
    config, load = tiny_config("glm2021"), GLMModel.from_checkpoint
    glm_4 = {"model.embed_tokens.weight": torch.zeros(60, 16)}
    save_file(glm_4, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"word_embeddings.weight .*got none.* model.embed_tokens"):
        load(tmp_path, config)
    with pytest.raises(ValueError, match="expected a file of weights, got none"):
        load(tmp_path / "nothing.pt", config)
    for name, content, message in (
        ("list.pt", [1], "expected named tensors, got a list"),
        ("code.pt", {"module": Path}, "cannot be read without running code"),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name, config)
    (tmp_path / "cut.bin").write_bytes((tmp_path / "list.pt").read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "cut.bin", config)
    (tmp_path / "parts").mkdir()
    with pytest.raises(ValueError, match=r"expected a folder with one of model.safetensors.index"):
        load(tmp_path / "parts", config)
    for number in range(2):
        (tmp_path / "parts" / f"mp_rank_0{number}_model_states.pt").touch()
    with pytest.raises(ValueError, match=r"expected a model in one part.* change_mp.py"):
        load(tmp_path / "parts", config)
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../a.bin"}}')
    with pytest.raises(ValueError, match="expected an index of weights"):
        load(tmp_path / "pytorch_model.bin.index.json", config)


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
