"""The adapters of a bank: which are refused, how they are kept, how they come and go."""

import contextlib
import copy
import json
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

import ptv2_fast
from ptv2_fast import AdapterBank, PTuningV2Config, save_adapter
from ptv2_fast.encoders.attaching import require_attachment
from tests.bank_adapters import SIZES, results_of, texts_of, with_adapter
from tests.models import DROPOUT, auto_class, is_served, one_thread, tiny_config, tiny_model  # noqa: F401


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
