"""A bank of adapters: each row of a mixed batch gives what its adapter gives alone."""

import contextlib
import copy
import json
import threading
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

import ptv2_fast
from ptv2_fast import AdapterBank, PTuningV2Config, load_adapter, save_adapter
from ptv2_fast.encoders.families import FAMILIES
from ptv2_fast.encoders.lifecycle import require_attachment
from ptv2_fast.frozen import engine
from ptv2_fast.training.models import load_run
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.run import train
from ptv2_fast.training.scoring import predict_texts
from tests.models import (
    DROPOUT,
    HEADS,
    assert_close_to_plain,
    auto_class,
    has_class,
    is_served,
    one_thread,  # noqa: F401
    plain_results,
    tiny_config,
    tiny_model,
)
from tests.squad_files import question, write_squad
from tests.tiny_run import save_tiny_model, write_conll, write_reviews

WHOLE = [name for name in ("bert", "roberta", "modernbert", "deberta-v2") if is_served(name)]
# Whose heads, or what their backbones hand to them, are each of another kind.
KINDS = ("albert", "electra", "glm2021", "llama", "t5", "xmod")
SIZES = {"max_position_embeddings": 130}
# Name -> head, labels, and what the prefix is.
ADAPTERS = {
    "pair": ("sequence", 2, {"num_virtual_tokens": 1}),
    "tags": ("token", 17, {"num_virtual_tokens": 100, "position_offset": "prefix"}),
    "answers": ("question", 2, {"num_virtual_tokens": 7, "layers": (1, 2)}),
    "grade": ("sequence", 1, {"num_virtual_tokens": 20, "layers": (2,), "prefix_projection": True}),
    "choices": ("choice", 2, {"num_virtual_tokens": 3, "layers": (0, 2)}),
    "gated": ("sequence", 5, {"num_virtual_tokens": 5, "prefix_gate": True}),
    "updated": ("token", 4, {"num_virtual_tokens": 2, "low_rank": 2}),
    "inside": ("sequence", 3, {"num_virtual_tokens": 4, "layers": (1, 2), "train_biases": True,
                               "train_norms": True, "low_rank": 3}),
    "norms": ("sequence", 2, {"num_virtual_tokens": 0, "train_norms": True}),
}  # fmt: skip


def with_adapter(plain, head: str, num_labels: int, fields: dict, **options):
    """A model of its class on the weights of `plain`, with an adapter that is large everywhere."""
    model_type = plain.config.model_type
    if fields.get("position_offset") and not FAMILIES[model_type].has_position_table(plain.config):
        fields = {**fields, "position_offset": "none"}
    config = tiny_config(model_type, num_labels=num_labels, **SIZES, **options)
    model = auto_class(model_type, head).from_config(config).eval()
    weights = plain.state_dict()
    own = model.base_model.state_dict()
    model.base_model.load_state_dict({n: t for n, t in weights.items() if n in own}, strict=False)
    if model_type == "modernbert":
        fields = {name: value for name, value in fields.items() if name != "train_biases"}
    ptv2_fast.attach(model, PTuningV2Config(**fields))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5 if "prefix" in name else 0.3)
    return model.eval()


@pytest.fixture(scope="module", params=WHOLE)
def case(request, tmp_path_factory):
    """A plain encoder, and models with adapters on it, each saved in a folder of its name."""
    torch.manual_seed(0)
    plain, folder = tiny_model(request.param, "bare", **SIZES), tmp_path_factory.mktemp("adapters")
    models = {}
    for name, (head, num_labels, fields) in ADAPTERS.items():
        if has_class(request.param, head):
            model = with_adapter(plain, head, num_labels, fields)
            save_adapter(model, folder / name)
            # What a user runs: the adapter alone, in a model of its class.
            fresh = auto_class(request.param, head).from_config(model.config)
            fresh.base_model.load_state_dict(
                {n: t for n, t in plain.state_dict().items()
                 if n in fresh.base_model.state_dict()}, strict=False,
            )  # fmt: skip
            models[name] = load_adapter(fresh, folder / name)
    return plain, models, folder


def bank_of(case, how: str = "auto", names=None, is_trainable: bool = False) -> AdapterBank:
    plain, models, folder = case
    bank = AdapterBank(copy.deepcopy(plain), backbone=how)
    for name in models if names is None else names:
        bank.load(name, folder / name, is_trainable)
    return bank


