"""Adapters of other packages in and out: the same logits, and one clear error for a bad file."""

import copy
import json

import peft
import pytest
import torch
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor, nn

import ptv2_fast
from bench.models import cache_argument
from ptv2_fast import PTuningV2Config
from ptv2_fast.adapters import export_peft, fold_adapter, import_adapter
from tests.adapter_files import FILES, attached, edit_tensors, plain_twin
from tests.models import (
    MODEL_TYPES,
    MODELS,
    P,
    assert_close_to_model,
    assert_close_to_plain,
    concatenated_forward,
    make_batch,
    one_thread,  # noqa: F401
    outputs_of,
    plain_results,
    real_tokens,
    tiny_model,
)
from tests.peft_models import TASKS, peft_model

# The heads of some; of the others the first that transformers has.
ALL_HEADS = ("bert", "roberta", "electra", "qwen2")
WIDE = {"gemma3_text": 64, "mistral": 64, "qwen2": 64}  # windows that hold prefix and text


def made_model(model_type: str, head: str = "sequence"):
    wide = {"sliding_window": WIDE[model_type]} if model_type in WIDE else {}
    return tiny_model(model_type, head, **wide)


def peft_serves(model_type: str) -> bool:
    # PEFT 0.18 takes the layers of Gemma 3 for its keys and values.
    if model_type == "gemma3_text" and Version(peft.__version__) < Version("0.21"):
        return False
    return cache_argument(tiny_model(model_type, "bare")) is not None


SERVED = [name for name in MODEL_TYPES if peft_serves(name)]
CASES = [
    (name, head)
    for name, head in MODELS
    if name in SERVED and head in TASKS and (name in ALL_HEADS or head == "sequence")
]


def let_peft_run(model) -> None:
    """Give the cache the name by which PEFT looks for it in the signatures of a copy.

    Versions of transformers that call it `cache` still take `past_key_values`.
    """
    for module in (model.base_model, getattr(model.base_model, "base_model", None)):
        if isinstance(module, nn.Module) and cache_argument(module) == "cache":
            module.forward = _renamed(module.forward)


def _renamed(forward):
    def forward_with_past(*args, past_key_values=None, **kwargs):
        return forward(*args, past_key_values=past_key_values, **kwargs)

    return forward_with_past


def results_of_peft(head: str, batch: dict[str, Tensor]):
    def run(model) -> tuple[Tensor]:
        let_peft_run(model)
        with torch.no_grad():
            return (real_outputs(head, model(**batch), batch),)

    return run


def real_outputs(head: str, output, batch: dict[str, Tensor]) -> Tensor:
    """The result of a head, 0 at pads, where some models have NaN."""
    return outputs_of(head, output).where(torch.as_tensor(real_tokens(head, batch)) != 0, 0)


@torch.no_grad()
def our_results(model, head: str, batch: dict[str, Tensor]) -> tuple[Tensor]:
    return (real_outputs(head, model(**batch), batch),)


@pytest.mark.parametrize(
    ("model_type", "head", "trained"),
    [*((*case, None) for case in CASES), ("bert", "sequence", ["pooler", "output.LayerNorm"])],
)
@pytest.mark.filterwarnings("ignore:the model has windows")
def test_an_adapter_of_peft_has_its_logits_there_and_back(model_type, head, trained, tmp_path):
    plain, batch = made_model(model_type, head), make_batch(head)
    original = peft_model(plain, head, modules_to_save=trained)
    original.save_pretrained(tmp_path / "peft")
    ours = import_adapter(copy.deepcopy(plain), tmp_path / "peft")
    expected = plain_results(results_of_peft(head, batch), original)
    # A pooler and a head are of an adapter anyway.
    assert ours.prefix_encoder.config.modules_to_save == (
        ("output.LayerNorm",) if trained else None
    )
    assert_close_to_plain(our_results(ours, head, batch), expected)
    export_peft(ours, tmp_path / "back")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "back")
    assert_close_to_plain(results_of_peft(head, batch)(back.eval()), expected)


