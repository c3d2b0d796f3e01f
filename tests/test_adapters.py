"""Adapters: what is written, the bit-exact round trip, and one clear error for each bad input."""

import json
import math

import numpy
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
)

import ptv2_fast
from ptv2_fast import PTuningV2Config
from ptv2_fast.files import NO_MODEL
from tests.adapter_files import (
    FILES,
    HUGE,
    assert_refused,
    attached,
    edit_config,
    edit_tensors,
    plain_twin,
)
from tests.models import (
    make_batch,
    one_thread,  # noqa: F401
    tiny_config,
    tiny_model,
)

ALL_FILES = sorted([*FILES, "config.json"])


@pytest.fixture
def saved(tmp_path):
    """A saved adapter and the model it came from."""
    model = attached(overrides={"id2label": {0: "O", 1: "PER", 2: "LOC"}})
    ptv2_fast.save_adapter(model, tmp_path)
    return tmp_path, model


def test_only_the_trained_tensors_are_written(saved):
    directory, _ = saved
    assert sorted(path.name for path in directory.iterdir()) == ALL_FILES
    assert sorted(load_file(directory / FILES[1])) == [
        "classifier.bias",
        "classifier.weight",
        "prefix_encoder.embedding.weight",
    ]
    assert (directory / FILES[1]).stat().st_size < 4 * (5 * 2 * 3 * 16 + 4 * 16) + 1000
    description = json.loads((directory / FILES[0]).read_text())
    assert description["ptv2_format"] == 1 and "peft_type" not in description
    assert description["id2label"] == {"0": "O", "1": "PER", "2": "LOC"}
    assert description["max_length"] == 40 and description["model_type"] == "bert"
    assert description["torch_version"] == torch.__version__
    assert description["prefix_config"]["num_virtual_tokens"] == 5


@pytest.mark.parametrize(
    "fields",
    [
        {"prefix_projection": True, "encoder_hidden_size": 12, "prefix_gate": True},
        {"layers": [0, 2], "position_offset": "prefix", "prefix_dropout": 0.1},
        {"modules_to_save": ["LayerNorm"], "init": "tokens"},
    ],
)
def test_configuration_mlp_and_chosen_modules_survive(fields, tmp_path):
    model = attached(**fields)
    ptv2_fast.save_adapter(model, tmp_path)
    twin = ptv2_fast.load_adapter(plain_twin(model), tmp_path, is_trainable=True)
    batch = make_batch()
    assert torch.equal(twin(**batch).logits, model(**batch).logits)
    trainable = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (model, twin)]
    assert trainable[0] == trainable[1]
    ptv2_fast.save_adapter(twin, tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_labels_come_along_and_inference_is_the_default(saved):
    directory, model = saved
    twin = plain_twin(model, id2label={0: "a", 1: "b", 2: "c"}).train()
    ptv2_fast.load_adapter(twin, directory)
    assert twin.config.id2label == {0: "O", 1: "PER", 2: "LOC"}
    assert twin.config.label2id == {"O": 0, "PER": 1, "LOC": 2}
    assert not twin.training and ptv2_fast.get_nb_trainable_parameters(twin)[0] == 0


def test_labels_that_are_numbers_come_back_as_text(tmp_path):
    model, numbers = attached(), numpy.array([7, 8, 9])
    # Some versions of transformers refuse them where they are set.
    vars(model.config)["id2label"] = dict(zip(numbers - 7, numbers, strict=True))
    ptv2_fast.save_adapter(model, tmp_path)
    twin = ptv2_fast.load_adapter(plain_twin(attached()), tmp_path)
    assert twin.config.id2label == {0: "7", 1: "8", 2: "9"}


def test_loading_into_an_attached_model_keeps_it_trainable(saved):
    directory, model = saved
    twin = attached().train()
    ptv2_fast.load_adapter(twin, directory)
    assert torch.equal(twin.classifier.weight, model.classifier.weight)
    assert twin.training and twin.prefix_encoder.embedding.weight.requires_grad


def test_a_bfloat16_model_round_trips(tmp_path):
    model = attached().to(torch.bfloat16)
    ptv2_fast.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / FILES[1])
    assert tensors["prefix_encoder.embedding.weight"].dtype == torch.float32
    twin = ptv2_fast.load_adapter(plain_twin(model).to(torch.bfloat16), tmp_path)
    batch = make_batch()
    assert torch.equal(twin(**batch).logits, model(**batch).logits)