def texts_of(lengths) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, 60, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 1), mask.long()


def results_of(model, ids: Tensor, lengths) -> list[Tensor]:
    """What a model makes of each of some texts, [B, T]."""
    has_choices = type(model).__name__.endswith("ForMultipleChoice")
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    output = model(**({n: t[:, None] for n, t in inputs.items()} if has_choices else inputs))
    if has_choices:
        return list(output.logits[:, 0])
    if "start_logits" in output:
        whole = torch.stack((output.start_logits, output.end_logits), dim=-1)
    else:
        whole = output.logits if "logits" in output else output.last_hidden_state
    if whole.dim() == 2:
        return list(whole)
    return [row[:length] for row, length in zip(whole, lengths, strict=True)]


def alone(found: dict, asked: list[str], ids: Tensor, lengths) -> tuple[Tensor, ...]:
    """What each text's model gives for it, each model run by itself on its own texts."""
    results: list = [None] * len(asked)
    for name in dict.fromkeys(asked):
        own = [number for number, each in enumerate(asked) if each == name]
        if name == "__base__":  # in ModernBERT's windows, pads of plain transformers are NaN
            parts = [results_of(found[name], ids[[n], : lengths[n]], [lengths[n]]) for n in own]
        else:
            parts = [results_of(found[name], ids[own], [lengths[n] for n in own])]
        rows = (row for part in parts for row in part)
        for number, row in zip(own, rows, strict=True):
            results[number] = row
    return tuple(results)


def test_every_row_equals_its_adapter_alone(case, monkeypatch):
    plain, models, _ = case
    names = [*models, "__base__"]
    lengths = [(5 * number) % 14 + 1 for number in range(24)]
    asked = [names[(number * 7) % len(names)] for number in range(24)]
    ids, mask = texts_of(lengths)
    assert len(set(asked)) == len(names)

    def separate(*copies) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return alone(dict(zip(names, copies, strict=True)), asked, ids, lengths)

    expected = plain_results(separate, *models.values(), plain)
    for how in ("frozen", "hook"):
        bank = bank_of(case, how)
        run = mock.patch.object(bank._shared, "run", wraps=bank._shared.run)
        with torch.no_grad(), run as calls:
            assert_close_to_plain(bank(ids, mask, asked), expected, how)
            # One pass for all, whatever they train; transformers' own layers read prefixes alone.
            inside = [m for m in bank._members.values() if m.values is not None]
            assert len(inside) == 3
            assert calls.call_count == (1 if how == "frozen" else 2), "the first runs nothing"
            reordered = bank(ids.flip(0), mask.flip(0).bool(), asked[::-1])[::-1]
            assert_close_to_plain(reordered, expected, f"{how}, another order")
            # Heads that read the first token alone: of the last layer nothing else is computed.
            first = [
                n for n, name in enumerate(asked) if ADAPTERS.get(name, ("",))[0] == "sequence"
            ]
            own = bank(ids[first], mask[first], [asked[number] for number in first])
            of_first = [expected[number] for number in first]
            assert_close_to_plain(own, of_first, f"{how}, first tokens")
            with monkeypatch.context() as patch:
                patch.setattr(engine, "CPU_CHUNK", 32)
                assert_close_to_plain(bank(ids, mask, asked), expected, f"{how}, in parts")
            # Nothing differs in layer 0.
            several, texts = ["grade", "answers", "inside", "__base__"], range(4)
            shared = bank(ids[:4], mask[:4], [several for _ in texts])
            single = [bank(ids[:4], mask[:4], [name] * 4) for name in several]
            for text in texts:
                torch.testing.assert_close(shared[text], [each[text] for each in single])


def trained_parts(model) -> list[Tensor]:
    """In the order of `parameters_of`."""
    head = [p for n, p in model.named_parameters() if p.requires_grad and "prefix_enc" not in n]
    return [*model.prefix_encoder.parameters(), *head]