@pytest.mark.parametrize(("model_type", "head"), [("bert", "sequence"), ("roberta", "bare")])
def test_a_state_dict_of_a_peft_model_keeps_its_projection(model_type, head, tmp_path):
    plain, batch = tiny_model(model_type, head), make_batch(head)
    original = peft_model(plain, head, prefix_projection=True, encoder_hidden_size=12)
    original.save_pretrained(tmp_path)
    save_file(_plain_tensors(original), tmp_path / "adapter_model.safetensors")
    ours = import_adapter(copy.deepcopy(plain), tmp_path, is_trainable=True).eval()
    assert ours.prefix_encoder.projection[0].weight.requires_grad
    expected = plain_results(results_of_peft(head, batch), original)
    assert_close_to_plain(our_results(ours, head, batch), expected)


def _plain_tensors(model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# What its authors' code runs; position_biased_input=False leaves DeBERTa without a table.
ORIGINALS = [
    ("bert", "sequence", {}),
    ("bert", "question", {}),
    ("bert", "choice", {}),
    ("roberta", "token", {}),
    ("roberta", "choice", {}),
    ("deberta", "sequence", {}),
    ("deberta", "token", {"position_biased_input": False}),
    ("deberta-v2", "token", {}),
]


class OriginalPrefix(nn.Module):
    """The authors' prefix encoder, with the names of its tensors."""

    def __init__(self, plain, projects: bool) -> None:
        super().__init__()
        self.sizes = plain.config.num_hidden_layers, 2, plain.config.num_attention_heads
        hidden = plain.config.hidden_size
        width = 2 * plain.config.num_hidden_layers * hidden
        self.embedding = nn.Embedding(P, hidden if projects else width)
        if projects:
            self.trans = nn.Sequential(nn.Linear(hidden, 12), nn.Tanh(), nn.Linear(12, width))

    def forward(self) -> Tensor:
        rows = self.embedding.weight
        rows = self.trans(rows) if hasattr(self, "trans") else rows
        return rows.unflatten(1, (*self.sizes, -1)).permute(1, 2, 3, 0, 4)


@pytest.mark.parametrize("projects", [False, True])
@pytest.mark.parametrize(("model_type", "head", "overrides"), ORIGINALS)
def test_a_state_dict_of_the_authors_code_has_its_logits(
    model_type, head, overrides, projects, tmp_path
):
    plain, batch = tiny_model(model_type, head, **overrides), make_batch(head)
    prefix = OriginalPrefix(plain, projects)
    shifted = plain.config.to_dict().get("position_biased_input", True)
    tensors = {f"prefix_encoder.{name}": t for name, t in _plain_tensors(prefix).items()}
    torch.save(_plain_tensors(plain) | tensors, tmp_path / "pytorch_model.bin")
    kind = type(plain).__name__.replace("For", "PrefixFor")
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}} if head != "question" else {}
    config = {"architectures": [kind], "model_type": model_type, **labels}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="safetensors file, got a pickle"):
        import_adapter(copy.deepcopy(plain), tmp_path)

    def run(plain, prefix) -> tuple[Tensor]:
        with torch.no_grad():
            output = concatenated_forward(plain, prefix(), batch, shifted)
        return (real_outputs(head, output, batch),)

    ours = import_adapter(copy.deepcopy(plain), tmp_path, allow_pickle=True)
    assert_close_to_model(our_results(ours, head, batch), run, plain, prefix)
    if labels:
        assert ours.config.id2label == {0: "a", 1: "b", 2: "c"}


class OriginalRoberta(nn.Module):
    """The authors' RoBERTa for texts: the classifier reads the pooler."""

    def __init__(self) -> None:
        super().__init__()
        self.roberta = tiny_model("roberta", "bare")
        self.classifier = nn.Linear(16, 3)
        self.prefix_encoder = OriginalPrefix(self.roberta, False)


