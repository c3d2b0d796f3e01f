"""What `ptv2-fast models` and the documentation say of each family, against what attach does."""

import dataclasses
import re
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from ptv2_fast import cli
from ptv2_fast.encoders import blocks as encoder_blocks
from ptv2_fast.encoders import families
from ptv2_fast.encoders.blocks import Heads
from ptv2_fast.encoders.families import FAMILIES
from ptv2_fast.encoders.family import Family
from ptv2_fast.encoders.family_table import COLUMNS, family_rows, heads_of
from tests.models import BACKBONES, MODEL_TYPES, MODELS, tiny_model

ROOT = Path(__file__).parents[1]
ROWS = {row.model_type: row for row in family_rows()}


def documented_table() -> str:
    page = (ROOT / "docs" / "support.md").read_text()
    return page.partition("<!-- models: made by make model-table -->\n")[2].partition("\n<!--")[0]


def test_the_documentation_has_the_table_that_the_command_prints(capsys):
    """To the letter with the version that constraints.txt pins; of others only what is ours."""
    assert cli.main(["models", "--markdown"]) == 0
    printed, documented = capsys.readouterr().out.removesuffix("\n"), documented_table()
    if f"transformers=={transformers.__version__};" in (ROOT / "constraints.txt").read_text():
        assert documented == printed, "make model-table"
    found = {}
    for line in documented.splitlines()[2:]:
        names, _, _, offset, _ = (cell.strip() for cell in line.strip("|").split("|"))
        found |= dict.fromkeys(names.split(", "), offset)
    assert found == {name: row.position_offset for name, row in ROWS.items()}


def test_each_family_is_a_line_and_a_version_may_lack_it(monkeypatch, capsys):
    monkeypatch.setitem(FAMILIES, "coming_soon", Family(is_decoder=True))
    assert cli.main(["models"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert tuple(header.split()) == COLUMNS
    assert [line.split()[0] for line in lines] == sorted(FAMILIES)
    (unknown,) = (line for line in lines if line.startswith("coming_soon"))
    assert "not in this version of transformers" in unknown and unknown.endswith("causal")


def test_heads_of_an_encoder_with_a_decoder_are_not_listed():
    assert heads_of(transformers.T5Config()) == ["token", "bare"]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_row_says_what_attach_does(model_type):
    row, family = ROWS[model_type], FAMILIES[model_type]
    if model_type != "esm" or "frozen" in BACKBONES[model_type]:  # else its default has a table
        assert tuple(row.layers.split(", ")) == BACKBONES[model_type]
    tested = {head for name, head in MODELS if name == model_type}
    # Some versions build XLM-R for choices without the pooler that its head reads.
    assert set(row.heads.split(", ")) - tested <= {"choice"} and tested <= {*row.heads.split(", ")}
    for kind in {*(family.position_types or ())} - {None} or {None}:
        changes = {} if kind is None else {"position_embedding_type": kind}
        backbone = tiny_model(model_type, "bare", **changes).base_model
        if "prefix" in row.position_offset and f"with {kind}" not in row.position_offset:
            family.check_offset(backbone)
        else:
            with pytest.raises(ValueError, match="position_offset: expected 'none'"):
                family.check_offset(backbone)


def test_the_guide_describes_the_family_of_its_example():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/add-a-family.md").read_text(), re.S)
    names = {**vars(families), **vars(encoder_blocks)}
    row = eval(f"{{{blocks[0]}}}", names)["nomic_bert"]
    family = FAMILIES["nomic_bert"]
    assert row == dataclasses.replace(family, describe_block=None)
    exec(blocks[1], names)
    if "nomic_bert" not in MODEL_TYPES:  # of older versions of transformers
        return
    (layer, *_), heads = family.layer_modules(tiny_model("nomic_bert", "bare")), Heads(2, 8)
    assert names["describe_nomic_bert"](layer, heads) == family.describe_block(layer, heads)


def test_families_with_a_description_run_as_frozen_blocks():
    """In the versions of transformers whose attention asks for a function, in all families."""
    described = {name for name in BACKBONES if FAMILIES[name].describe_block is not None}
    frozen = {name for name, ways in BACKBONES.items() if "frozen" in ways}
    if Version(transformers.__version__) >= Version("5.20"):
        assert frozen == described and len(frozen) >= 20
    else:
        assert frozen <= described