@pytest.mark.parametrize("model_type", [name for name in KINDS if is_served(name)])
def test_heads_of_every_kind_read_the_shared_states(model_type):
    plain = tiny_model(model_type, "bare", **SIZES)
    bank = AdapterBank(copy.deepcopy(plain))
    models = {}
    for number, head in enumerate(head for head in HEADS if has_class(model_type, head)):
        fields = {"num_virtual_tokens": 1 + 3 * number, "layers": (1, 2) if number else None}
        num_labels = 2 if head == "question" else 3 + number
        models[head] = with_adapter(plain, head, num_labels, fields)
        bank.add(head, models[head])
    assert not any(member.runs_alone for member in bank._members.values())
    names, lengths = [*models, "__base__"], [9, 5, 7, 3, 8, 6][: len(models) + 1]
    ids, mask = texts_of(lengths)

    def separate(*copies) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return alone(dict(zip(names, copies, strict=True)), names, ids, lengths)

    with torch.no_grad():
        actual = bank(ids, mask, names)
    assert_close_to_plain(actual, plain_results(separate, *models.values(), plain), model_type)


@pytest.mark.parametrize("how", ["frozen", "hook"])
def test_a_mixed_batch_gives_the_gradients_of_separate_runs(how):
    plain = tiny_model("bert", "bare", **SIZES)
    chosen = {
        "pair": ("sequence", 2, {"num_virtual_tokens": 3, "layers": (1, 2)}),
        "grade": ("sequence", 1, {"num_virtual_tokens": 2, "prefix_projection": True}),
        "tags": ("token", 4, {"num_virtual_tokens": 9, "prefix_gate": True}),
        "alone": ("token", 3, {"num_virtual_tokens": 2, "train_biases": True}),
    }
    models = {name: with_adapter(plain, *values) for name, values in chosen.items()}
    bank = AdapterBank(copy.deepcopy(plain), backbone=how)
    for name, model in models.items():
        bank.add(name, model)
    lengths, asked = (7, 3, 9, 4, 6), ["tags", "pair", "grade", "tags", "alone"]
    ids, mask = texts_of(lengths)
    bank.train_mode(models)
    results = bank(ids, mask, asked)
    grads = [torch.randn(result.shape) for result in results]

    def separate(*copies) -> tuple[Tensor, ...]:
        found = dict(zip(models, copies, strict=True))
        results = alone(found, asked, ids, lengths)
        sum((r * grad).sum() for r, grad in zip(results, grads, strict=True)).backward()
        return tuple(p.grad for name in models for p in trained_parts(found[name]))

    sum((result * grad).sum() for result, grad in zip(results, grads, strict=True)).backward()
    actual = tuple(p.grad for name in models for p in bank.parameters_of(name))
    assert_close_to_plain(actual, plain_results(separate, *models.values()), how)
    bank.train_mode(["pair"])
    assert [p.requires_grad for p in bank.parameters_of("tags")].count(True) == 0
    assert not any(r.requires_grad for r in bank(ids[:2], mask[:2], ["tags", "__base__"]))
    bank.train_mode()
    assert not bank(ids, mask, asked)[1].requires_grad


@pytest.mark.parametrize("how", ["frozen", "hook"])
def test_texts_of_several_adapters_run_the_lower_layers_once(how):
    plain = tiny_model("bert", "bare", **SIZES)
    bank = AdapterBank(copy.deepcopy(plain), backbone=how)
    for number, layers in enumerate([(2,), (1, 2), None]):
        fields = {"num_virtual_tokens": 3, **({"layers": layers} if layers else {})}
        bank.add(f"a{number}", with_adapter(plain, "token", 3, fields))
    tokens: list[int] = []  # in each layer

    def count(module, args):
        states = args[0]
        tokens.append(states.shape[0] * (states.shape[1] if states.dim() == 3 else 1))

    ids, mask = texts_of((11, 7, 4))
    expected = [bank(ids, mask, [f"a{n}"] * 3) for n in range(2)]
    for layer in bank._shared.layers:
        layer.register_forward_pre_hook(count)
    results = bank(ids, mask, [["a0", "a1"], "a1", ["a0", "a1"]])
    # Hooks see padded batches: 3 texts below layer 1, and then 5 rows.
    assert tokens == ([33, 33, 55] if how == "frozen" else [55, 55, 55])
    for text, (first, second) in ((0, results[0]), (2, results[2])):
        torch.testing.assert_close(first, expected[0][text])
        torch.testing.assert_close(second, expected[1][text])
    torch.testing.assert_close(results[1], expected[1][1])


def without_mode(description: dict) -> dict:
    """What an adapter says, but for whether it trained when it was saved."""
    fields = {**description["prefix_config"], "inference_mode": None}
    return {**description, "prefix_config": fields}


