"""Sweeps: several runs in one folder, resumed, with failures, and what the ablations expand to."""

import csv
import json
import math

import pytest
from transformers import TrainerCallback

from ptv2_fast import cli
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.run import train
from ptv2_fast.training.seeds import over_seeds
from ptv2_fast.training.sweeps import sweep as sweep_module
from ptv2_fast.training.sweeps.ablation import (
    depth_sweep,
    depths,
    head_sweep,
    length_sweep,
    reparam_sweep,
)
from ptv2_fast.training.sweeps.plan import Sweep, read_sweep, seeds_sweep, sweep_of
from ptv2_fast.training.sweeps.results import Outcome, summarize, write_sweep_results
from ptv2_fast.training.sweeps.sweep import check_sweep_output, run_once, run_sweep
from tests.models import one_thread  # noqa: F401
from tests.tiny_run import save_tiny_model, write_conll

ADAPTER = "adapter/ptv2_adapter.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("tiny")
    return {
        "task": "token-classification",
        "model": save_tiny_model(folder / "model"),
        "train_file": write_conll(folder / "train.txt", 16),
        "validation_file": write_conll(folder / "dev.txt", 8),
        "num_virtual_tokens": 4,
        "learning_rate": 0.05,
        "batch_size": 4,
        "max_steps": 8,
        "progress": False,
    }


