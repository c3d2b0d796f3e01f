"""ptv2-fast tasks: the rows of the paper, other published data sets, and the recipes."""

import dataclasses
import json
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from ptv2_fast.cli.parser import BadInput, add_command
from ptv2_fast.recipes import load_recipe, recipes
from ptv2_fast.recipes.published import COLUMNS, TITLES, PublishedScore, published_scores
from ptv2_fast.tasks.benchmarks import BENCHMARKS, Benchmark
from ptv2_fast.tasks.hints import hint

_WIDTH = 80
_TABLES = {
    "Table 2": "SuperGLUE, validation sets",
    "Table 3": "NER, question answering, semantic role labelling",
    "Table 4": "linear layer against the language model's head (RoBERTa-large)",
}
_HUB = {"bert-large": "google-bert/bert-large-cased", "roberta-large": "FacebookAI/roberta-large"}
_PRESETS = {
    "text-classification": "preset-classification-large",
    "multiple-choice": "preset-classification-large",
    "token-classification": "preset-tagging-large",
    "semantic-role-labeling": "preset-tagging-large",
    "question-answering": "preset-qa-large",
}
_NOTE = """\
Data come from the Hugging Face hub, or from official files in --data-dir.
These commands give the column PT-2. For the others add
  FT      --method fine-tuning --learning-rate 2e-5 --num-train-epochs 10
  PT      --method prompt-tuning --learning-rate 0.1, or --method p-tuning-v1
  MPT-2   --start-from RUN --init normal, RUN being made by
          `ptv2-fast multitask` from the data sets of the family
`ptv2-fast tasks NAME` shows one data set or recipe, with published scores.
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table of the paper for one model: `words` is its command."""

    table: str
    model: str
    words: tuple[str, ...]
    recipe: str | None = None


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "tasks", _tasks, "list the published data sets and the recipes")
    parser.add_argument("name", nargs="?", help="show this data set or recipe only")
    parser.add_argument("--json", action="store_true", help="for programs")


def _tasks(options: dict[str, Any]) -> None:
    name = options["name"]
    known = (*BENCHMARKS, *recipes())
    if name is not None and name not in known:
        raise BadInput(
            f"name: expected a published data set or a recipe, got {name!r}"
            f"{hint(name, known)}; without a name all are listed"
        )
    if options["json"]:
        print(json.dumps(_as_json(name), indent=2))
        return
    lines = _overview() if name is None else _task(name) if name in BENCHMARKS else _recipe(name)
    for line in lines:
        print(line)


# What there is


def rows_of(task: str) -> list[Row]:
    """The rows of the paper's tables for one data set, in the paper's order."""
    scores = [s for s in published_scores() if s.task == task and s.source in _TABLES]
    keys = dict.fromkeys((s.source, s.model, s.head) for s in scores)
    return [_row(BENCHMARKS[task], *key) for key in keys]


def _row(benchmark: Benchmark, table: str, model: str, head: str) -> Row:
    own = f"{benchmark.name}-{model}"
    recipe, preset = own if own in recipes() else None, _PRESETS[benchmark.family]
    words = [recipe or preset]
    if recipe is None:
        words += ["--task", benchmark.name, "--model", _HUB.get(model, model)]
        if preset == "preset-tagging-large":  # the paper's scores are of each word's best label
            words += ["--decoding", "argmax"]
    if head == "lm":
        words += ["--head", "lm"]
        own += "-lm"
    return Row(table, model, _train(benchmark, own, *words), recipe)


def plain_command(benchmark: Benchmark) -> tuple[str, ...]:
    """The command of a data set that the paper does not have."""
    preset, name = _PRESETS[benchmark.family], benchmark.name
    return _train(benchmark, name, preset, "--task", name)


def _train(benchmark: Benchmark, run: str, recipe: str, *words: str) -> tuple[str, ...]:
    """A command with what is needed where the data are not on the hub."""
    folder = () if benchmark.hub else ("--data-dir", f"data/{benchmark.name}")
    return ("train", "--recipe", recipe, *words, *folder, "--output", f"runs/{run}")


def _data_of(benchmark: Benchmark) -> str:
    files = ", ".join("|".join(names) for names in benchmark.files.values())
    if benchmark.hub is None:
        return f"--data-dir with {files}"
    name, config = benchmark.hub
    return f"hub {name}{f' ({config})' if config else ''}, or --data-dir with {files}"


def _as_json(name: str | None) -> dict[str, Any]:
    tasks = [_task_json(b) for b in BENCHMARKS.values() if name in (None, b.name)]
    chosen = [dataclasses.asdict(load_recipe(r)) for r in recipes() if name in (None, r)]
    return {"tasks": tasks, "recipes": chosen}


def _task_json(benchmark: Benchmark) -> dict[str, Any]:
    name = benchmark.name
    rows = [
        {"table": row.table, "model": row.model, "recipe": row.recipe,
         "command": ["ptv2-fast", *row.words]}
        for row in rows_of(name)
    ]  # fmt: skip
    scores = [dataclasses.asdict(f) for f in published_scores() if f.task == name]
    kept = ("name", "title", "suite", "family", "metrics", "templates", "hub", "files", "options")
    return {
        **{key: getattr(benchmark, key) for key in kept},
        "command": ["ptv2-fast", *plain_command(benchmark)],
        "rows": rows,
        "published": scores,
    }


