"""What a command may write, delete and go on from: other people's files stay, kills do no harm."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from ptv2_fast import cli
from ptv2_fast.training import output, run_folder
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.run import train
from ptv2_fast.training.search.space import check_space, default_space
from ptv2_fast.training.sweeps.plan import read_sweep
from ptv2_fast.training.warm_start import find_starts
from tests.models import one_thread  # noqa: F401
from tests.report_runs import write_run
from tests.tiny_run import save_tiny_model, write_reviews

ADAPTER = "adapter/ptv2_adapter.safetensors"
STEPS = {"max_steps": 6, "save_steps": 2, "eval_steps": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("tiny")
    data = write_reviews(folder / "train.csv", 16)
    return {
        "task": "text-classification", "model": save_tiny_model(folder / "model"),
        "train_file": data, "validation_file": data, "num_virtual_tokens": 4, "batch_size": 4,
        "max_steps": 1, "learning_rate": 0.05, "progress": False,
    }  # fmt: skip


def words(tiny: dict, output: Path, *more: str) -> list[str]:
    config = output.parent / f"{output.name}-config.json"
    config.write_text(json.dumps(tiny))
    return ["train", "--config", str(config), "--output", str(output), *more]


def fails(command: list[str], capsys, code: int = cli.BAD_INPUT) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert cli.main(command) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


# Files of others


@pytest.mark.parametrize(
    ("name", "content", "command"),
    [
        ("sweep.json", "{}", ["--seeds", "1,2"]),
        ("config.json", '{"found": {"labels": [], "max_length": 3}}', []),
    ],
)
def test_a_foreign_folder_with_a_file_of_our_name_is_not_deleted(
    name, content, command, tiny, tmp_path, capsys
):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / name).write_text(content)
    (folder / "thesis.tex").write_text("theirs")
    fails(words(tiny, folder, "--overwrite", *command), capsys)
    assert sorted(path.name for path in folder.iterdir()) == [name, "thesis.tex"]


def test_a_foreign_study_is_not_deleted(tiny, tmp_path, capsys):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "study.db").write_text("")
    (folder / "thesis.tex").write_text("theirs")
    fails(["search", *words(tiny, folder, "--overwrite", "--trials", "1")[1:]], capsys)
    assert sorted(path.name for path in folder.iterdir()) == ["study.db", "thesis.tex"]


def test_a_run_of_our_own_is_overwritten(tiny, tmp_path):
    output = tmp_path / "run"
    assert cli.main(words(tiny, output)) == 0
    (output / "adapter" / "old").write_text("")
    assert cli.main(words(tiny, output, "--overwrite")) == 0
    assert not (output / "adapter" / "old").exists() and (output / "report.json").is_file()


class Ranks:
    """torch.distributed as two threads see it that are two processes of a training."""

    def __init__(self) -> None:
        self.own, self.place = threading.local(), threading.Barrier(2, timeout=20)

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def get_rank(self) -> int:
        return self.own.rank

    def barrier(self) -> None:
        self.place.wait()


def test_one_of_several_processes_overwrites_while_the_others_wait(tmp_path, monkeypatch):
    ranks, seen = Ranks(), {}
    monkeypatch.setattr(output, "_distributed", lambda: ranks)
    output.write_mark(tmp_path, "run")
    (tmp_path / "old").write_text("")
    deleted = []
    monkeypatch.setattr(output, "_delete", lambda path: deleted.append(path) or path.unlink())

    def process(rank: int) -> None:
        ranks.own.rank = rank
        if rank == 0:
            time.sleep(0.2)  # the other one is there first
        with output.locked(tmp_path, "run", True, lambda: None):
            seen[rank] = (tmp_path / "old").exists()
            if rank == 0:
                (tmp_path / "new").write_text("")
            output.wait_for_all()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {0: False, 1: False}
    assert deleted == [tmp_path / "old"] and (tmp_path / "new").exists()


def test_a_report_replaces_its_own_files_alone(tmp_path, capsys):
    for number in range(2):
        run = tmp_path / "runs" / str(number)
        write_run(run, {"validation": {"accuracy": 0.5}}, seed=number, curve=[(1, 0.5), (2, 0.6)])
    theirs = tmp_path / "w"
    theirs.mkdir()
    for name in ("index.html", "photo.png"):
        (theirs / name).write_text("theirs")
    command = ["report", str(tmp_path / "runs"), "--output"]
    assert "expected a new folder" in fails([*command, str(theirs)], capsys)
    assert [(theirs / name).read_text() for name in ("index.html", "photo.png")] == ["theirs"] * 2

    ours = tmp_path / "report"
    assert cli.main([*command, str(ours)]) == 0
    drawn = {path.name for path in ours.glob("curve*.png")}
    assert drawn
    (ours / "photo.png").write_text("theirs")
    for run in (tmp_path / "runs").iterdir():
        (run / "metrics.jsonl").write_text("")
    assert cli.main([*command, str(ours)]) == 0
    assert (ours / "photo.png").read_text() == "theirs"
    assert not drawn & {path.name for path in ours.iterdir()}

    mark = ours / ".ptv2-fast"
    mark.write_text(
        json.dumps({"kind": "report", "files": ["index.html", "../runs/0/report.json"]})
    )
    assert "expected a plain name" in fails([*command, str(ours)], capsys)
    assert (tmp_path / "runs/0/report.json").is_file()


# Names that are joined to paths


@pytest.mark.parametrize(
    "name", ["../x", "/tmp/x", "a/b", "..", "", ".hidden", "a\\b", "C:x", "a\0b"]
)
def test_names_in_files_stay_in_their_folder(name, tiny, tmp_path):
    base = RunConfig.from_dict(tiny).flat()
    part = {name: {"seed": 1}}
    content = {"kind": "seeds", "runs": part, "changes": part, "base": base}
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected a plain name"):
        read_sweep(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"tasks": [{"name": name}], "found": {}}))
    with pytest.raises(ValueError, match="expected a plain name"):
        run_folder.read_run_config(tmp_path)
    model = RunConfig.from_dict(tiny | {"start_from": str(tmp_path)}).model
    with pytest.raises(ValueError, match="expected a plain name"):
        find_starts(model)


# Kills


def test_two_trains_into_one_new_folder_are_one_run(tiny, tmp_path):
    """The second was checked before the first began, and comes while it trains, and after."""
    first, second, third = (
        prepare(RunConfig.from_dict(tiny | {"seed": seed}), tmp_path / "run") for seed in (1, 2, 3)
    )
    lock = run_folder.locked_run(
        first.folder, first.config, first.metadata, resume=False, overwrite=False
    )
    with lock:
        with pytest.raises(ValueError, match="another process is writing into"):
            train(second)
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        train(third)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["seed"] == 1


# Each command in a fork of one process, since the imports take seconds.
KILLED = """
import json, os, sys
import ptv2_fast.training.run
from ptv2_fast import cli
real = os.replace
for left, command in json.loads(sys.argv[1]):
    def replace(source, target):
        global left
        left -= 1
        if left == 0:
            os._exit(9)
        real(source, target)
    child = os.fork()
    if child == 0:
        os.replace = replace
        cli.main(command)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