@pytest.fixture(scope="module")
def base(tiny) -> RunConfig:
    return RunConfig.from_dict(tiny)


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """The run of seed 12 by itself."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    config = base.changed({"seed": 12})
    run_once(config, folder)
    return folder


class Stop(TrainerCallback):
    """A Ctrl-C in the middle of a run."""

    def on_step_end(self, args, state, control, **unused):
        if state.global_step == 6:
            raise KeyboardInterrupt


def test_an_interrupted_sweep_keeps_what_is_done_and_goes_on(base, alone, tmp_path, monkeypatch):
    folder, sweep = tmp_path / "sweep", seeds_sweep(base, [11, 12])
    monkeypatch.setattr(
        sweep_module,
        "train",
        lambda run: train(run, [Stop()] if run.config.training.seed == 12 else []),
    )
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, folder)
    monkeypatch.undo()
    assert [row["name"] for row in rows(folder)] == ["seed-11"]
    assert (folder / "seed-12/checkpoints/checkpoint-4").is_dir()
    finished = (folder / "seed-11" / "report.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match="--resume goes on"):
        run_sweep(sweep, folder)

    outcome = run_sweep(sweep, folder, resume=True)
    assert list(outcome.reports) == ["seed-11", "seed-12"] and not outcome.failures
    assert not list(folder.glob("*/checkpoints"))
    assert (folder / "seed-11" / "report.json").stat().st_mtime_ns == finished
    # From the checkpoint of step 4, after another run in the process: the run of seed 12 alone.
    assert (folder / "seed-12" / ADAPTER).read_bytes() == (alone / ADAPTER).read_bytes()
    f1 = [outcome.reports[name]["metrics"]["validation"]["f1"] for name in outcome.reports]
    assert [float(row["validation_f1"]) for row in rows(folder)] == f1
    (group,) = json.loads((folder / "summary.json").read_text())["groups"]
    assert group["metrics"]["validation"]["f1"]["mean"] == pytest.approx(sum(f1) / 2)

    # More seeds may be added; other options may not.
    other = base.changed({"num_virtual_tokens": 5})
    with pytest.raises(ValueError, match="num_virtual_tokens 4 against 5"):
        run_sweep(seeds_sweep(other, [11, 13]), folder, resume=True)
    more = check_sweep_output(seeds_sweep(base, [7]), folder, resume=True)
    assert list(more.runs) == ["seed-11", "seed-12", "seed-7"]
    # One of a version without --decoding goes on by the best label of each word, not half of it.
    for file, part in ((folder / "sweep.json", "base"), (folder / "seed-11/config.json", "data")):
        content = json.loads(file.read_text())
        del content[part]["decoding"]
        file.write_text(json.dumps(content))
    assert read_sweep(folder).base.data.decoding == "argmax"
    with pytest.raises(ValueError, match="decoding 'argmax' against None"):
        run_sweep(sweep, folder, resume=True)


def rows(folder) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_failing_run_is_recorded_and_the_others_go_on(tiny, tmp_path, capsys, monkeypatch):
    """Sixty positions are more than the model has; a learning rate of 1e38 diverges."""
    base = RunConfig.from_dict(tiny | {"position_offset": "prefix", "max_steps": 2,
                                       "logging_steps": 1, "save_steps": 0})  # fmt: skip
    variants = {
        "long": {"num_virtual_tokens": 60},
        "wild": {"learning_rate": 1e38, "max_grad_norm": 0.0, "max_steps": 4},
        "fine": {},
    }
    sweep = sweep_of("seeds", base, variants, [1])
    outcome = run_sweep(sweep, tmp_path / "sweep")
    assert list(outcome.reports) == ["fine-seed-1"]
    long, wild, fine = rows(tmp_path / "sweep")
    assert "num_virtual_tokens: expected room for an input" in long["error"]
    assert "training loss is nan" in wild["error"]
    assert fine["error"] == "" and fine["trainable_parameters"] == str(2 * 2 * 4 * 16 + 16 * 3 + 3)
    summary = json.loads((tmp_path / "sweep" / "summary.json").read_text())
    assert (summary["runs"], summary["finished"]) == (3, 1)
    assert list(summary["failures"]) == ["long-seed-1", "wild-seed-1"]
    assert [len(group["finished"]) for group in summary["groups"]] == [0, 0, 1]

    # What is finished stays in the table while the runs before it are tried again.
    tables = []
    run_sweep(sweep, tmp_path / "sweep", resume=True,
              announce=lambda line: tables.append(rows(tmp_path / "sweep")))  # fmt: skip
    assert [row["name"] for row in tables[0]] == ["fine-seed-1"]
    assert len(rows(tmp_path / "sweep")) == 3


def test_mean_and_deviation_over_the_seeds_of_each_setting(base, tmp_path):
    """0.5, 0.6, 0.9: mean 2/3, squared distances 1/36 + 1/225 + 49/900 = 78/900, over 2."""
    variants = {str(p): {"num_virtual_tokens": p} for p in (4, 8)}
    sweep = sweep_of("length", base, variants, [1, 2, 3])
    scores = {"4-seed-1": 0.5, "4-seed-2": 0.6, "4-seed-3": 0.9, "8-seed-2": 0.25}
    reports = {name: {"metrics": {"validation": {"f1": f1}}} for name, f1 in scores.items()}
    outcome = Outcome(reports, {"8-seed-1": "too long"})
    four, eight = summarize(sweep, outcome)["groups"]
    assert four["options"] == {"num_virtual_tokens": 4} and four["seeds"] == [1, 2, 3]
    found = four["metrics"]["validation"]["f1"]
    assert (found["n"], found["mean"]) == (3, pytest.approx(2 / 3))
    assert found["sd"] == pytest.approx(math.sqrt(78 / 900 / 2))
    assert eight["metrics"]["validation"]["f1"] == {"n": 1, "mean": 0.25, "sd": None}
    row = over_seeds([("f1", 1.0), ("f1", math.nan)], ["metric"]).loc["f1"]
    assert math.isnan(row["mean"]) and math.isnan(row["sd"]) and row["n"] == 2

    write_sweep_results(tmp_path, sweep, outcome)
    table = rows(tmp_path)
    assert list(table[0]) == ["name", "num_virtual_tokens", "seed", "error", "validation_f1"]
    assert [row["name"] for row in table] == ["4-seed-1", "4-seed-2", "4-seed-3", "8-seed-1",
                                              "8-seed-2"]  # fmt: skip


def test_depth_is_figure_3():
    """24 layers in steps of 4, from the first up and from the last down."""
    assert depths(24, 6) == [
        ("ascending", "1-4"), ("ascending", "1-8"), ("ascending", "1-12"),
        ("ascending", "1-16"), ("ascending", "1-20"),
        ("descending", "21-24"), ("descending", "17-24"), ("descending", "13-24"),
        ("descending", "9-24"), ("descending", "5-24"),
        ("all", "1-24"),
    ]  # fmt: skip
    assert [depth for _, depth in depths(5, 2)] == ["1-2", "4-5", "1-5"]


def test_ablations_expand_to_named_runs(base, tiny):
    sweep = depth_sweep(base, steps=2, seeds=[11, 12])
    assert sweep.runs == {
        "ascending-1-1-seed-11": {"depth": "1-1", "seed": 11},
        "ascending-1-1-seed-12": {"depth": "1-1", "seed": 12},
        "descending-2-2-seed-11": {"depth": "2-2", "seed": 11},
        "descending-2-2-seed-12": {"depth": "2-2", "seed": 12},
        "all-1-2-seed-11": {"depth": "1-2", "seed": 11},
        "all-1-2-seed-12": {"depth": "1-2", "seed": 12},
    }
    config = sweep.configs()["descending-2-2-seed-12"]
    assert (config.model.depth, config.training.seed) == ("2-2", 12)
    assert config.model.num_virtual_tokens == 4
    sweep = length_sweep(base, [4, 8])
    assert list(sweep.runs.values()) == [
        {"num_virtual_tokens": 4, "prefix_projection": False, "seed": 42},
        {"num_virtual_tokens": 8, "prefix_projection": False, "seed": 42},
        {"num_virtual_tokens": 4, "prefix_projection": True, "seed": 42},
        {"num_virtual_tokens": 8, "prefix_projection": True, "seed": 42},
    ]
    assert list(sweep.runs) == ["plain-4-seed-42", "plain-8-seed-42", "mlp-4-seed-42",
                                "mlp-8-seed-42"]  # fmt: skip
    assert len(length_sweep(base).runs) == 2 * 6
    assert list(reparam_sweep(base).runs) == ["plain-seed-42", "mlp-seed-42"]
    # No MLP starts at tokens, as the presets do: both start from N(0, 0.02).
    for plan in (length_sweep, reparam_sweep):
        configs = plan(base.changed({"init": "tokens"})).configs().values()
        assert {config.model.init for config in configs} == {"normal"}
    words = {"task": "text-classification", "head": "lm", "verbalizer": "good=good,bad=bad"}
    sweep = head_sweep(RunConfig.from_dict(tiny | words))
    assert [(c.data.head, c.data.verbalizer) for c in sweep.configs().values()] == [
        ("linear", None), ("lm", "good=good,bad=bad")
    ]  # fmt: skip
    assert list(sweep.runs) == ["linear-seed-42", "lm-seed-42"]


def test_ablations_refuse_what_they_cannot_vary(base, tiny):
    tuned = RunConfig.from_dict(tiny | {"method": "fine-tuning"})
    for plan in (depth_sweep, length_sweep, reparam_sweep):
        with pytest.raises(ValueError, match="expected p-tuning-v2"):
            plan(tuned)
    with pytest.raises(ValueError, match="steps: expected 1 to 2"):
        depth_sweep(base, steps=3)
    with pytest.raises(ValueError, match="expected text-classification"):
        head_sweep(base)
    with pytest.raises(ValueError, match="values: expected different"):
        length_sweep(base, [4, 4])
    with pytest.raises(ValueError, match="plain-0-seed-42: num_virtual_tokens"):
        length_sweep(base, [0])


def test_a_sweep_of_an_earlier_version_is_read(base, tmp_path):
    """Its `runs` hold what figures need, and the runs' own options stand beside them."""
    changes = {"all-1-2-seed-1": {"depth": "1-2", "seed": 1}}
    places = {"all-1-2-seed-1": {"depth": "1-2", "order": "all", "layers": 2, "seed": 1}}
    content = {"kind": "depth", "runs": places, "changes": changes, "base": base.flat()}
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    assert read_sweep(tmp_path) == Sweep("depth", base, changes)


