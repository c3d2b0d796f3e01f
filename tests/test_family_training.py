"""Training commands with every family: their methods, dropout options, and whole runs."""

import copy
import inspect
import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoTokenizer

import ptv2_fast
from ptv2_fast.encoders.blocks import Heads
from ptv2_fast.encoders.checkpointing import checkpoint_activations
from ptv2_fast.encoders.families import FAMILIES
from ptv2_fast.training.baselines import PROMPT, add_prompt, trained_tensors
from ptv2_fast.training.dropout import check_dropout, set_dropout
from ptv2_fast.training.methods import METHODS, longest_input, prepare_model
from ptv2_fast.training.models import load_run
from ptv2_fast.training.options import ModelOptions, RunConfig
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.run import train
from ptv2_fast.training.scoring import predict_texts
from tests.models import (
    HEADS,
    MODEL_TYPES,
    MODELS,
    make_batch,
    one_thread,  # noqa: F401
    outputs_of,
    real_tokens,
    tiny_config,
    tiny_model,
)
from tests.tiny_run import save_tiny_model, write_conll, write_reviews

# The task of a family: the first head that it has.
TASKS = {name: head for name, head in reversed(MODELS) if head in ("sequence", "token")}
DECODERS = [name for name in MODEL_TYPES if FAMILIES[name].is_decoder]
# One of those whose rows of the table are equal.
DISTINCT = sorted({FAMILIES[name]: name for name in reversed(MODEL_TYPES)}.values())
WITHOUT_PROMPTS = ("esm",)
# What no loss reads: contacts of proteins, adapters of another language.
UNREAD = ("contact_head", "adapter_modules.en_XX")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder / "bert")
    write_reviews(folder / "sequence.csv", 8)
    write_conll(folder / "token.txt", 8)
    return folder