def test_the_authors_roberta_for_texts_becomes_that_of_transformers(tmp_path):
    original, batch = OriginalRoberta(), make_batch()
    save_file(_plain_tensors(original), tmp_path / "model.safetensors")
    plain = tiny_model("roberta")
    plain.roberta.load_state_dict(original.roberta.state_dict(), strict=False)

    def run(original) -> tuple[Tensor]:
        prefix = original.prefix_encoder()
        with torch.no_grad():
            states = concatenated_forward(original.roberta, prefix, batch, True).pooler_output
            return (original.classifier(states),)

    ours = import_adapter(plain, tmp_path / "model.safetensors")
    assert_close_to_model(our_results(ours, "sequence", batch), run, original)


def test_a_prefix_of_chatglm_leaves_the_positions_as_they_are(tmp_path):
    plain, batch = tiny_model("bert", "bare"), make_batch()
    prefix = OriginalPrefix(plain, True)
    tensors = {f"transformer.prefix_encoder.{n}": t for n, t in _plain_tensors(prefix).items()}
    save_file(tensors, tmp_path / "model.safetensors")

    def run(plain, prefix) -> tuple[Tensor]:
        with torch.no_grad():
            output = concatenated_forward(plain, prefix(), batch, False)
        return (real_outputs("bare", output, batch),)

    ours = import_adapter(copy.deepcopy(plain), tmp_path)
    assert_close_to_model(our_results(ours, "bare", batch), run, plain, prefix)


def write_adapter_hub(folder, plain, *, flat: bool, pooled: bool, **options) -> OriginalPrefix:
    """A prefix and a head with the names of `adapters`; returns what it computes."""
    prefix = OriginalPrefix(plain, not flat)
    stem = f"{plain.base_model_prefix}.prefix_tuning.prefix_tunings.news.self_prefix"
    if flat:
        tensors = {f"{stem}.control_trans": prefix.embedding.weight.detach().flatten()}
    else:
        tensors = {f"{stem}.wte.weight": prefix.embedding.weight.detach().clone()}
        for name, tensor in _plain_tensors(prefix.trans).items():
            tensors[f"{stem}.control_trans.{name}"] = tensor
    folder.mkdir()
    save_file(tensors, folder / "adapter.safetensors")
    config = {"architecture": "prefix_tuning", "flat": flat, "prefix_length": P, **options}
    described = {"config": config, "model_type": plain.config.model_type, "hidden_size": 16}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    own = plain.state_dict()
    base = f"{plain.base_model_prefix}.pooler.dense"
    names = {1: "classifier", 4: ""}
    if pooled:
        of_head = "classifier.dense.weight" in own
        names = {1: "classifier.dense", 4: "classifier.out_proj"} if of_head else {
            1: base, 4: "classifier"
        }  # fmt: skip
    head = {
        f"heads.news.{number}.{kind}": own[f"{name}.{kind}"].clone()
        for number, name in names.items()
        for kind in ("weight", "bias")
        if name
    }
    save_file(head, folder / "model_head.safetensors")
    described = {
        "head_type": "classification" if pooled else "tagging",
        "layers": 2 if pooled else 1,
        "activation_function": "tanh",
        "use_pooler": False,
        "label2id": {"a": 0, "b": 1, "c": 2},
    }
    (folder / "head_config.json").write_text(json.dumps({"config": described}))
    return prefix


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("model_type", "head"), [("bert", "sequence"), ("roberta", "sequence"), ("distilbert", "token")]
)
def test_an_adapter_of_adapters_has_its_logits(model_type, head, flat, tmp_path):
    plain, batch = tiny_model(model_type, head), make_batch(head)
    folder = tmp_path / "news"
    prefix = write_adapter_hub(folder, plain, flat=flat, pooled=head == "sequence")

    def run(plain, prefix) -> tuple[Tensor]:
        with torch.no_grad():
            output = concatenated_forward(plain, prefix(), batch, False)
        return (real_outputs(head, output, batch),)

    twin = copy.deepcopy(plain)
    for name, parameter in twin.named_parameters():
        if name.startswith("classifier") or ".pooler." in name:
            parameter.data.zero_()
    ours = import_adapter(twin, folder)
    assert_close_to_model(our_results(ours, head, batch), run, plain, prefix)
    assert ours.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_leaving_layers_out_is_a_choice_of_layers(tmp_path):
    plain, folder = tiny_model("bert", "bare"), tmp_path / "news"
    write_adapter_hub(folder, tiny_model("bert", num_hidden_layers=2), flat=True, pooled=True,
                      leave_out=[1])  # fmt: skip
    for name in ("head_config.json", "model_head.safetensors"):
        (folder / name).unlink()
    assert import_adapter(plain, folder).prefix_encoder.layers == (0, 2)