def test_saved_adapters_load_again(case, tmp_path):
    plain, models, folder = case
    bank = bank_of(case)
    ids, _ = texts_of((9, 5))
    for name, model in models.items():
        bank.save(name, tmp_path / name)
        before = load_file(folder / name / "ptv2_adapter.safetensors")
        after = load_file(tmp_path / name / "ptv2_adapter.safetensors")
        if name != "grade":  # whose projection is folded
            assert before.keys() == after.keys()
            descriptions = [json.loads((place / name / "ptv2_config.json").read_text())
                            for place in (folder, tmp_path)]  # fmt: skip
            assert without_mode(descriptions[0]) == without_mode(descriptions[1])
            assert all(torch.equal(before[key], after[key]) for key in before)
        fresh = type(model)(copy.deepcopy(model.config)).eval()
        fresh.base_model.load_state_dict(
            {n: t for n, t in plain.state_dict().items() if n in fresh.base_model.state_dict()},
            strict=False,
        )
        load_adapter(fresh, tmp_path / name)
        torch.testing.assert_close(results_of(fresh, ids, (9, 5)), results_of(model, ids, (9, 5)))
    assert bank.labels("pair") == ["LABEL_0", "LABEL_1"]
    assert len(bank.labels("tags")) == 17
    assert [bank.labels(name) for name in ("answers", "grade")] == [None, None]
    assert bank.names == tuple(models)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A plain BERT and the folder of an adapter of it."""
    torch.manual_seed(0)
    plain, folder = tiny_model("bert", "bare", **SIZES), tmp_path_factory.mktemp("small") / "good"
    save_adapter(with_adapter(plain, "sequence", 3, {"num_virtual_tokens": 4}), folder)
    return plain, folder


def test_an_adapter_of_another_base_of_the_same_sizes_is_warned_of(small, tmp_path):
    plain, good = copy.deepcopy(small[0]), small[1]
    plain.config.name_or_path = "/models/encoder"
    folder = changed(good, tmp_path / "named")
    path = folder / "ptv2_config.json"
    description = json.loads(path.read_text())
    bank = AdapterBank(plain)
    for base, expectation in (
        ("user/encoder", contextlib.nullcontext()),
        ("user/other", pytest.warns(UserWarning, match="trained on 'user/other' and is loaded on")),
    ):
        path.write_text(json.dumps({**description, "base_model": base}))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with expectation:
                bank.load(Path(base).name, folder)


def changed(folder, target, **tensors):
    """A copy of an adapter with other tensors."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = target / "ptv2_adapter.safetensors"
    save_file({**load_file(weights), **tensors}, weights)
    return target