def save_model(model_type: str, tiny: Path, folder: Path, ends="[SEP]", **overrides) -> str:
    """A backbone and a tokenizer; that of a decoder has no pad token and pads on the left."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "bert")
    overrides = {"pad_token_id": 0, "vocab_size": len(tokenizer), **overrides}
    if model_type in DECODERS:
        tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side = None, ends, "left"
        overrides["pad_token_id"] = None
    tokenizer.save_pretrained(folder)
    tiny_model(model_type, "bare", **overrides).save_pretrained(folder)
    return str(folder)


def run_config(model: str, tiny: Path, head: str, /, **more) -> RunConfig:
    task = {"sequence": "text-classification", "token": "token-classification"}[head]
    file = {"sequence": "sequence.csv", "token": "token.txt"}[head]
    return RunConfig.from_dict({
        "model": model, "task": task, "train_file": str(tiny / file),
        "num_virtual_tokens": 3, "init": "tokens", "max_steps": 2, "batch_size": 4,
        "save_steps": 0, "progress": False, **more,
    })  # fmt: skip


def options(method: str, **more) -> ModelOptions:
    return ModelOptions(model="tiny", method=method, num_virtual_tokens=3, lora_rank=2, **more)


def takes_types(model) -> bool:
    return "token_type_ids" in inspect.signature(model.forward).parameters


@pytest.mark.parametrize("model_type", DISTINCT)
def test_each_kind_of_family_trains_and_its_run_opens(model_type, tiny, tmp_path):
    model = save_model(model_type, tiny, tmp_path / "model")
    prepared = prepare(run_config(model, tiny, TASKS[model_type]), tmp_path / "run")
    assert prepared.part.max_length == longest_input(prepared.model, prepared.config.model)[0]
    before = {name: tensor.clone() for name, tensor in trained_tensors(prepared.model).items()}
    train(prepared)
    after = trained_tensors(prepared.model)
    assert [name for name in before if torch.equal(before[name], after[name])] == []

    alone = ptv2_fast.load(tmp_path / "run" / "adapter")
    run, texts = load_run(tmp_path / "run"), ["the film was good and a film", "bad"]
    pad = run.tokenizer.pad_token_id
    for part in (run, alone):
        assert part.tokenizer.padding_side == "right" and part.tokenizer.pad_token_id == pad
        assert part.model.config.pad_token_id == pad
        assert ("token_type_ids" in part.tokenizer.model_input_names) == takes_types(part.model)
    together = predict_texts(run, texts)
    single = [predict_texts(run, [text])[0] for text in texts]
    for one, other in zip(together, single, strict=True):
        score = "score" if "score" in one else "scores"
        torch.testing.assert_close(*(torch.tensor(row.pop(score)) for row in (one, other)))


@pytest.mark.parametrize(
    ("model_type", "overrides", "options", "message"),
    [
        ("esm", {}, {"method": "prompt-tuning"}, "method: expected one without a prompt"),
        (
            "esm",
            {},
            {"task": "multiple-choice"},
            "a class for AutoModelForMultipleChoice, got the model_type 'esm'",
        ),
        (
            "llama",
            {},
            {"head": "lm", "verbalizer": "good=good,bad=bad"},
            "a class for AutoModelForMaskedLM, got the model_type 'llama'",
        ),
        (
            "xmod",
            {"default_language": None},
            {},
            "expected a configuration with a default_language",
        ),
        ("albert", {}, {"gradient_checkpointing": True}, "gradient_checkpointing: expected False"),
        ("modernbert", {}, {"position_offset": "prefix"}, "position_offset: expected 'none'"),
        ("albert", {}, {"depth": "2-4"}, "depth: expected layers 1 to 3"),
        (
            "llama",
            {"eos_token": None},
            {},
            "tokenizer: expected one with a pad token, or with an e",
        ),
    ],
)
def test_what_a_family_does_not_serve_is_said_before_training(
    model_type, overrides, options, message, tiny, tmp_path
):
    overrides = dict(overrides)
    ends = overrides.pop("eos_token", "[SEP]")
    model = save_model(model_type, tiny, tmp_path / "model", ends=ends, **overrides)
    if options.get("task"):
        choices = [{"text": "a", "choices": ["b", "c"], "label": i % 2} for i in range(4)]
        file = tmp_path / "choices.jsonl"
        file.write_text("\n".join(map(json.dumps, choices)))
        options = {**options, "train_file": str(file)}
    with pytest.raises(ValueError, match=message):
        prepare(run_config(model, tiny, "sequence", **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_encoder_without_a_length_says_so():
    model = tiny_model("bert")
    model.config = transformers.PreTrainedConfig(model_type="other")
    with pytest.raises(ValueError, match="max_position_embeddings, which limits inputs, got None"):
        longest_input(model, options("fine-tuning"))


@pytest.mark.parametrize("model_type", DISTINCT)
def test_other_methods_train_what_they_name(model_type):
    """Two steps change every trained tensor and no other; with checkpointing where there is any."""
    head, served = TASKS[model_type], set(METHODS) - {"p-tuning-v2"}
    plain, batch = tiny_model(model_type, head), make_batch(head)
    if model_type in WITHOUT_PROMPTS:
        for method in ("prompt-tuning", "p-tuning-v1"):
            served.remove(method)
            with pytest.raises(ValueError, match=r"without a prompt .* for the model_type 'esm'"):
                prepare_model(copy.deepcopy(plain), options(method))
    for method in sorted(served):
        model = copy.deepcopy(plain).train()
        prepare_model(model, options(method))
        if model.supports_gradient_checkpointing:
            checkpoint_activations(model)
        else:
            with pytest.raises(ValueError, match=r"^gradient_checkpointing: expected False for"):
                checkpoint_activations(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for _ in range(2):
            output = outputs_of(head, model(**batch))
            optimizer.zero_grad()
            (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
            optimizer.step()
        changed = {name for name, p in model.named_parameters() if not p.equal(before[name])}
        named = {n for n in trained_tensors(model) if not any(part in n for part in UNREAD)}
        assert changed == named, method


@pytest.mark.parametrize(("model_type", "head"), [m for m in MODELS if m[1] != "bare"])
def test_an_empty_prompt_changes_nothing(model_type, head):
    """Neither scales nor positions of embeddings, nor what a pooler and a head read."""
    if model_type in WITHOUT_PROMPTS:
        return
    plain, batch = tiny_model(model_type, head), make_batch(head)
    model = copy.deepcopy(plain)
    add_prompt(model, nn.Embedding(0, model.get_input_embeddings().weight.shape[1]), 0)
    expected, actual = (
        outputs_of(head, m(**batch)) * real_tokens(head, batch) for m in (plain, model)
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_prompt_starts_at_the_vectors_of_tokens(model_type):
    if model_type in WITHOUT_PROMPTS:
        return
    model, ids = tiny_model(model_type, TASKS[model_type]), torch.tensor([7, 8, 9])
    METHODS["prompt-tuning"](model, options("prompt-tuning"), ids)
    assert torch.equal(model.get_submodule(PROMPT).weight, model.get_input_embeddings()(ids))


@pytest.mark.parametrize(("model_type", "head"), [m for m in MODELS if m[1] != "bare"])
def test_dropout_options_reach_every_module_or_say_so(model_type, head):
    asked = options("lora", dropout=0.25, attention_dropout=0.15, head_dropout=0.35)
    config = tiny_config(model_type, **({"num_labels": 2} if head == "question" else {}))
    set_dropout(config, asked)
    model = HEADS[head].from_config(config).train()
    inside, of_head = set(), set()
    backbone = set(model.base_model.modules())
    for module in model.modules():
        found = inside if module in backbone else of_head
        found |= {module.p} if isinstance(module, nn.Dropout) else set()
        found |= {v for n, v in vars(module).items() if "dropout" in n and type(v) is float}
    assert inside <= {0.15, 0.25}
    of_pooler = {getattr(config, "pooler_dropout", 0.25)}  # DeBERTa's, which keeps its own
    assert of_head - of_pooler <= {0.25, 0.35}, "some heads have that of the encoder"
    family = FAMILIES[model_type]
    if family.describe_block is not None:
        layer = family.layer_modules(model.base_model)[0]
        block = family.describe_block(layer, Heads(*family.key_shape(config)))
        assert block.attention_dropout.probability == (0.15 if 0.15 in inside else 0.25)
    refused = [n for n, value, known in (("dropout", 0.25, inside | of_head),
               ("attention_dropout", 0.15, inside)) if value not in known]  # fmt: skip
    if refused:
        with pytest.raises(ValueError, match=f"^{refused[0]}: expected None or 0 for .* got 0"):
            check_dropout(model, asked)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_dropout(model, asked)
    assert [str(w.message)[:24] for w in caught] == ["head_dropout: no effect,"] * (
        0.35 not in of_head
    )


def test_dropout_holds_for_the_head_too_unless_it_has_its_own():
    for model_type in ("albert", "distilbert", "modernbert", "bert"):
        config = tiny_config(model_type)
        set_dropout(config, options("lora", dropout=0.25))
        model = HEADS["sequence"].from_config(config)
        assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.25}
