"""The report: what it reads, how it aggregates, and what the page is made of."""

import html
import json
import math
import re
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest

from ptv2_fast import cli
from ptv2_fast.training.finished_runs import data_titles, find_runs
from ptv2_fast.training.report.compare import Comparison, compare
from ptv2_fast.training.report.figures import STYLES, draw
from ptv2_fast.training.report.page import PAGE, render, write_report
from ptv2_fast.training.report.tables import class_table, confusion_table, cost_table, paper_table
from tests.models import one_thread  # noqa: F401
from tests.report_runs import write_run, write_sweep
from tests.tiny_run import save_tiny_model, write_reviews

EVIL = "<img src=x onerror=alert(1)>&\"' $x_{$"
LANDMARKS = ("header", "nav", "main", "footer")


def validation(accuracy: float) -> dict[str, dict[str, float]]:
    return {"validation": {"accuracy": accuracy, "f1": 0.5}}


def mistakes(f1: float, *texts: str) -> dict:
    """Of the class "yes" <b>, whose F1 is given, and "no"."""
    figures = {"precision": 0.5, "recall": 0.5, "support": 131}
    classes = {"yes <b>": {**figures, "f1": f1}, "no": {**figures, "f1": 0.25}}
    errors = [{"where": f"dev.tsv row {number}", "text": text, "expected": "yes <b>",
               "answer": "no"} for number, text in enumerate(texts, 1)]  # fmt: skip
    counts = {"yes <b>": {"yes <b>": 114, "no": 17}, "no": {"no": 146}}
    return {"validation": {"wrong": 17, "classes": classes, "confusion": counts, "errors": errors}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every method on RTE, three seeds of P-Tuning v2, a multi-task run, sweeps, and damage."""
    top = tmp_path_factory.mktemp("report") / "runs"
    for seed, score in ((11, 0.60), (12, 0.70), (13, 0.80)):
        curve = [(10, 0.5), (20, score)]
        write_run(top / f"pt2-{seed}", validation(score), seed=seed, curve=curve,
                  mistakes=mistakes(score, f"text {seed}", EVIL))  # fmt: skip
    more = {"trainable_parameters": 100_000, "truncated_examples": {"train": 3},
            "drawn_from": {"train": 9999}}  # fmt: skip
    curve = [(10, 0.6), (20, 0.8)]
    write_run(top / "ft", validation(0.80), method="fine-tuning", curve=curve, report=more,
              mistakes=mistakes(0.9, "text of FT"))  # fmt: skip
    write_run(top / "pt", validation(0.55), method="prompt-tuning")
    write_run(top / "lp", validation(0.50), method="linear-probe")
    write_run(top / "evil" / "run <b> $x^", validation(0.75), method="lora", train_file=EVIL,
              report={"remarks": {"train": {EVIL: EVIL}}})  # fmt: skip
    started = {"folder": "multi", "trained_with": ["rte", "cb"], "head": True}
    write_run(top / "mpt2", validation(0.85), start_from="multi", report={"started_from": started})
    tasks = {"rte": {"task": "rte", "metric": "accuracy"}}
    write_run(top / "multi", {"rte/validation": {"accuracy": 0.65}},
              tasks=[{"name": "rte", "task": "rte"}, {"name": "cb", "task": "cb"}],
              report={"tasks": tasks, "task": "text-classification", "metric": "mean"})  # fmt: skip
    write_sweep(
        top / "depth", "depth",
        {
            "a-2": {"depth": "1-2", "order": "ascending", "layers": 2, "seed": 11, "score": 0.3},
            "d-2": {"depth": "3-4", "order": "descending", "layers": 2, "seed": 11, "score": 0.4},
            "all": {"depth": "1-4", "order": "all", "layers": 4, "seed": 11, "score": 0.5},
        },
    )  # fmt: skip
    write_sweep(
        top / "reparam", "reparam",
        {
            "off": {"prefix_projection": False, "seed": 11, "score": 0.31},
            "on": {"prefix_projection": True, "seed": 11, "score": 0.41},
        },
    )  # fmt: skip
    stopped = write_run(top / "stopped", validation(0.99))
    (stopped / "report.json").unlink()
    broken = write_run(top / "broken", validation(0.99))
    (broken / "report.json").write_text('{"task": ')
    no_curve = write_run(top / "no-curve", validation(0.11), method="p-tuning-v1")
    (no_curve / "metrics.jsonl").write_text("{]")
    (top / "notes").mkdir()
    return top


@pytest.fixture(scope="module")
def found(folder) -> Comparison:
    return compare(find_runs([folder])[0])


def published(task: str, model: str) -> list[SimpleNamespace]:
    figure = {"metric": "accuracy", "split": "validation", "head": "linear", "source": "Table 2"}
    return [
        SimpleNamespace(column="FT", value=70.4, verified=True, **figure),
        SimpleNamespace(column="PT-2", value=78.3, verified=False, **figure),
        SimpleNamespace(column="PT", value=11.1, verified=True, **{**figure, "head": "lm"}),
    ]


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory) -> str:
    output = tmp_path_factory.mktemp("page") / "report"
    path, _ = write_report([folder], output, published)
    assert {file.suffix for file in output.glob("[!.]*")} == {".html", ".png"}
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in output.glob("*.png"))
    names = {file.stem for file in output.glob("*.png")}
    assert {"scores", "parameters", "curve-rte-seconds", "curve-rte-step", "depth-1"} <= names
    return path.read_text(encoding="utf-8")


EMPTY = {"meta", "link", "br"}


class Page(HTMLParser):
    """Collects what the tests ask of a page, and that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, *tags: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag in tags]