def arguments(tiny, *command: str) -> list[str]:
    words = [*command, "--no-progress"]
    for name in ("task", "model", "train_file", "validation_file", "batch_size"):
        words += [f"--{name.replace('_', '-')}", str(tiny[name])]
    return words


def test_train_with_seeds_from_the_command_line(tiny, tmp_path, capsys):
    output = str(tmp_path / "runs")
    command = arguments(tiny, "train", "--output", output, "--max-steps", "1")
    assert cli.main([*command, "--seeds", "3,3"]) == 2
    assert "seeds: expected different integers" in capsys.readouterr().err
    assert cli.main([*command, "--seeds", "3,4", "--seed", "5"]) == 2
    assert "seed: expected no value" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert cli.main([*command, "--seeds", "3,4"]) == 0
    out = capsys.readouterr().out
    assert "validation (2 seeds): " in out and " ± " in out
    assert json.loads((tmp_path / "runs" / "seed-4" / "config.json").read_text())["training"][
        "seed"
    ] == 4  # fmt: skip
    assert cli.main(["train", "--output", output, "--resume"]) == 0
    assert "seed-4 (2 of 2): finished before" in capsys.readouterr().err
    assert cli.main(["train", "--output", output, "--resume", "--batch-size", "2"]) == 2
    assert "batch_size 4 against 2" in capsys.readouterr().err


