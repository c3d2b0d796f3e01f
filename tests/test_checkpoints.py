"""Checkpoints that were damaged: a run goes on from whole ones, and ends with the best or not."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptv2_fast import cli
from ptv2_fast.training.checkpoints import load_old_norms
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.run import train
from tests.models import one_thread, tiny_model  # noqa: F401
from tests.test_output_folders import ADAPTER, STEPS, fails, interrupt, tiny, words  # noqa: F401


def damage(name: str, content: bytes | None = None):
    def change(checkpoint: Path) -> None:
        path = checkpoint / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content or path.read_bytes()[:-50])

    return change


@pytest.fixture(scope="module")
def interrupted(tiny, tmp_path_factory):  # noqa: F811
    """A whole run's adapter, and the folder of one that was killed after its last step."""
    folder = tmp_path_factory.mktemp("interrupted")
    config = RunConfig.from_dict(tiny | STEPS)
    train(prepare(config, folder / "whole"))
    prepared = prepare(config, folder / "killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ptv2_fast.training.run.save_trained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(prepared)
    return folder, config


@pytest.mark.parametrize(
    "change",
    [
        damage("optimizer.pt"),
        damage("scheduler.pt"),
        damage("rng_state.pth"),
        damage("optimizer.pt", b""),
        damage("optimizer.pt", b"not an archive"),
        damage("model.safetensors"),
        damage("model.safetensors", b"\xff" * 99),
        damage("trainer_state.json", b"{}"),
        damage("trainer_state.json", b"[" * 100_000),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    change, interrupted, tmp_path, monkeypatch
):
    folder, config = interrupted
    shutil.copytree(folder / "killed", tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    newest = max(checkpoints.iterdir(), key=lambda path: int(path.name.split("-")[1]))
    change(newest)
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged"):
        train(prepare(config, tmp_path / "run", resume=True))
    assert (tmp_path / "run" / ADAPTER).read_bytes() == (folder / "whole" / ADAPTER).read_bytes()


def test_norms_are_loaded_by_the_names_that_some_versions_give_them(tmp_path):
    model, tensors, expected = tiny_model(), {}, {}
    for name, tensor in model.state_dict().items():
        new = torch.rand_like(tensor)
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old = old.replace("LayerNorm.bias", "LayerNorm.beta")
        tensors[old] = new
        expected[name] = tensor.clone() if old == name else new
    save_file(tensors, tmp_path / "model.safetensors")
    load_old_norms(model, tmp_path)
    for name, tensor in model.state_dict().items():
        assert tensor.equal(expected[name]), name


def test_a_checkpoint_of_other_shapes_is_one_line(interrupted, tmp_path, capsys):
    folder, _ = interrupted
    shutil.copytree(folder / "killed", tmp_path / "run")
    for file in tmp_path.glob("run/checkpoints/*/model.safetensors"):
        tensors = load_file(file)
        save_file({name: tensor[:-1].clone() for name, tensor in tensors.items()}, file)
    assert cli.main(["train", "--output", str(tmp_path / "run"), "--resume"]) == cli.BAD_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    assert "not of this model: " in line and "size mismatch" in line


@pytest.mark.parametrize("damaged", ["gone", "cut short"])
def test_a_run_does_not_end_with_the_last_weights_when_the_best_are_gone(
    damaged,
    tiny,  # noqa: F811
    tmp_path,
    capsys,
    monkeypatch,
):
    """The first of three scorings is the best; --resume begins again where nothing is whole."""
    best = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    scores = iter([0.9, 0.3, 0.2])

    def score(*unused) -> dict[str, float]:
        accuracy = next(scores)
        if accuracy == 0.2 and damaged == "gone":
            shutil.rmtree(best)
        elif accuracy == 0.2:
            weights = (best / "model.safetensors").read_bytes()
            (best / "model.safetensors").write_bytes(weights[:-9])
        return {"accuracy": accuracy, "f1": accuracy}

    monkeypatch.setattr("ptv2_fast.training.trainer.score", score)
    line = fails(words(tiny | STEPS, tmp_path / "run"), capsys)
    assert "the best checkpoint of the run is gone or damaged: checkpoint-2" in line
    assert line.endswith("; continue with --resume")
    assert not (tmp_path / "run" / "report.json").exists()
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="checkpoint-6 is damaged"):
        assert cli.main(["train", "--output", str(tmp_path / "run"), "--resume"]) == 0
    assert (tmp_path / "run" / "report.json").exists()