"""


@pytest.fixture(scope="module")
def killed(tiny, tmp_path_factory) -> dict[int, Path]:
    """Folders of runs whose process was gone at its first, second and fourth os.replace."""
    folder = tmp_path_factory.mktemp("killed")
    outputs = {replaced: folder / str(replaced) for replaced in (1, 2, 4)}
    commands = json.dumps([(number, words(tiny, output)) for number, output in outputs.items()])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", KILLED, commands], env=environment,
                   stderr=subprocess.DEVNULL, check=True)  # fmt: skip
    return outputs


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
@pytest.mark.parametrize("replaced", [1, 2, 4])
def test_a_kill_before_a_file_has_its_name_leaves_a_folder_that_goes_on(
    flag, replaced, killed, tiny, tmp_path
):
    output = tmp_path / "run"
    shutil.copytree(killed[replaced], output)
    assert list(output.rglob("*.tmp"))
    assert cli.main(words(tiny, output, flag)) == 0
    report = json.loads((output / "report.json").read_text())
    files = ["config.json", "ptv2_config.json", Path(ADAPTER).name]
    sizes = [(output / "adapter" / name).stat().st_size for name in files]
    assert report["saved_bytes"] == sum(sizes)
    assert not list(output.rglob("*.tmp"))


# The command line


def interrupt(*unused, **also_unused):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; continue with --resume"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "left on device; continue with --re"),
        (OSError(errno.EROFS, "Read-only file system"), 2, "file system; continue with --resume"),
        (SafetensorError("Error: IoError(Os { code: 28 })"), 2, "written: .*; continue with --res"),
        (RuntimeError("PytorchStreamWriter failed writing file"), 2, "could not be written"),
        (RecursionError("maximum recursion depth exceeded"), 2, "RecursionError: maximum"),
        (OverflowError("int too big to convert"), 2, "OverflowError: int too big"),
    ],
)
def test_what_the_machine_cannot_do_is_one_line(
    error, code, message, tiny, tmp_path, capsys, monkeypatch
):
    def fail(*unused):
        raise error

    output = tmp_path / "run"
    monkeypatch.setattr("ptv2_fast.training.run.save_trained", fail)
    line = fails(words(tiny, output), capsys, code)
    assert re.search(message, line), line
    monkeypatch.undo()
    assert cli.main(words(tiny, output, "--resume")) == 0


def test_an_interrupt_before_anything_was_written_promises_nothing(
    tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("ptv2_fast.training.prepare.read_data", interrupt)
    assert "--resume" not in fails(words(tiny, tmp_path / "run"), capsys, cli.INTERRUPTED)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", '{"metrics": []}', "{", "\xff"])
def test_a_bad_report_is_one_line(content, tiny, tmp_path, capsys):
    run = tmp_path / "sweep" / "seed-1"
    assert cli.main(words(tiny, tmp_path / "sweep", "--seeds", "1")) == 0
    (run / "report.json").write_bytes(content.encode("latin-1"))
    assert "report.json" in fails(["train", "--output", str(run), "--resume"], capsys)
    assert "report.json" in fails(["train", "--output", str(run.parent), "--resume"], capsys)
    assert "report.json" in fails(["report", str(run), "--output", str(tmp_path / "w")], capsys)


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": ["rte"]},
        {"machine": "a laptop"},
        {"remarks": {"train": 3}},
        {"train_seconds": "long"},
        {"train_seconds": 10**400},
        {"metrics": {"validation": {"accuracy": 10**400}}},
        {"model": ["a"]},
        {"started_from": "there"},
    ],
)
def test_reports_with_other_types_are_left_out(change, tmp_path, capsys):
    write_run(tmp_path / "runs" / "good", {"validation": {"accuracy": 0.5}})
    write_run(tmp_path / "runs" / "bad", {"validation": {"accuracy": 0.5}}, report=change)
    command = ["report", str(tmp_path / "runs"), "--output", str(tmp_path / "w")]
    capsys.readouterr()
    assert cli.main(command) == 0
    assert f"left out: {tmp_path / 'runs' / 'bad'}: report.json" in capsys.readouterr().err


def test_a_loop_of_links_is_one_line(tiny, tmp_path, capsys):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    fails(words(tiny, loop), capsys)
    fails(["report", str(loop)], capsys)
    fails(["predict", "--run", str(loop), "--text", "a"], capsys)


def test_a_damaged_study_is_one_line(tiny, tmp_path, capsys):
    """Wherever the damage is: sqlite reads a page when it is asked for what is in it."""
    folder = tmp_path / "search"
    command = ["search", *words(tiny, folder, "--trials", "1")[1:]]
    assert cli.main(command) == 0
    study = folder / "study.db"
    content = study.read_bytes()
    size = int.from_bytes(content[16:18], "big")
    pages = len(content) // size
    damages = [(b"\xff" * size, place * size) for place in (1, 14, pages - 1)]
    damages.append((b"(", content.index(b'{"name": "FloatDistribution"')))
    for bad, place in damages:
        study.write_bytes(content[:place] + bad + content[place + len(bad) :])
        assert f"study: expected a database, got {study}" in fails(command, capsys), place


# Search


def test_no_trial_starts_an_mlp_at_tokens(tiny):
    base = RunConfig.from_dict(tiny | {"init": "tokens"})
    assert "prefix_projection" not in default_space(base)
    assert "prefix_projection" in default_space(RunConfig.from_dict(tiny))
    space = {
        "init": {"choices": ["normal", "tokens"]},
        "prefix_projection": {"choices": [False, True]},
    }
    with pytest.raises(ValueError, match="init and prefix_projection that go together"):
        check_space(space, RunConfig.from_dict(tiny))


def test_the_summary_of_a_search_counts_failures(tiny, tmp_path, capsys):
    space = tmp_path / "space.json"
    space.write_text('{"num_virtual_tokens": {"choices": [4, 60]}}')
    base = {key: value for key, value in tiny.items() if key != "num_virtual_tokens"}
    config = base | {"position_offset": "prefix"}
    command = words(config, tmp_path / "run", "--space", str(space), "--trials", "6")
    assert cli.main(["search", *command[1:]]) == 0
    shown = capsys.readouterr()
    failed = shown.err.count("expected room for an input")
    assert failed > 0
    assert f"{failed} of 6 trials failed, trial" in shown.out