def test_seeds_are_one_setting_with_mean_and_sample_deviation(found):
    score = found.main_scores.query("title == 'RTE'").loc["PT-2"]
    assert (score["n"], round(score["mean"], 9), round(score["sd"], 9)) == (3, 0.7, 0.1)
    # The three seeds, and the settings of the sweeps, of which one is that of the seeds, the option
    # given or not: the one with the most seeds is shown.
    shown = found.results.query("title == 'RTE' and column == 'PT-2'")
    assert [*shown["seed"]] == [11, 12, 13]
    assert {*shown["settings"]} == {1 + 3 + 1}


def test_a_multitask_run_from_before_an_option_stands_with_those_that_leave_it_out(tmp_path):
    report = {"tasks": {"rte": {"task": "rte", "metric": "accuracy"}}, "metric": "mean"}
    for seed, own in enumerate(({}, {"mixed_batches": False}, {"mixed_batches": True})):
        write_run(tmp_path / str(seed), {"rte/validation": {"accuracy": 0.6}}, seed=seed,
                  tasks=[{"name": "rte", "task": "rte"}, {"name": "cb", "task": "cb"}],
                  report=report, **own)  # fmt: skip
    results = compare(find_runs([tmp_path])[0]).results
    assert [*results["seed"]] == [0, 1] and {*results["settings"]} == {2}


def test_the_better_of_two_settings_is_chosen_on_the_validation_split(tmp_path):
    for rate, on_validation, on_test in ((1, 0.7, 0.1), (2, 0.6, 0.9)):
        scores = {"validation": {"accuracy": on_validation}, "test": {"accuracy": on_test}}
        write_run(tmp_path / str(rate), scores, learning_rate=rate)
    main_scores = compare(find_runs([tmp_path])[0]).main_scores
    assert main_scores[["split", "mean"]].to_dict("records") == [{"split": "test", "mean": 0.1}]


