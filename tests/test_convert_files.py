"""Files of others that are damaged or hostile: one clear error each, and the model stays plain."""

import json
import math
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptv2_fast.adapters import import_adapter
from tests.adapter_files import HUGE
from tests.models import (
    P,
    one_thread,  # noqa: F401
    tiny_model,
)
from tests.peft_models import peft_model


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
        lambda d: change_tensors(d, prompt_embeddings=table().long()), "embeddings, got torch.int64"
    ),
    "eight bits": (
        lambda d: change_tensors(d, **{BIAS: torch.ones(3).to(torch.float8_e4m3fn)}), "torch.float8"
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
    "code": (lambda p: torch.save({NAME: Planted(p.parent / "mark")}, p),
             "as weights only, got .*GLOBAL"),
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
    snapshot, blobs = tmp_path / "snapshots" / "1" / "best", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copy(of_peft / name, blobs / name)
        (snapshot / name).symlink_to(blobs / name)
    assert import_adapter(tiny_model("bert", "token"), snapshot)