def test_bad_adapters_are_refused_and_leave_the_bank_as_it_was(small, tmp_path):
    plain, good = small
    bank = AdapterBank(copy.deepcopy(plain))
    bank.load("good", good)
    others = {
        "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 61,
    }  # fmt: skip
    other = tiny_model("bert", "sequence", **others, **SIZES)
    ptv2_fast.attach(other, PTuningV2Config(num_virtual_tokens=4))
    save_adapter(other, tmp_path / "other")
    differences = (
        "num_hidden_layers 2 against 3, hidden_size 32 against 16, "
        "num_attention_heads 4 against 2, vocab_size 61 against 60"
    )
    with pytest.raises(ValueError, match=differences):
        bank.load("other", tmp_path / "other")
    with pytest.raises(ValueError, match="hidden_size 32 against 16"):
        bank.add("other", other)
    roberta = with_adapter(tiny_model("roberta", "bare", **SIZES), "token", 2, {})
    save_adapter(roberta, tmp_path / "roberta")
    with pytest.raises(ValueError, match="model_type 'roberta' against 'bert'"):
        bank.load("roberta", tmp_path / "roberta")
    wider = tiny_model("bert", "sequence", vocab_size=70, **SIZES)
    ptv2_fast.attach(wider, PTuningV2Config(num_virtual_tokens=4))
    save_adapter(wider, tmp_path / "wider")
    with pytest.raises(ValueError, match=r"vocabulary of 70 tokens .* got 60"):
        bank.load("wider", tmp_path / "wider")
    with pytest.raises(ValueError, match="weights of the bank's BertModel, got others in"):
        bank.add("strange", with_adapter(tiny_model("bert", "bare", **SIZES), "token", 2, {}))
    weight = load_file(good / "ptv2_adapter.safetensors")["classifier.weight"]
    for value in (torch.nan, torch.inf):
        weight[0, 0] = value
        folder = changed(good, tmp_path / str(value), **{"classifier.weight": weight})
        with pytest.raises(ValueError, match=r"finite numbers in classifier\.weight"):
            bank.load("infinite", folder)
    for name, content in (("short", lambda b: b[:-9]), ("long", lambda b: b + b"more")):
        folder = changed(good, tmp_path / name)
        file = folder / "ptv2_adapter.safetensors"
        file.write_bytes(content(file.read_bytes()))
        with pytest.raises(ValueError, match="corrupt or truncated safetensors"):
            bank.load(name, folder)
    with pytest.raises(ValueError, match="expected a run folder"):
        bank.load("nothing", tmp_path / "nothing")
    for name in ("__base__", "", "a b", "../a", "x" * 129, "ä", 3):
        with pytest.raises(ValueError, match="name: expected 1 to 128 letters"):
            bank.load(name, good)
    with pytest.raises(ValueError, match="name: expected a new one, got 'good'"):
        bank.load("good", good)
    with pytest.raises(ValueError, match="expected an attached model"):
        bank.add("plain", plain)
    with pytest.raises(ValueError, match="expected a transformers PreTrainedModel"):
        AdapterBank(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected a model without a prefix"):
        AdapterBank(other, dtype=torch.bfloat16)
    assert other.dtype == torch.float32
    for options, message in (
        ({"device": "meta"}, "device: expected one that torch can use here, got 'meta'"),
        ({"device": "gpu"}, "device: expected one that torch can use here, got 'gpu'"),
        ({"dtype": torch.int8}, "dtype: expected None or one of .* got torch.int8"),
        ({"dtype": "bf16"}, "dtype: expected None or one of .* got 'bf16'"),
    ):
        with pytest.raises(ValueError, match=message):
            AdapterBank(plain, **options)
    assert plain.dtype == torch.float32 and plain.device.type == "cpu"
    assert bank.names == ("good",)
    bank.unload("good")
    assert bank.names == ()
    with pytest.raises(ValueError, match="one of \\[\\], got 'good'"):
        bank.unload("good")


def test_bad_calls_are_refused_before_anything_runs(small):
    plain, good = small
    bank = AdapterBank(copy.deepcopy(plain))
    bank.load("good", good)
    shifted = {"num_virtual_tokens": 100, "position_offset": "prefix"}
    bank.add("shifted", with_adapter(plain, "sequence", 2, shifted))
    bank._shared.run = None  # nothing below runs
    ids, mask = texts_of((40, 20))
    for inputs, names, message in (
        ((ids, mask), ["good", "gone"], "adapter_names: expected '__base__' or one of .*'gone'"),
        ((ids, mask), ["good", ["good", "gone"]], "adapter_names: expected .*'gone'"),
        ((ids, mask), ["good"], "adapter_names: expected one for each of 2 texts"),
        ((ids, mask), "good", "adapter_names: expected one for each of 2 texts"),
        ((ids, mask), None, "adapter_names: expected one for each of 2 texts"),
        ((ids, mask), 7, "adapter_names: expected one for each of 2 texts, got 7"),
        ((ids, mask), ["good", None], "adapter_names: expected '__base__' or one of .* got None"),
        ((ids[0], None), ["good"] * 40, r"input_ids: expected a tensor \[B, T\] .* got \[40\]"),
        ((ids[:, :0], None), ["good"] * 2, r"input_ids: expected .* with tokens.* got \[2, 0\]"),
        ((ids.float(), mask), ["good"] * 2, "input_ids: expected .* of torch.float32"),
        ((None, mask), ["good"] * 2, "input_ids: expected these or inputs_embeds"),
        ((ids, mask[:1]), ["good"] * 2, "attention_mask: expected a tensor of 2 texts"),
        ((ids, mask), ["shifted", "good"], "at most 30 tokens in text 0, got 40"),
    ):
        with pytest.raises(ValueError, match=message):
            bank(*inputs, names)
    with pytest.raises(ValueError, match=r"inputs_embeds: expected a tensor \[B, T, C\]"):
        bank(inputs_embeds=torch.randn(2, 40), adapter_names=["good"] * 2)
    with pytest.raises(ValueError, match=r"name: expected one of \['good', 'shifted'\], got '__b"):
        bank.labels("__base__")
    with pytest.raises(ValueError, match="those of runs, got 'good'"):
        bank.predict(["a"], "good")


def test_a_short_text_may_stand_beside_a_long_one_behind_a_prefix_in_the_positions(small):
    plain, _ = small
    bank = AdapterBank(copy.deepcopy(plain))
    shifted = {"num_virtual_tokens": 100, "position_offset": "prefix"}
    model = with_adapter(plain, "sequence", 2, shifted)
    bank.add("shifted", model)
    ids, mask = texts_of((20, 120))
    result, _ = bank(ids, mask, ["shifted", "__base__"])
    torch.testing.assert_close(result, results_of(model, ids[:1, :20], (20,))[0])
    # Positions that are given are nobody's to count.
    positions = torch.arange(120).expand(2, -1)
    result, _ = bank(ids, mask, ["__base__", "shifted"], position_ids=positions)
    expected = model(input_ids=ids[1:], attention_mask=mask[1:], position_ids=positions[1:])
    torch.testing.assert_close(bank(ids, mask, ["shifted"] * 2, position_ids=positions)[1],
                               expected.logits[0])  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "option", "value", "epsilon"),
    [
        ("modernbert", "classifier_pooling", "mean", "norm_eps"),
        ("electra", "summary_activation", "tanh", "layer_norm_eps"),
        ("llama", "pad_token_id", 0, "rms_norm_eps"),
    ],
)
def test_a_head_is_configured_as_that_of_its_model(model_type, option, value, epsilon):
    if not is_served(model_type):
        pytest.skip(f"this version of transformers has no {model_type} that is served")
    plain = tiny_model(model_type, "bare", **SIZES)
    plain.config.return_dict = False  # which the bank does not follow
    head = "choice" if option.startswith("summary") else "sequence"
    model = with_adapter(plain, head, 2, {}, **{option: value})
    bank = AdapterBank(plain)
    bank.add("one", model)
    ids, mask = texts_of((9, 9))
    torch.testing.assert_close(bank(ids, mask, ["one"] * 2), results_of(model, ids, (9, 9)))
    other = with_adapter(plain, head, 2, {}, **{epsilon: 0.01})
    with pytest.raises(ValueError, match=f"model against bank: {epsilon} 0.01"):
        bank.add("other", other)