def test_other_data_is_another_row_and_the_folder_of_the_same_data_is_not(tmp_path):
    write_run(tmp_path / "a", validation(0.6), data_dir="here/rte")
    write_run(tmp_path / "b", validation(0.7), method="fine-tuning", data_dir="/there/rte")
    write_run(tmp_path / "c", validation(0.8), method="lora")
    write_run(tmp_path / "d", validation(0.9), data_dir="here/rte", max_train_examples=100)
    write_run(tmp_path / "e", validation(0.9), data_dir="here/rte", max_eval_examples=50)
    main_scores = compare(find_runs([tmp_path])[0]).main_scores
    assert {title: [*own.index] for title, own in main_scores.groupby("title")} == {
        "RTE": ["FT", "PT-2", "LoRA"],
        "RTE (100 training examples)": ["PT-2"],
        "RTE (50 validation examples)": ["PT-2"],
    }


def test_own_data_is_named_by_what_tells_it_apart(tmp_path):
    family = {"task": "text-classification"}
    for number, file in enumerate(("x/trec/train.csv", "x/films/train.csv", "x/films/more.csv")):
        write_run(tmp_path / f"{number}", validation(0.6), train_file=file, **family)
    write_run(tmp_path / "3", validation(0.6), max_train_examples=9)
    runs, _ = find_runs([tmp_path])
    assert [*data_titles(runs).values()] == [
        "trec/train.csv (text-classification)",
        "films/train.csv (text-classification)",
        "films/more.csv (text-classification)",
        "RTE (9 training examples)",
    ]


def cells_of(row) -> dict[str, list[str]]:
    """Column -> the lines of the cell, without tags."""
    return {n: re.sub(r"</?(b|small)>", "", c).split("<br>") for n, c in row.items()}


def test_cells_stand_in_the_columns_of_the_paper(found):
    cells, notes = paper_table(found.main_scores.query("title == 'RTE'"), published)
    row = cells_of(cells.iloc[0].fillna("–"))  # noqa: RUF001
    assert {name: lines[0] for name, lines in row.items()} == {
        "FT": "80.0", "PT": "55.0", "PT-2": "70.0", "MPT-2": "85.0", "Multi-task": "65.0",
        "LP": "50.0", "P-tuning": "11.0", "PT-2 / FT": "87.5 %",
    }  # fmt: skip
    assert [*row] == ["FT", "PT", "PT-2", "MPT-2", "Multi-task", "LP", "P-tuning", "PT-2 / FT"]
    assert row["PT-2"][1:] == ["±10.0, n=3", "published 78.3†"]
    assert row["FT"][1:] == ["published 70.4"] and row["PT"][1:] == []
    assert [name for name, cell in cells.iloc[0].items() if "<b>" in cell] == ["MPT-2"]
    assert any("Table 2" in note for note in notes)
    assert any(note.startswith("†") for note in notes)


def test_classes_stand_beside_each_other_with_mean_and_deviation(found):
    rows = {name: cells_of(row) for (*_, name), row in class_table(found.results).iterrows()}
    assert rows == {
        "yes <b> (131)": {"FT": ["90.0"], "PT-2": ["70.0", "±10.0, n=3"]},
        "no (131)": {"FT": ["25.0"], "PT-2": ["25.0", "±0.0, n=3"]},
    }


def test_mistakes_are_shown_of_the_first_seed_of_each_method(page):
    shown = page[page.index('<section id="mistakes"') : page.index('<section id="curves"')]
    titles = re.findall("<summary>(.*?)</summary>", shown)
    assert titles == ["RTE, tiny-bert, FT, seed 11: 17 wrong on validation",
                      "RTE, tiny-bert, PT-2, seed 11: 17 wrong on validation"]  # fmt: skip
    of_prefix = text_of(shown[shown.index(titles[1]) :])
    assert "yes <b> no yes <b> 114 17 no – 146" in of_prefix  # noqa: RUF001
    assert (
        f"text expected answer dev.tsv row 1 text 11 yes <b> no dev.tsv row 2 {EVIL}" in of_prefix
    )


