"""A bank of adapters: each row of a mixed batch gives what its adapter gives alone."""

import copy
import json
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from ptv2_fast import AdapterBank, load_adapter, save_adapter
from ptv2_fast.frozen import engine
from ptv2_fast.training.models import load_run
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.run import train
from ptv2_fast.training.scoring import predict_texts
from tests.bank_adapters import SIZES, results_of, texts_of, with_adapter
from tests.models import (
    HEADS,
    assert_close_to_plain,
    auto_class,
    has_class,
    is_served,
    one_thread,  # noqa: F401
    plain_results,
    tiny_model,
)
from tests.squad_files import question, write_squad
from tests.tiny_run import save_tiny_model, write_conll, write_reviews

WHOLE = [name for name in ("bert", "roberta", "modernbert", "deberta-v2") if is_served(name)]
# Whose heads, or what their backbones hand to them, are each of another kind.
KINDS = ("albert", "electra", "glm2021", "llama", "t5", "xmod")
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


def test_what_is_changed_in_place_holds_in_the_next_batch(case):
    bank, name = bank_of(case, "frozen", ["inside", "norms"]), "inside"
    ids, mask = texts_of((9, 5, 7))
    with torch.no_grad():
        before = bank(ids, mask, [name, "norms", name])
        for parameter in bank.parameters_of(name):
            parameter.mul_(1.5)
        mixed = bank(ids, mask, [name, "norms", name])
        alone = bank(ids[::2], mask[::2], [name] * 2)
    torch.testing.assert_close(mixed[::2], alone)
    assert not mixed[0].allclose(before[0]) and mixed[1].equal(before[1])


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