@pytest.mark.parametrize("fields", [
    {"modules_to_save": ("embeddings.word_embeddings",)}, {"low_rank": 2}, "rows",
])  # fmt: skip
def test_adapters_run_in_a_narrower_encoder_and_are_saved_as_they_were(fields, tmp_path):
    plain, (ids, mask) = tiny_model("bert", "bare", **SIZES), texts_of((9, 4))
    model = with_adapter(plain, "token", 3, {} if fields == "rows" else fields)
    if fields == "rows":
        model = copy.deepcopy(ptv2_fast.detach(model))
        model.resize_token_embeddings(62)
        ptv2_fast.attach(model, PTuningV2Config())
        require_attachment(model).base_vocabulary_size = 60
    save_adapter(model, tmp_path / "wide")
    bank = AdapterBank(copy.deepcopy(plain), dtype=torch.bfloat16)
    bank.load("one", tmp_path / "wide")
    results = bank(ids, mask, ["one", "__base__"])
    assert all(result.isfinite().all() for result in results)
    bank.save("one", tmp_path / "again")
    before, after = (
        load_file(tmp_path / name / "ptv2_adapter.safetensors") for name in ("wide", "again")
    )
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=2**-8, atol=0.0)  # bfloat16's rounding


class TwoReadings(BertForSequenceClassification):
    """A user's own: it reads each text twice, and holds a number that no file has."""

    def __init__(self, config, factor: float) -> None:
        super().__init__(config)
        self.register_buffer("factor", torch.tensor(factor), persistent=False)

    def forward(self, input_ids, attention_mask=None):
        """The logits of both."""
        states = [
            self.bert(ids, attention_mask, output_hidden_states=True).hidden_states[1]
            for ids in (input_ids, input_ids.flip(1))
        ]
        logits = self.classifier(sum(states).mean(dim=1)) * self.factor
        return SequenceClassifierOutput(logits=logits)


