"""The demo from end to end, with too little time to learn anything."""

import json
import sys

import pytest

from ptv2_fast.training import demo


@pytest.mark.slow
def test_the_demo_writes_its_report_and_tags_a_sentence(tmp_path, monkeypatch, capsys):
    arguments = ["--seconds-per-method", "2", "--output", str(tmp_path), "--sentence", "In Oslo ."]
    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    demo.main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["methods"]) == list(demo.RECIPES)
    for row in report["methods"].values():
        assert 0 <= row["f1"] <= 1
        for name in ("trainable_parameters", "saved_bytes", "step_seconds", "kept_bytes"):
            assert row[name] > 0, name
    assert report["comparison"]["trained_over_fine_tuning"] < 0.1
    assert "p-tuning-v2" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "f1_over_time.png").stat().st_size > 0
    assert "In Oslo ." in capsys.readouterr().out


def test_the_part_that_trains_is_that_of_print_trainable_parameters():
    row = {"f1": 0.5, "trainable_parameters": 593_289, "total_parameters": 23_158_665,
           "saved_bytes": 1, "steps": 1, "recipe": {"batch_size": 1}, "step_seconds": 1,
           "kept_bytes": 1}  # fmt: skip
    methods = dict.fromkeys(demo.RECIPES, row)
    methods["fine-tuning"] = {**row, "trainable_parameters": 22_568_841}
    assert demo.table_rows(methods)[list(methods).index(demo.PRESET)][3] == "2.56"
    assert "trains 2.56 % of the parameters" in demo.summary(methods)
