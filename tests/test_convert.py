"""Adapters of other packages in and out: the same logits, and one clear error for a bad file."""

import copy
import json
import math
import shutil
import zipfile

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ptv2_fast
from bench.models import cache_argument
from ptv2_fast import PTuningV2Config
from ptv2_fast.adapters import export_peft, fold_adapter, import_adapter
from tests.adapter_files import FILES, HUGE, attached, edit_tensors, plain_twin
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

TASKS = {
    "sequence": "SEQ_CLS",
    "token": "TOKEN_CLS",
    "question": "QUESTION_ANS",
    "bare": "FEATURE_EXTRACTION",
}
# The heads of some; of the others the first that transformers has.
ALL_HEADS = ("bert", "roberta", "electra", "qwen2")
WIDE = {"gemma3_text": 64, "mistral": 64, "qwen2": 64}  # windows that hold prefix and text


def made_model(model_type: str, head: str = "sequence"):
    wide = {"sliding_window": WIDE[model_type]} if model_type in WIDE else {}
    return tiny_model(model_type, head, **wide)


def peft_serves(model_type: str) -> bool:
    return cache_argument(tiny_model(model_type, "bare")) is not None


SERVED = [name for name in MODEL_TYPES if peft_serves(name)]
CASES = [
    (name, head)
    for name, head in MODELS
    if name in SERVED and head in TASKS and (name in ALL_HEADS or head == "sequence")
]


def peft_model(plain, head: str, **fields):
    """A prefix of PEFT with a random head on a copy of a model."""
    config = peft.PrefixTuningConfig(task_type=TASKS[head], num_virtual_tokens=P, **fields)
    model = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


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