def test_a_model_of_a_users_class_runs_as_it_is(small):
    plain, good = small
    model = TwoReadings(tiny_config("bert", num_labels=3, **SIZES), 2.5).eval()
    model.bert.load_state_dict(plain.state_dict())
    ptv2_fast.attach(model, PTuningV2Config(num_virtual_tokens=4))
    torch.nn.init.normal_(model.prefix_encoder.embedding.weight)
    bank = AdapterBank(copy.deepcopy(plain))
    bank.load("good", good)
    bank.add("own", model)
    ids, mask = texts_of((9, 9))
    with torch.no_grad():
        expected = results_of(model, ids, (9, 9))[1]
        torch.testing.assert_close(bank(ids, mask, ["good", "own"])[1], expected)
    own = {id(parameter) for parameter in bank._plain.parameters()}
    shared = [id(p) in own for p in bank._members["own"].model.bert.encoder.parameters()]
    assert all(shared)


def test_the_end_of_the_last_trained_adapter_ends_dropout(small):
    plain = tiny_model("bert", "bare", **SIZES, **DROPOUT)
    bank = AdapterBank(plain)
    for name in ("first", "second"):
        bank.add(name, with_adapter(plain, "token", 2, {}))
    ids, mask = texts_of((9, 4))
    with torch.no_grad():
        expected = bank(ids, mask, ["second"] * 2)
    bank.train_mode(["first"])
    assert not torch.equal(bank(ids, mask, ["second"] * 2)[0], expected[0])
    bank.unload("first")
    torch.testing.assert_close(bank(ids, mask, ["second"] * 2), expected)


def test_adapters_come_and_go_while_forwards_run(small):
    plain, good = small
    bank = AdapterBank(copy.deepcopy(plain))
    bank.load("good", good)
    ids, mask = texts_of((9, 4))
    with torch.no_grad():
        expected = bank(ids, mask, ["good", "__base__"])
    errors: list[BaseException] = []

    def forwards() -> None:
        try:
            for _ in range(15):
                with torch.no_grad():
                    results = bank(ids, mask, ["good", "__base__"])
                assert all(map(torch.equal, results, expected))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=forwards) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(5):
        bank.load(f"other{number}", good)
        bank.unload(f"other{number}")
    for thread in threads:
        thread.join()
    assert not errors and bank.names == ("good",)


def leaves(value) -> list:
    """What nested lists and dictionaries hold, with the names in dictionaries."""
    if isinstance(value, dict):
        return [leaf for name, part in value.items() for leaf in (name, *leaves(part))]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, list) else [value]


def about(value) -> list:
    return [pytest.approx(v, rel=1e-4) if isinstance(v, float) else v for v in leaves(value)]


def test_predictions_of_pooled_runs_are_those_of_each_run(tmp_path):
    model, file = save_tiny_model(tmp_path / "model"), tmp_path / "model" / "tokenizer_config.json"
    # As no row of a batch of several adapters may be padded.
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": "left"}))
    squad = write_squad(tmp_path / "squad.json", [question(number) for number in range(4)])
    choices = [
        {"text": "Anna loves it.", "choices": ["It was good.", "bad"], "label": n % 2}
        for n in range(4)
    ]
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, choices)))
    film = write_reviews(tmp_path / "film.csv", 8)
    runs = {
        "tags": {"task": "token-classification", "train_file": write_conll(tmp_path / "t.txt", 8)},
        "film": {"task": "text-classification", "train_file": film, "depth": "2"},
        "answers": {"task": "question-answering", "train_file": squad, "doc_stride": 4},
        "choices": {"task": "multiple-choice", "train_file": str(tmp_path / "choices.jsonl")},
    }
    bank = AdapterBank(AutoModel.from_pretrained(model))
    for name, values in runs.items():
        common = {"model": model, "num_virtual_tokens": 4, "max_steps": 1, "progress": False}
        train(prepare(RunConfig.from_dict({**common, **values}), tmp_path / name))
        bank.load(name, tmp_path / name)
    assert bank.labels("tags") == ["B-LOC", "B-PER", "O"] and bank.labels("answers") is None
    assert len(bank._tokenizers) == 1
    texts = ["Anna lives in Oslo .", "the film was good and bad", "in\tAnna lives in Oslo.",
             "Bob sleeps.\tbad\tThe film was good."]  # fmt: skip
    asked = [["tags", "film"], "film", "answers", "choices"]
    alone = {name: load_run(tmp_path / name) for name in runs}
    expected = [
        [predict_texts(alone[name], [text]) for name in ([n] if isinstance(n, str) else n)]
        for text, n in zip(texts, asked, strict=True)
    ]
    found = bank.predict(texts, asked, batch_size=3)
    assert leaves(found) == about(expected)
    assert leaves(bank.predict(texts[:2], "film")) == about([found[0][1], found[1]])