def test_of_many_classes_those_are_shown_that_are_confused_most():
    names = [f"class {number}" for number in range(99)]
    counts = {
        name: {name: 1000, **({names[-1]: 1} if number < 19 else {})}
        for number, name in enumerate(names)
    }
    table = confusion_table(counts)
    assert [*table.index] == [*table.columns] == [*names[:19], names[-1]]
    assert (table.loc[names[0], names[0]], table.loc[names[0], names[-1]]) == ("1000", "1")


def test_a_report_without_mistakes_says_so(page, tmp_path):
    assert "11 of 15 runs kept no mistakes.json" in page
    for change in ({"wrong": "1"}, {"errors": [{"text": "x"}]}, {"classes": {"a": {"f1": None}}},
                   {"confusion": [1]}):  # fmt: skip
        wrong = {"validation": mistakes(0.5, "x")["validation"] | change}
        (tmp_path / str(len([*tmp_path.iterdir()]))).mkdir()
        write_run(max(tmp_path.iterdir()) / "run", validation(0.5), mistakes=wrong)
    runs, left_out = find_runs([tmp_path])
    assert [run.mistakes for run in runs] == [{}] * 4
    assert all("only its mistakes: mistakes.json" in item.reason for item in left_out)


def test_no_part_of_fine_tuning_is_given_where_a_constant_answer_is_as_good(tmp_path):
    """60 % right of 277 examples is within two standard errors of 59 %, 80 % is not."""
    for number, (method, score) in enumerate({"fine-tuning": 0.8, "p-tuning-v2": 0.6}.items()):
        for constant in (0.59, 0.1):
            baselines = {"validation": {"answer": "1", "accuracy": constant}}
            write_run(tmp_path / f"{constant}" / f"{number}", validation(score), method=method,
                      report={"baselines": baselines})  # fmt: skip
    for constant, cell, ratio in ((0.59, "chance", math.nan), (0.1, "75.0 %", 0.75)):
        runs, _ = find_runs([tmp_path / f"{constant}"])
        main_scores = compare(runs).main_scores
        assert main_scores["ratio"]["PT-2"] == pytest.approx(ratio, nan_ok=True)
        assert [*paper_table(main_scores)[0]["PT-2 / FT"]] == [cell]
        page = text_of(render(runs)[0])
        words = "No better than a constant answer: P-Tuning v2."
        assert (words in page) == (cell == "chance")
        assert ("of fine-tuning's score" in page) == (cell != "chance")


def test_costs_stand_beside_the_score(found):
    cells = cost_table(found.main_scores.query("title == 'RTE'"))
    rows = {name: [lines[0] for lines in cells_of(row).values()]
            for (*_, name), row in cells.iterrows()}  # fmt: skip
    costs = ["4.32 kB", "250 ms", "90 s", "2.5 MB", "1.2 GB"]
    assert rows["PT-2"] == ["70.0", "1,000", "1 %", *costs]
    assert rows["FT"] == ["80.0", "100,000", "100 %", *costs]


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())


def test_the_page_says_where_p_tuning_v2_loses(page):
    page = text_of(page)
    assert "P-Tuning v2 from a multi-task prefix is best with 85.0." in page
    assert "P-Tuning v2 reaches 70.0, 87.5 % of fine-tuning's 80.0, and trains 1 % of" in page
    assert "level or ahead in none of 1 comparison." in page
    assert "Upper layers are better than as many lower ones at 1 of 1 depths." in page