def test_folding_a_projection_changes_no_bit(tmp_path):
    model, batch = attached(prefix_projection=True, encoder_hidden_size=12), make_batch()
    ptv2_fast.save_adapter(model, tmp_path / "whole")
    fold_adapter(tmp_path / "whole", tmp_path / "folded")
    twin = ptv2_fast.load_adapter(plain_twin(model), tmp_path / "folded")
    assert twin.prefix_encoder.projection is None
    assert torch.equal(twin(**batch).logits, model.eval()(**batch).logits)
    fold_adapter(tmp_path / "folded", tmp_path / "again")
    for name in FILES:
        first, second = (tmp_path / folder / name for folder in ("folded", "again"))
        assert first.read_bytes() == second.read_bytes()
    for bias, message in (
        (torch.zeros(3), "expected a projection of the shapes"),
        (torch.zeros(96).half(), "2.bias of dtype torch.float32"),
        (torch.ones(96) / 0, "finite numbers in prefix_encoder.projection.2.bias"),
    ):
        edit_tensors(tmp_path / "whole", **{"prefix_encoder.projection.2.bias": bias})
        with pytest.raises(ValueError, match=message):
            fold_adapter(tmp_path / "whole", tmp_path / "bad")
    for name, tensor, message in (
        ("prefix_encoder.embedding.weight", torch.zeros(P + 1, 96), f"a table of {P} virtual"),
        ("classifier.bias", torch.ones(3) / 0, "finite numbers in classifier.bias"),
    ):
        edit_tensors(tmp_path / "folded", **{name: tensor})
        with pytest.raises(ValueError, match=message):
            fold_adapter(tmp_path / "folded", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(("model_type", "head"), [("bert", "sequence"), ("distilbert", "token")])
def test_low_rank_updates_are_a_lora_of_peft(model_type, head, tmp_path):
    plain, batch = tiny_model(model_type, head), make_batch(head)
    fields = {"num_virtual_tokens": 0, "low_rank": 2, "low_rank_alpha": 3.0, "layers": [1, 2]}
    model = copy.deepcopy(plain)
    ptv2_fast.attach(model, PTuningV2Config(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.eval()
    export_peft(model, tmp_path)
    original = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    expected = plain_results(results_of_peft(head, batch), original)
    assert_close_to_plain(our_results(model, head, batch), expected)


@pytest.mark.parametrize(
    ("model_type", "head", "fields", "message"),
    [
        ("bert", "token", {}, "position_offset: expected 'prefix' for PEFT"),
        ("bert", "choice", {"position_offset": "prefix"}, "one of the heads"),
        ("bert", "token", {"position_offset": "prefix", "layers": [0]}, "a prefix in all layers"),
        ("bert", "token", {"prefix_gate": True}, "prefix_gate: expected none"),
        ("bert", "token", {"train_norms": True}, "train_norms: expected none"),
        ("bert", "token", {"low_rank": 2}, "updates or a prefix for PEFT, got both"),
        ("albert", "token", {"position_offset": "prefix"}, "takes past keys and values"),
        ("esm", "token", {}, "takes past keys and values"),
    ],
)
def test_what_peft_cannot_hold_is_not_exported(model_type, head, fields, message, tmp_path):
    model = attached(model_type, head, **fields)
    with pytest.raises(ValueError, match=message):
        export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_windows_are_said_to_hide_the_prefix_of_peft(tmp_path):
    plain = tiny_model("mistral", "token")
    peft_model(plain, "token").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="windows of 4 tokens"):
        import_adapter(plain, tmp_path)
