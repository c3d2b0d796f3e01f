"""README, docs/ and examples/: code runs, links lead somewhere, figures are the measured ones."""

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, AutoModelForSequenceClassification, TrainingArguments

from bench import documented, plot
from ptv2_fast import PTuningV2Config, attach, cli
from ptv2_fast.encoders.glm import GLMConfig, GLMForConditionalGeneration
from tests.models import one_thread, tiny_model  # noqa: F401
from tests.tiny_run import save_tiny_model, write_conll

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for folder in (ROOT, ROOT / "docs", ROOT / "bench")
    for path in folder.glob("*.md")
    if path.name != "NOTES.md"
}
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "tiny")
NAMES = ("bert-base-cased", "sentence-transformers/all-MiniLM-L6-v2")


def code_blocks(page: str, language: str = "python") -> list[str]:
    """All but those below a comment that says why they do not run here."""
    fence = rf"(<!-- not run: [^>]*-->\n)?^```{language}\n(.*?)^```$"
    found = re.findall(fence, PAGES[page], re.M | re.S)
    return [block for reason, block in found if not reason]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with what the pages name: pretrained models and two finished runs."""
    folder = tmp_path_factory.mktemp("home")
    pairs = [
        {"text": "anna sleeps", "text_pair": f"bob {word}", "label": word}
        for word in ("works", "sleeps") * 2
    ]
    (folder / "rte.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    write_conll(folder / "ner.txt", 4)
    data = {
        "ner": "--task token-classification --train-file ner.txt --validation-file ner.txt",
        "rte": "--task text-classification --train-file rte.jsonl --validation-file rte.jsonl "
        "--text-pair-column text_pair",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in NAMES:
            save_tiny_model(Path(name))
        for name, options in data.items():
            command = f"train {options} --model bert-base-cased --output runs/{name} --max-steps 1 \
                --num-virtual-tokens 2 --save-steps 0 --no-progress"
            assert cli.main(command.split()) == 0
    return folder


def operator_names() -> dict[str, Any]:
    tensors = {name: torch.randn(2, 3, 5, 8) for name in ("query", "key", "value")}
    prefix = {name: torch.randn(3, 4, 8) for name in ("prefix_key", "prefix_value")}
    return {**tensors, **prefix, "key_mask": torch.ones(2, 5, dtype=torch.bool)}


def batch_names() -> dict[str, Any]:
    ids = torch.randint(5, 20, (3, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def adapter_names() -> dict[str, Any]:
    model = AutoModel.from_pretrained(NAMES[1])
    attach(model, PTuningV2Config(num_virtual_tokens=2)).save_pretrained("adapter")
    return batch_names()


def glm_names() -> dict[str, Any]:
    """A text with a blank, and a model that reads it."""
    model = tiny_model("glm2021", "bare")
    ids = torch.tensor([[2, 7, 4, 8, 5]] * 3)
    lengths = torch.tensor([3, 4, 5])
    vocabulary = {"[MASK]": 4, "<|startofpiece|>": 5}
    return {
        "torch": torch, "GLMConfig": GLMConfig, "input_ids": ids, "lengths": lengths,
        "padding": torch.ones_like(ids), "model": GLMForConditionalGeneration(model.config),
        "tokenizer": SimpleNamespace(get_vocab=lambda: vocabulary),
    }  # fmt: skip


# What the blocks of a page take from the text around them.
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": operator_names,
    "docs/frozen-blocks.md": lambda: {"model": tiny_model("bert", "bare")},
    "docs/glm.md": glm_names,
    "docs/serving.md": adapter_names,
}
# Its blocks are compared with the table of families: test_family_table.py.
ELSEWHERE = ("docs/add-a-family.md",)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if code_blocks(page) and page not in ELSEWHERE]
)
def test_code_of_a_page_runs_from_top_to_bottom(page, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    names = GIVEN.get(page, dict)()
    for block in code_blocks(page):
        exec(compile(block, page, "exec"), names)
        # What a comment behind a print says is what it prints.
        printed = capsys.readouterr().out
        for said in re.findall(r"^print\(.*\)  # ([\d.]+)$", block, re.M):
            assert f"{float(printed):.{len(said.partition('.')[2])}f}" == said


def test_the_diff_from_peft_trains_saves_and_loads(home, tmp_path, monkeypatch):
    (diff,) = code_blocks("README.md", "diff")
    lines = [line[1:] for line in diff.splitlines() if not line.startswith("-")]
    monkeypatch.chdir(home)
    data = Dataset.from_list([{"input_ids": [2, 7, 8, 3], "labels": label} for label in (0, 1)])
    names = {
        "arguments": TrainingArguments(tmp_path, max_steps=1, save_strategy="no", report_to=[]),
        "train": data, "dev": data,
        "fresh_model": AutoModelForSequenceClassification.from_pretrained(NAMES[0]),
    }  # fmt: skip
    exec("\n".join(lines), names)
    trained = names["model"].prefix_encoder.embedding.weight
    assert torch.equal(names["fresh_model"].prefix_encoder.embedding.weight, trained)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, tmp_path, monkeypatch, own_accelerator_state):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    importlib.import_module(name).main([])


def test_readme_is_short_and_names_the_true_commands_first():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 150
    assert lines.index("## Install") < 12
    commands = [line.split()[:2] for line in lines[:20] if line.startswith("make ")]
    assert commands == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize("page", documented.PAGES, ids=lambda path: path.name)
def test_tables_of_figures_equal_the_csv_files(page):
    text = page.read_text(encoding="utf-8")
    assert documented.with_tables(text) == text, "python -m bench.documented"
    assert set(re.findall(r"<!-- ([a-z-]+): made by python -m bench", text)) <= {*documented.TABLES}


def test_the_front_picture_shows_the_measured_figures():
    rows = documented.by_method("training-step-cpu.csv")
    expected = {
        f"{int(documented.rounded(rows[f'{plot.FRONT_CASE} {lengths}', method][column])):,}"
        for lengths in ("full", "pad50")
        for method in plot.FRONT_METHODS
        for column in ("step ms", "kept MiB")
    }
    texts = re.findall(r"<text [^>]*>([^<]*)</text>", plot.FRONT_PICTURE.read_text())
    assert {text for text in texts if re.fullmatch(r"[\d,]+", text)} == expected


def anchor(heading: str) -> str:
    words = re.sub(r"[^\w\- ]", "", heading.lower().replace("`", ""))
    return words.replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, part = target.partition("#")
        if place.startswith(("http:", "https:")):
            continue
        path = (ROOT / page).parent / place if place else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if part and path.suffix == ".md" and path.name != "api.md":
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert part in map(anchor, headings), f"{page}: {target}"