def test_ablate_from_the_command_line(tiny, tmp_path, capsys):
    output = str(tmp_path / "runs")
    command = arguments(tiny, "ablate", "reparam", "--output", output, "--max-steps", "1")
    assert cli.main([*command, "--steps", "2"]) == 2
    assert "steps: expected no value for the ablation of reparam" in capsys.readouterr().err
    assert cli.main([*command, "--prefix-projection"]) == 2
    assert "prefix_projection: expected no value" in capsys.readouterr().err
    assert cli.main([*command, "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "mlp-seed-42 prefix_projection=True seed=42" in printed.out
    first, whole = (
        json.loads(line.partition(": ")[2])
        for line in printed.err.splitlines()
        if line.startswith(("2 runs; the first, plain-seed-42: ", "all that are to be run, if "))
    )
    assert whole["runs"] == 2
    for name in ("training_seconds", "scoring_seconds"):
        assert whole[name] == pytest.approx(2 * first["estimate"][name], abs=0.1)
    assert whole["memory_bytes"] == first["estimate"]["memory_bytes"] > 10_000
    assert not (tmp_path / "runs").exists()
    assert cli.main(command) == 0
    assert [row["prefix_projection"] for row in rows(tmp_path / "runs")] == ["False", "True"]
    content = json.loads((tmp_path / "runs" / "sweep.json").read_text())
    assert content["kind"] == "reparam"
    assert content["runs"]["mlp-seed-42"] == {"prefix_projection": True, "seed": 42}
    words = arguments(tiny, "ablate", "length", "--output", output + "2", "--max-steps", "1")
    assert cli.main([*words, "--values", "3"]) == 0
    capsys.readouterr()
    more = ["--output", output + "2", "--resume", "--seeds", "7", "--dry-run"]
    assert cli.main(["ablate", "length", *more]) == 0
    printed = capsys.readouterr()
    assert 'if each is like plain-3-seed-7: {"runs": 2, ' in printed.err, "two are finished"
    runs = [line.split()[0] for line in printed.out.splitlines()]
    assert runs == ["plain-3-seed-42", "mlp-3-seed-42", "plain-3-seed-7", "mlp-3-seed-7"]
    assert cli.main(["ablate", "depth", "--output", output, "--resume", "--steps", "1"]) == 2
    assert "expected the sweep of reparam" in capsys.readouterr().err


def test_a_run_in_the_sweep_with_other_options_stops_it_before_training(base, tmp_path):
    sweep = Sweep("seeds", base, {"a": {"seed": 1}})
    sweep.write(tmp_path)
    (tmp_path / "a").mkdir()
    foreign = base.to_dict() | {"found": {"labels": [], "max_length": 1}}
    (tmp_path / "a" / "config.json").write_text(json.dumps(foreign))
    with pytest.raises(ValueError, match=r"a: resume: .*seed 42 against 1"):
        run_sweep(sweep, tmp_path, resume=True)