def test_what_is_left_out_is_listed_with_the_reason(page, folder):
    listed = re.sub(r"<[^>]+>", "", page[page.index('<section id="left-out"') :])
    assert f"{folder / 'stopped'}: unfinished" in listed
    assert f"{folder / 'broken'}: {folder / 'broken' / 'report.json'}: not valid JSON" in listed
    assert f"{folder / 'no-curve'}: only its learning curve" in listed
    assert "99.0" not in page
    assert "cut to fit the model: 3 of 2490 examples" in page
    assert "drawn by the seed: 2490 of 9999 examples" in page


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"method": None}, "expected the keys ['method']"),
        ({"baselines": {"validation": 3}}, "expected a table in baselines of 'validation', got 3"),
        ({"metrics": {}}, "not scored: neither a validation nor a test set"),
        ({"metrics": {"validation": {}}}, "not scored: neither a validation nor a test set"),
        ({"metrics": {"validation": 0.5}}, "expected scores by split"),
        ({"metrics": {"validation": {"accuracy": "high"}}}, "expected scores by split"),
        ({"tasks": {"rte": {}}}, "expected task and metric of 'rte'"),
    ],
)
def test_a_damaged_report_is_left_out(change, reason, tmp_path):
    write_run(tmp_path / "good", validation(0.5))
    write_run(tmp_path / "bad", validation(0.5), report=change)
    runs, left_out = find_runs([tmp_path])
    assert [run.folder.name for run in runs] == ["good"]
    assert [item.folder.name for item in left_out] == ["bad"]
    assert reason in left_out[0].reason


def test_a_part_that_is_not_scored_and_what_a_report_does_not_know_are_left_out(tmp_path):
    own = {"metric": "accuracy"}
    parts = {"rte": {"task": "rte", **own}, "cb": {"task": "cb", **own}}
    write_run(tmp_path / "runs" / "multi", {"rte/validation": {"accuracy": 0.6}},
              tasks=[{"name": name, "task": name} for name in parts],
              report={"tasks": parts, "metric": "mean", **dict.fromkeys(
                  ("machine", "versions", "examples", "remarks", "baselines", "kept_bytes"))},
              )  # fmt: skip
    page, left_out = write_report([tmp_path / "runs"], tmp_path / "out")
    assert "P-Tuning v2 of several tasks with one prefix on RTE with tiny-bert" in text_of(
        page.read_text(encoding="utf-8")
    )
    assert left_out == []


