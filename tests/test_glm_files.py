"""GLM (2021): published sizes and files, and the memory that they take."""

import argparse
import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModel

import ptv2_fast
from ptv2_fast import PTuningV2Config
from ptv2_fast.encoders.glm import (
    SIZES,
    GLMConfig,
    GLMForConditionalGeneration,
    GLMForSequenceClassification,
    GLMForTokenClassification,
    GLMModel,
)
from ptv2_fast.encoders.memory import predict_step
from ptv2_fast.frozen.spec import POLICIES
from ptv2_fast.training.measure import kept_bytes
from tests.glm_formulas import CLASSES, tiny
from tests.models import (
    one_thread,  # noqa: F401
    tiny_config,
    tiny_model,
)


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
    ("name", "sizes"),
    [
        ("2b", (36, 2048, 32, 64, 50304, 1025)),
        ("10b", (48, 4096, 64, 64, 50304, 1025)),
        ("base", (12, 768, 12, 64, 30592, 513)),
    ],
)
def test_published_sizes_have_the_published_names_and_shapes(name, sizes):
    config = GLMConfig.of_size(name)
    with torch.device("meta"):
        model = GLMForConditionalGeneration(config)
    found = {n: list(tensor.shape) for n, tensor in model.state_dict().items()}
    assert found == {f"glm.{n}": shape for n, shape in published_shapes(name).items()}
    attention = model.glm.transformer.layers[0].attention
    rows = (len(model.glm.word_embeddings.weight), config.max_sequence_length + 1)
    found = (config.num_layers, config.hidden_size, config.num_attention_heads, attention.head_dim)
    assert (*found, *rows) == sizes
    ptv2_fast.attach(model, PTuningV2Config(num_virtual_tokens=2, strict=True))


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
        save_file({name: tensors[name].clone() for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
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


def test_a_folder_with_the_published_code_is_opened_without_it(tmp_path):
    model = tiny("sequence")
    hub_folder(model, tmp_path)
    published = {
        "model_type": "glm", "auto_map": {"AutoConfig": "configuration_glm.GLMConfig"},
        "num_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 60,
        "max_sequence_length": 40, "attention_scale": 1.0, "block_position_encoding": True,
        "relative_encoding": False, "output_predict": True, "pool_token": "cls", "num_labels": 3,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    loaded = GLMForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.model_type == "glm2021" and not hasattr(loaded.config, "auto_map")
    torch.testing.assert_close(*(m(torch.tensor([[3, 4]])).logits for m in (loaded, model)))
    transformers.GlmConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type: expected .* GLM \(2021\), got .*GLM-4"):
        GLMModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("policy", "more"),
    [
        *itertools.product((*POLICIES, "hook"), ({}, {"train_biases": True, "train_norms": True})),
        *((policy, {"low_rank": 2}) for policy in POLICIES),
    ],
    ids=str,
)
def test_memory_is_predicted_from_a_model_without_weights(policy, more):
    """What the last norm and the head keep is not counted."""
    changes = {"hidden_size": 64, "num_attention_heads": 4}
    way = {"backbone": "hook"} if policy == "hook" else {"recompute": policy}
    config, rows = PTuningV2Config(num_virtual_tokens=4, **way, **more), 4 * 32
    with torch.device("meta"):
        empty = GLMForTokenClassification(tiny_config("glm2021", **changes))
    predicted = predict_step(empty, config, 4, 32, device_type="cpu")
    plain = tiny("token", **changes).to(torch.bfloat16)
    backbone = sum(p.numel() for p in plain.glm.parameters())
    assert predicted.weights == 2 * backbone and predicted.gathered == 0
    model = ptv2_fast.attach(plain, config).train()
    assert predicted.trained == 16 * ptv2_fast.get_nb_trainable_parameters(model)[0]
    ids = torch.randint(2, 56, (4, 32))
    model(ids)
    kept = kept_bytes(lambda: model(ids).logits.float().sum(), model)
    assert 0 <= kept - predicted.kept <= rows * (2 * 64 * 2 + 16 + 3 * 4) + 16


def test_the_largest_glm_trains_on_one_gpu_and_needs_less_of_several():
    config = PTuningV2Config(num_virtual_tokens=128, recompute="ffn+qkv")
    with torch.device("meta"):
        model = GLMForSequenceClassification(GLMConfig.of_size("10b"))
    alone, shared = (predict_step(model, config, 8, 256, devices=n) for n in (1, 4))
    weights = sum(math.prod(shape) for shape in published_shapes("10b").values())
    assert (alone.weights, shared.weights) == (2 * weights, weights // 2)
    assert alone.total < 24 * 2**30 and shared.total < 16 * 2**30
    with pytest.raises(ValueError, match="memory_budget: expected None"):
        predict_step(model, PTuningV2Config(memory_budget=1), 8, 256)
    with pytest.raises(ValueError, match=r"expected one with frozen blocks, got .* 'mobilebert'"):
        predict_step(tiny_model("mobilebert"), config, 8, 256)
    with pytest.raises(ValueError, match=r"no rotation for several devices .* 'llama'"):
        predict_step(tiny_model("llama"), config, 8, 256, devices=2)