@pytest.mark.parametrize(("model_type", "head"), CASES)
@pytest.mark.filterwarnings("ignore:the model has windows")
def test_an_adapter_of_peft_has_its_logits_there_and_back(model_type, head, tmp_path):
    plain, batch = made_model(model_type, head), make_batch(head)
    original = peft_model(plain, head)
    original.save_pretrained(tmp_path / "peft")
    ours = import_adapter(copy.deepcopy(plain), tmp_path / "peft")
    expected = plain_results(results_of_peft(head, batch), original)
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
    edit_tensors(tmp_path / "whole", **{"prefix_encoder.projection.2.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="expected a projection of the shapes"):
        fold_adapter(tmp_path / "whole", tmp_path / "bad")


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
        ("eurobert", "token", {}, "takes past keys and values"),
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


@pytest.fixture(scope="module")
def of_peft(tmp_path_factory):
    """A folder that PEFT wrote."""
    folder = tmp_path_factory.mktemp("peft")
    peft_model(tiny_model("bert", "token"), "token").save_pretrained(folder)
    return folder


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def edit_json(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder, **changes) -> None:
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / WEIGHTS)


def write_long_header(path) -> None:
    with path.open("wb") as file:
        file.write((2**24).to_bytes(8, "little"))
        file.truncate(2**25)


def move_and_link(path) -> None:
    outside = path.parent.parent / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


def table(last: float = 1.0, rows: int = P) -> Tensor:
    numbers = torch.ones(rows, 96)
    numbers[-1, -1] = last
    return numbers


BIAS = "base_model.classifier.bias"
DAMAGE = {
    "another kind": (lambda d: edit_json(d / CONFIG, peft_type="LORA"), "expected 'PREFIX_TUNING'"),
    "no encoder's task": (lambda d: edit_json(d / CONFIG, task_type="CAUSAL_LM"), "task_type"),
    "a length of 10^12": (
        lambda d: edit_json(d / CONFIG, num_virtual_tokens=HUGE), r"\[1000000000000, 96\], as"
    ),
    "a length of text": (
        lambda d: edit_json(d / CONFIG, num_virtual_tokens="5"), "num_virtual_tokens: expected an"
    ),
    "other sizes": (
        lambda d: edit_json(d / CONFIG, num_layers=2, num_attention_heads=4),
        "num_layers 2 against 3, num_attention_heads 4 against 2",
    ),
    "no JSON": (lambda d: (d / CONFIG).write_text("[" * 100_000), "not valid JSON"),
    "neither of both": (lambda d: (d / CONFIG).write_text("{}"), "key 'peft_type'"),
    "truncated": (
        lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-9]), "truncated safetens"
    ),
    "empty": (lambda d: (d / WEIGHTS).write_bytes(b""), "truncated safetensors"),
    "a header of 16 MiB": (lambda d: write_long_header(d / WEIGHTS), "of at most 10000000 bytes"),
    "a link to tensors": (lambda d: move_and_link(d / WEIGHTS), "got a link to"),
    "a link to a config": (lambda d: move_and_link(d / CONFIG), "got a link to"),
    "none": (lambda d: (d / WEIGHTS).unlink(), "expected one of the files"),
    "a pickle": (lambda d: (d / WEIGHTS).rename(d / "adapter_model.bin"), "got a pickle"),
    "NaN": (
        lambda d: change_tensors(d, prompt_embeddings=table(math.nan)), "numbers in prompt_embedd"
    ),
    "infinite": (lambda d: change_tensors(d, **{BIAS: torch.ones(3) / 0}), f"numbers in {BIAS}"),
    "integers": (
        lambda d: change_tensors(d, prompt_embeddings=table().long()), "floating-point numbers in"
    ),
    "a longer table": (
        lambda d: change_tensors(d, prompt_embeddings=table(rows=6)), r"\[5, 96\].*got \[6, 96\]"
    ),
    "another head": (
        lambda d: change_tensors(d, **{BIAS: torch.ones(4)}), r"of shape \[3\].*got \[4\]"
    ),
    "no head": (lambda d: change_tensors(d, **{BIAS: None}), r"missing \['classifier.bias'\]"),
    "more": (lambda d: change_tensors(d, more=torch.ones(1)), r"unexpected \['more'\]"),
    "no table": (lambda d: change_tensors(d, prompt_embeddings=None), "a tensor prompt_embeddings"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_of_peft_is_refused(damage, of_peft, tmp_path):
    folder = shutil.copytree(of_peft, tmp_path / "copy")
    change, message = DAMAGE[damage]
    change(folder)
    assert_refused(tiny_model("bert", "token"), folder, message)


def assert_refused(model, source, message: str, **options) -> None:
    """One error of a readable length, and the model is as plain as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as raised:
        import_adapter(model, source, **options)
    assert len(str(raised.value)) < 900
    assert not hasattr(model, "prefix_encoder") and "save_pretrained" not in vars(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_adapter_of_another_model_is_refused(of_peft):
    assert_refused(tiny_model("albert", "token"), of_peft, "takes past keys and values")
    assert_refused(tiny_model("bert", "token", num_labels=2), of_peft, r"shape \[2\].*\[3\]")
    assert_refused(tiny_model("bert", "sequence"), of_peft, "'token', got a BertForSequenceClass")
    wide = tiny_model("bert", "token", hidden_size=32)
    assert_refused(wide, of_peft, "token_dim 16 against 32")


class Planted:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark) -> None:
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def compress(path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


NAME = "prefix_encoder.embedding.weight"
PICKLES = {
    "code": (lambda p: torch.save({NAME: Planted(p.parent / "mark")}, p), "as weights only"),
    "compressed": (lambda p: (torch.save({NAME: table()}, p), compress(p)), "compressed entries"),
    "old": (
        lambda p: torch.save({NAME: table()}, p, _use_new_zipfile_serialization=False), "1.6"
    ),
    "text": (lambda p: p.write_text("text"), "1.6"),
    "a list": (lambda p: torch.save([table()], p), "got a list"),
    "repeated numbers": (
        lambda p: torch.save({NAME: torch.zeros(1).expand(HUGE, 96)}, p), f"one tensor {NAME}"
    ),
    "two of them": (
        lambda p: torch.save({NAME: table(), f"a.{NAME}": table()}, p), "prefix encoders of"
    ),
    "a vector": (lambda p: torch.save({NAME: torch.ones(96)}, p), r"the shape \[96\]"),
    "half a projection": (
        lambda p: torch.save({NAME: table(), "prefix_encoder.trans.0.weight": table()}, p),
        "missing .'projection.0.bias'",
    ),
    "other weights": (
        lambda p: torch.save({NAME: table(), "embeddings.LayerNorm.bias": torch.ones(16)}, p),
        "trained on another model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", PICKLES)
def test_a_pickle_is_read_as_weights_or_not_at_all(damage, tmp_path):
    change, message = PICKLES[damage]
    change(tmp_path / "model.pt")
    model = tiny_model("bert", "bare")
    assert_refused(model, tmp_path / "model.pt", message, allow_pickle=True)
    assert not (tmp_path / "mark").exists()
    assert_refused(model, tmp_path / "model.pt", "got a pickle")


def test_a_snapshot_of_the_hub_may_link_to_its_blobs(of_peft, tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copy(of_peft / name, blobs / name)
        (snapshot / name).symlink_to(blobs / name)
    assert import_adapter(tiny_model("bert", "token"), snapshot)