def test_a_given_state_dict_is_honoured(tmp_path):
    model = attached()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    ptv2_fast.save_adapter(model, tmp_path / "a", state_dict=zeros)
    model.save_pretrained(tmp_path / "b", state_dict=zeros)
    for path in (tmp_path / "a" / FILES[1], tmp_path / "b" / "model.safetensors"):
        assert not any(tensor.any() for tensor in load_file(path).values())
    del zeros["classifier.bias"]
    with pytest.raises(ValueError, match=r"state_dict: .* none for \['classifier.bias'\]"):
        ptv2_fast.save_adapter(model, tmp_path, state_dict=zeros)


def test_overwriting_leaves_no_temporary_file_and_a_failure_keeps_the_old_adapter(
    saved, monkeypatch
):
    directory, model = saved
    ptv2_fast.save_adapter(model, directory)
    before = [(directory / name).read_bytes() for name in FILES]

    def fail(*unused, **also_unused):
        raise OSError("disk full")

    monkeypatch.setattr("ptv2_fast.encoders.adapter_files.os.replace", fail)
    with torch.no_grad():
        model.classifier.weight.zero_()
    with pytest.raises(OSError, match="disk full"):
        ptv2_fast.save_adapter(model, directory)
    assert sorted(path.name for path in directory.iterdir()) == ALL_FILES
    assert [(directory / name).read_bytes() for name in FILES] == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_labels": 4}, "num_labels 3 against 4"),
        ({"hidden_size": 32}, "hidden_size 16 against 32"),
        ({"num_hidden_layers": 2}, "num_hidden_layers 3 against 2"),
        ({"num_attention_heads": 1}, "num_attention_heads 2 against 1"),
        (
            {"num_hidden_layers": 2, "hidden_size": 32},
            "num_hidden_layers 3 against 2, hidden_size 16 against 32",
        ),
    ],
)
def test_an_adapter_of_another_size_names_every_difference(saved, overrides, message):
    assert_refused(tiny_model("bert", "token", **overrides), saved[0], message)


def test_an_adapter_of_another_family_or_head_is_named(saved):
    directory, _ = saved
    assert_refused(tiny_model("roberta", "token"), directory, "model_type 'bert' against 'roberta'")
    message = "a BertForTokenClassification.* class BertForTokenClassification against BertForSequ"
    assert_refused(tiny_model("bert", "sequence"), directory, message)


def test_an_attached_model_of_another_prefix_is_named(saved):
    directory, _ = saved
    other = attached(num_virtual_tokens=6, prefix_projection=True)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    message = "num_virtual_tokens 5 against 6, prefix_projection False against True"
    with pytest.raises(ValueError, match=message):
        ptv2_fast.load_adapter(other, directory)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