# As text


def _overview() -> Iterator[str]:
    for table, title in _TABLES.items():
        yield f"{table}: {title}"
        for name, benchmark in BENCHMARKS.items():
            rows = [row for row in rows_of(name) if row.table == table]
            if rows:
                yield ""
                yield from _summary(benchmark)
                yield from _commands(row.words for row in rows)
        yield ""
    yield "Not in the paper's tables"
    in_paper = {score.task for score in published_scores()}
    for benchmark in BENCHMARKS.values():
        if benchmark.name not in in_paper:
            yield ""
            yield from _summary(benchmark)
            yield from _commands([plain_command(benchmark)])
    yield ""
    yield "Recipes, for --recipe"
    yield ""
    for name in recipes():
        yield from _wrap(f"{name:<28}  {load_recipe(name).description}", 32, first=2)
    yield ""
    yield from _NOTE.splitlines()


def _summary(benchmark: Benchmark) -> Iterator[str]:
    about = [benchmark.title, benchmark.suite, benchmark.family, ", ".join(benchmark.metrics)]
    if len(benchmark.templates) > 1:
        about.append(f"templates {', '.join(benchmark.templates)}")
    yield from _wrap(f"{benchmark.name:<11} {' · '.join(about)}", 14, first=2)
    yield from _wrap(_data_of(benchmark), 14)


def _commands(commands: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Commands to copy: lines that are too long go on after a backslash."""
    for words in dict.fromkeys(commands):
        # An option and its value stay on one line.
        line, *parts = " ".join((" " * 3, "ptv2-fast", *words)).replace(" --", "\n--").split("\n")
        for part in parts:
            if len(line) + 1 + len(part) > _WIDTH - 2:
                yield f"{line} \\"
                line = " " * 8 + part
            else:
                line += f" {part}"
        yield line


def _wrap(text: str, indent: int, first: int | None = None) -> list[str]:
    start = indent if first is None else first
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=" " * start,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _task(name: str) -> Iterator[str]:
    benchmark = BENCHMARKS[name]
    yield f"{benchmark.title} ({benchmark.suite}): --task {name}"
    yield f"  family      {benchmark.family}"
    metrics = f"{', '.join(benchmark.metrics)}; the first selects the checkpoint"
    yield from _wrap(f"metrics     {metrics}", 14, first=2)
    yield f"  templates   {', '.join(benchmark.templates)}; the first is the default"
    if benchmark.hub:
        splits = ", ".join(f"{ours} = {theirs}" for ours, theirs in benchmark.hub_splits.items())
        yield f"  hub         {' '.join(filter(None, benchmark.hub))}"
        yield from _wrap(splits, 14)
    yield "  files that --data-dir must hold, in it or in its folder " + benchmark.title
    for split, names in benchmark.files.items():
        need = "" if split in ("train", "validation") else " (may be absent)"
        yield from _wrap(f"{split:<11} {' or '.join(names)}{need}", 16, first=4)
    if benchmark.rows is not None and benchmark.rows.__doc__:
        yield from _wrap("phrased as  " + " ".join(benchmark.rows.__doc__.split()), 14, first=2)
    if benchmark.options:
        given = ", ".join(f"{key} {value}" for key, value in benchmark.options.items())
        yield from _wrap("defaults    " + given, 14, first=2)
    yield "  commands"
    yield from _commands([row.words for row in rows_of(name)] or [plain_command(benchmark)])
    if scores := [score for score in published_scores() if score.task == name]:
        yield from _scores(scores)


def _scores(scores: list[PublishedScore]) -> Iterator[str]:
    yield "  published, in percent; ? = not compared with a written source"
    yield " " * 4 + f"{'':<46}" + "".join(f"{column:>7}" for column in COLUMNS)
    table: dict[str, dict[str, str]] = {}
    for f in scores:
        head = ", lm head" if f.head == "lm" else ""
        split = "" if f.split == "validation" else f" {f.split}"
        source = f.source.split(" ")[0] if f.source not in _TABLES else f.source
        label = f"{source}, {TITLES[f.model]}{head}, {f.metric}{split}"
        table.setdefault(label, {})[f.column] = f"{f.value:.1f}{' ' if f.verified else '?'}"
    for label, cells in table.items():
        values = "".join(f"{cells.get(column, ''):>7}" for column in COLUMNS)
        yield f"    {label:<46}{values}".rstrip()


def _recipe(name: str) -> Iterator[str]:
    recipe = load_recipe(name)
    yield from _wrap(f"{name}: {recipe.description}", 2, first=0)
    for option, value in recipe.options.items():
        yield f"  {option}: {json.dumps(value)}"
    if "task" in recipe.options:
        yield from _commands([("train", "--recipe", name, "--output", f"runs/{name}")])
