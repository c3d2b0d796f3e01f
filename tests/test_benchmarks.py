"""Every published data set from its official files through training, scoring and prediction."""

import json

import pytest

from ptv2_fast import cli
from ptv2_fast.tasks.benchmarks import BENCHMARKS
from tests.conll_files import WRITERS as CONLL
from tests.models import one_thread  # noqa: F401
from tests.squad_files import WRITERS as SQUAD
from tests.superglue_files import WRITERS as SUPERGLUE
from tests.tiny_run import save_tiny_model

WRITERS = {**SUPERGLUE, **CONLL, **SQUAD}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", positions=96)


def test_every_published_data_set_has_files():
    assert set(WRITERS) == set(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_published_data_set_trains_scores_and_predicts(name, tiny, tmp_path, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    WRITERS[name](data, 4)
    command = [
        "train", "--task", name, "--data-dir", str(data), "--model", tiny, "--output", str(run),
        "--num-virtual-tokens", "2", "--max-length", "96", "--doc-stride", "8", "--max-steps", "2",
        "--batch-size", "2", "--no-progress",
    ]  # fmt: skip
    assert cli.main(command) == 0
    report = json.loads((run / "report.json").read_text())
    assert set(report["metrics"]) == set(BENCHMARKS[name].files) - {"train"}
    for scores in report["metrics"].values():
        assert set(BENCHMARKS[name].metrics) <= set(scores)
        assert all(isinstance(score, float) for score in scores.values())

    validation = next(
        data / n for n in BENCHMARKS[name].files["validation"] if (data / n).is_file()
    )
    capsys.readouterr()
    assert cli.main(["predict", "--run", str(run), "--data", str(validation)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == report["examples"]["validation"]
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert cli.main(["eval", "--run", str(run), "--data", str(validation)]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert report["metrics"]["validation"].items() <= scores.items()