PREFIX_NAME = "prefix_encoder.embedding.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / FILES[0]).unlink(), "expected an adapter with ptv2_config.json"),
        (lambda d: (d / FILES[1]).unlink(), "got no such file"),
        (lambda d: (d / FILES[0]).write_text('{"ptv2_'), "not valid JSON"),
        (lambda d: edit_config(d, "ptv2_format"), r"adapter of ptv2-fast \(key 'ptv2_format'\)"),
        (lambda d: edit_config(d, ptv2_format=2), "expected ptv2_format 1, got 2"),
        (lambda d: edit_config(d, "num_labels"), r"expected the keys \['num_labels'\]"),
        (lambda d: edit_config(d, prefix_config={"P": 1}), r"unknown keys \['P'\]"),
        (lambda d: edit_config(d, id2label=None), "id2label: expected an object, got None"),
        (lambda d: edit_tensors(d, **{PREFIX_NAME: None}), rf"missing \['{PREFIX_NAME}'\]"),
        (lambda d: edit_tensors(d, surplus=torch.ones(1)), r"unexpected \['surplus'\]"),
        (
            lambda d: edit_tensors(d, **{PREFIX_NAME: torch.ones(5, 90)}),
            rf"expected {PREFIX_NAME} of shape \[5, 96\], got \[5, 90\]",
        ),
        (
            lambda d: (d / FILES[1]).write_bytes((d / FILES[1]).read_bytes()[:-100]),
            "corrupt or truncated safetensors",
        ),
        (lambda d: (d / FILES[1]).write_bytes(b""), "corrupt or truncated safetensors"),
        (lambda d: (d / FILES[1]).write_bytes(b"\xff" * 99), "corrupt or truncated safetensors"),
    ],
)
def test_a_damaged_adapter_is_refused_and_the_model_stays_plain(saved, damage, message):
    directory, model = saved
    damage(directory)
    assert_refused(plain_twin(model), directory, message)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *(
            (lambda d, f=field, v=value: edit_prefix(d, **{f: v}), rf"got \['{field}'\]")
            for field, value in {
                "backbone": "hook",
                "recompute": "block",
                "memory_budget": 1,
                "backbone_dtype": "bf16",
                "strict": True,
            }.items()
        ),
        (lambda d: edit_prefix(d, num_virtual_tokens=HUGE), r"shape \[1000000000000, 96\], got"),
        (
            lambda d: (
                edit_prefix(d, num_virtual_tokens=HUGE),
                edit_tensors(d, **{PREFIX_NAME: None}),
            ),
            f"missing .'{PREFIX_NAME}'",
        ),
        (
            lambda d: edit_prefix(d, prefix_projection=True, encoder_hidden_size=HUGE),
            "missing .'prefix_encoder.projection.0.bias'",
        ),
        (lambda d: edit_prefix(d, low_rank=HUGE), r"updates of low_rank 1000000000000, got \[\]"),
        (lambda d: edit_config(d, weights="../" + FILES[1]), "weights: expected a plain name"),
        (lambda d: edit_config(d, id2label={"a": "x", "0": "y", "1": "z"}), "id2label: expected a"),
        (lambda d: edit_config(d, id2label={"0": "a"}), "id2label: expected a label for each"),
        (lambda d: edit_config(d, id2label={"0": 1, "1": [], "2": "z"}), "expected text as labels"),
        (lambda d: edit_config(d, problem_type="__class__"), "problem_type: expected one of"),
        (lambda d: (d / FILES[0]).write_text("[" * 100_000), "not valid JSON"),
        (lambda d: edit_tensors(d, **{PREFIX_NAME: numbers(math.nan)}), "finite numbers in prefix"),
        (lambda d: edit_tensors(d, **{PREFIX_NAME: numbers(math.inf)}), "finite numbers in prefix"),
        (
            lambda d: edit_tensors(d, **{PREFIX_NAME: numbers(1.0).half()}),
            f"{PREFIX_NAME} of dtype torch.float32, as in the model, got torch.float16",
        ),
        (
            lambda d: edit_tensors(d, **{"classifier.bias": torch.zeros(3, dtype=torch.int64)}),
            "classifier.bias of dtype torch.float32, as in the model, got torch.int64",
        ),
    ],
)
def test_a_hostile_adapter_is_refused_before_anything_is_allocated(saved, damage, message):
    directory, model = saved
    twin = plain_twin(model)
    before = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    config, attributes = twin.config, set(vars(twin))
    damage(directory)
    assert_refused(twin, directory, message)
    assert twin.config is config and set(vars(twin)) == attributes
    assert all(parameter.requires_grad for parameter in twin.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in twin.state_dict().items())


def edit_prefix(directory, **changes) -> None:
    content = json.loads((directory / FILES[0]).read_text())
    edit_config(directory, prefix_config={**content["prefix_config"], **changes})


def numbers(last: float):
    """A prefix of the right shape."""
    tensor = torch.ones(5, 96)
    tensor[-1, -1] = last
    return tensor


@pytest.mark.parametrize(
    "fields",
    [
        {"prefix_gate": True},
        {"prefix_projection": True, "encoder_hidden_size": 12, "layers": [0, 2]},
    ],
)
def test_the_shapes_of_a_prefix_are_known_without_one(fields):
    config = PTuningV2Config(num_virtual_tokens=5, **fields)
    sizes = {"num_layers": 3, "num_heads": 2, "head_dim": 8}
    made = ptv2_fast.PrefixEncoder(config, **sizes).state_dict()
    assert config.tensor_shapes(**sizes) == {n: tuple(t.shape) for n, t in made.items()}