def test_a_score_that_is_no_number_is_said_and_never_best(tmp_path):
    write_run(tmp_path / "runs" / "a", validation(float("nan")), curve=[(1, float("nan"))])
    write_run(tmp_path / "runs" / "b", validation(0.5), method="fine-tuning", curve=[(1, 0.5)])
    page, _ = write_report([tmp_path / "runs"], tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    assert "not a number" in text
    assert "only fine-tuning has a score, 50.0." in text


def test_drawings_that_make_the_page_too_large_give_way_to_words(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ptv2_fast.training.report.page.MAX_BYTES", 1)
    page, _ = write_report([folder], tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    assert "<svg" not in text
    assert "Drawn in depth-1.png" in text


def test_the_page_loads_nothing_and_is_small(page):
    for attributes in Page(page).all("a", "link", "img", "use", "script", "iframe"):
        target = attributes.get("href", attributes.get("src", ""))
        assert target.startswith(("#", "data:")), attributes
    assert not re.search(r"https?://|@import|<script|url\((?!#)", page)
    assert len(page.encode()) < 1_000_000


def test_a_long_name_leaves_room_for_the_scores():
    name = "corpus of my own (question-answering, 2000 training examples)"
    points = pandas.DataFrame({"label": ["FT"], "x": [50.0], "y": [0]})
    figure = draw("scores", "", points, "score", rows=[name])
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", figure.svg)
    assert name not in drawn  # in one line
    assert name.replace(" ", "") in "".join(drawn).replace(" ", "")


def test_names_of_users_are_text_in_the_page(page):
    tags = {tag for tag, _ in Page(page).tags}
    assert "img" not in tags
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "run &lt;b&gt; $x^" in page
    assert "&lt;br" not in page and "&lt;small" not in page  # of our own cells, all are elements


def test_the_page_has_landmarks_headers_and_words_for_every_figure(page):
    parsed = Page(page)
    assert [len(parsed.all(tag)) for tag in (*LANDMARKS, "h1")] == [1] * 5
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in parsed.all("a", "use", "section"):
        name = attributes.get("href", attributes.get("aria-labelledby", "")).removeprefix("#")
        assert name in ids
    svgs, tables = parsed.all("svg"), parsed.all("table")
    assert len(svgs) == len(parsed.all("figure")) == len(parsed.all("figcaption")) >= 5
    for svg in svgs:
        words = re.search(rf'<title id="{svg["aria-labelledby"]}">([^<]+)</title>', page)
        assert svg["role"] == "img"
        assert words is not None and re.search(r"\d", words[1])
    assert len(tables) == len(parsed.all("caption")) >= 5
    assert all(header.get("scope") in ("col", "row", "rowgroup") for header in parsed.all("th"))
    regions = [a for a in parsed.all("div") if a.get("class", "").startswith("scroll")]
    assert len(regions) == len(tables)
    for region in regions:
        assert region["role"] == "region" and region["tabindex"] == "0" and region["aria-label"]


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_keep_the_contrast_of_wcag_in_light_and_dark(page):
    blocks = re.findall(r":root \{(.*?)\}", page, re.DOTALL)[:2]
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        for text in ("ink", "soft", "accent"):
            for ground in ("page", "panel", "best"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        assert all(contrast(colour, colours["page"]) >= 3 for colour, _, _ in STYLES.values())


def test_what_is_not_installed_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "ptv2_fast.training.report.page")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "jinja2 is not installed; pip install 'ptv2-fast[report]'" in capsys.readouterr().err


def test_bad_input_is_named(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "expected a folder" in capsys.readouterr().err
    stopped = write_run(tmp_path / "runs" / "stopped", validation(0.9))
    (stopped / "report.json").unlink()
    output = tmp_path / "out"
    assert cli.main(["report", str(tmp_path / "runs"), "--output", str(output)]) == 2
    assert "expected at least one finished run" in capsys.readouterr().err
    assert not output.exists()
    output.mkdir()
    (output / "thesis.tex").write_text("mine")
    write_run(tmp_path / "runs" / "done", validation(0.9))
    assert cli.main(["report", str(tmp_path / "runs"), "--output", str(output)]) == 2
    assert "expected a new folder" in capsys.readouterr().err


def test_a_trained_run_is_reported(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    train, dev = (write_reviews(tmp_path / f"{n}.csv", c) for n, c in (("train", 16), ("dev", 8)))
    run = tmp_path / "runs" / "reviews"
    assert cli.main([
        "train", "--task", "text-classification", "--method", "p-tuning-v2", "--model", model,
        "--train-file", train,
        "--validation-file", dev, "--num-virtual-tokens", "4", "--max-steps", "4", "--eval-steps",
        "2", "--save-steps", "0", "--no-load-best", "--no-progress", "--output", str(run),
    ]) == 0  # fmt: skip
    report = json.loads((run / "report.json").read_text())
    assert report["metric"] == "accuracy"
    assert report["machine"]["cores"] >= 1
    capsys.readouterr()
    command = ["report", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]
    assert cli.main(command) == 0
    assert cli.main(command) == 0  # a report may be written anew
    page = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    kept = json.loads((run / "mistakes.json").read_text())["validation"]
    assert all(html.escape(error["text"]) in page for error in kept["errors"])
    assert f"PT-2, seed 42: {len(kept['errors'])} wrong on validation" in page
    accuracy = report["metrics"]["validation"]["accuracy"]
    assert f"only P-Tuning v2 has a score, {100 * accuracy:.1f}" in page
    command = html.unescape(re.search(r"<code>ptv2-fast (.*?)</code>", page)[1])
    capsys.readouterr()
    assert cli.main([*shlex.split(command), "--dry-run"]) == 0  # repeats the run
    printed = capsys.readouterr().out
    config = json.loads((run / "config.json").read_text())
    shown = json.loads(printed[printed.index("{") :])
    for section in ("data", "model", "training"):
        given = {name: value for name, value in config[section].items() if value is not None}
        assert given.items() <= shown[section].items()
    assert "kept no mistakes.json" not in page
    assert "<path" in page[page.index('<section id="curves"') : page.index('<section id="runs"')]