def test_a_double_model_round_trips(tmp_path):
    model = attached().double()
    ptv2_fast.save_adapter(model, tmp_path)
    twin = ptv2_fast.load_adapter(plain_twin(model).double(), tmp_path)
    assert torch.equal(twin.prefix_encoder.embedding.weight, model.prefix_encoder.embedding.weight)
    assert_refused(plain_twin(model), tmp_path, "got torch.float64")


def test_saving_a_plain_model_or_over_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected an attached model, got a plain Bert"):
        ptv2_fast.save_adapter(tiny_model(), tmp_path)
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        ptv2_fast.save_adapter(attached(), tmp_path / "taken")


def test_heads_of_the_same_tensors_are_told_apart_by_their_class(tmp_path):
    """A regression on texts and a choice among them have one output behind the same pooler."""
    ptv2_fast.save_adapter(attached("bert", "sequence", {"num_labels": 1}), tmp_path)
    other = tiny_model("bert", "choice", num_labels=1)
    message = "class BertForSequenceClassification against BertForMultipleChoice.*another model"
    assert_refused(other, tmp_path, message)

    class Mine(type(tiny_model("bert", "sequence"))):
        """A user's own class has the head of the one it is of."""

    assert ptv2_fast.load_adapter(Mine(tiny_config(num_labels=1)), tmp_path)


def test_switching_between_tasks_says_what_holds(saved, tmp_path):
    directory, model = saved
    ptv2_fast.save_adapter(attached(overrides={"num_labels": 2}), tmp_path / "other")
    ptv2_fast.detach(model)
    message = "num_labels 2 against 3. An adapter holds the head of its task: .* load another model"
    assert_refused(model, tmp_path / "other", message)
    ptv2_fast.load_adapter(model, directory)


@pytest.mark.parametrize("with_peft", [True, False])
def test_transformers_and_peft_refuse_an_adapter_and_say_what_to_call(
    saved, with_peft, monkeypatch
):
    if not with_peft:
        for module in ("integrations.peft", "models.auto.auto_factory", "pipelines"):
            monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda: False)
    # As in a process that has not loaded this package.
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, NO_MODEL["model_type"])
    directory, model = saved
    model.save_pretrained(directory / "checkpoint")
    for path in map(str, (directory, directory / "checkpoint")):
        for opens in (
            lambda: AutoModel.from_pretrained(path),  # noqa: B023
            lambda: transformers.pipeline("token-classification", model=path),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=r"call ptv2_fast.load\(folder\)"):
                opens()
        with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
            peft.PeftModel.from_pretrained(tiny_model(), path)
        for loader in (AutoModel, type(model)):
            for config in ({}, {"config": tiny_config(num_labels=3)}):
                with pytest.raises((OSError, ValueError, RuntimeError)):
                    loader.from_pretrained(path, **config)


def test_the_config_of_a_model_in_the_folder_stays(tmp_path):
    model = attached()
    model.config.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    ptv2_fast.save_adapter(model, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    assert ptv2_fast.load_adapter(plain_twin(model), tmp_path)


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "model.safetensors"])
def test_a_folder_with_the_names_of_version_0_1_still_loads(tmp_path, weights):
    model, batch = attached(), make_batch()
    ptv2_fast.save_adapter(model, tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / FILES[0]).rename(tmp_path / "adapter_config.json")
    (tmp_path / FILES[1]).rename(tmp_path / weights)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**content, "weights": weights}))
    twin = ptv2_fast.load_adapter(plain_twin(model), tmp_path)
    assert torch.equal(twin(**batch).logits, model(**batch).logits)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert_refused(plain_twin(model), tmp_path, "expected an adapter of ptv2-fast")


def test_a_checkpoint_loads_as_an_adapter_and_as_a_state_dict(tmp_path):
    model, batch = attached(), make_batch()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "model.safetensors", FILES[0]
    ]  # fmt: skip
    twin = ptv2_fast.load_adapter(plain_twin(model), tmp_path)
    assert torch.equal(twin(**batch).logits, model(**batch).logits)
    with torch.no_grad():
        twin.prefix_encoder.embedding.weight.zero_()
    result = twin.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert set(result.missing_keys) == twin._keys_to_ignore_on_save
    assert not result.unexpected_keys
    assert torch.equal(twin(**batch).logits, model(**batch).logits)
