"""Options that were given stand against what a published data set sets; files of before hold."""

import argparse
import copy
import json
import pickle

import pytest
import yaml

from ptv2_fast.cli.parser import Parser, add_run_settings, run_config, with_dashes
from ptv2_fast.tasks import DataOptions, make_task
from ptv2_fast.tasks.benchmarks import BENCHMARKS
from ptv2_fast.tasks.option_table import GIVEN
from ptv2_fast.training.multitask.config import MultiTaskConfig
from ptv2_fast.training.option_files import read_config_file
from ptv2_fast.training.options import TABLES, ModelOptions, RunConfig, TrainingOptions, defaults
from ptv2_fast.training.run_folder import check_same_run, read_run_config, write_config
from ptv2_fast.training.search.space import check_space
from ptv2_fast.training.sweeps.plan import read_sweep, seeds_sweep, sweep_of

FOUND = {"labels": ["start", "end"], "max_length": 384}
PLAIN = defaults()


def others(name: str, value: object) -> list:
    """Values of an option that a published data set sets to another, the plain default first."""
    if name == "template":
        return []
    more = [not value] if isinstance(value, bool) else [value + 1, 0 if name != "max_length" else 1]
    return list(dict.fromkeys(v for v in [PLAIN[name], *more] if v not in (None, value)))


# (task, option, value) for each option of each data set, its own value among them.
GIVEN_VALUES = [
    (task, name, value)
    for task, benchmark in BENCHMARKS.items()
    for name, own in benchmark.options.items()
    for value in [own, *others(name, own)]
] + [
    (task, "template", template)
    for task, benchmark in BENCHMARKS.items()
    for template in benchmark.templates
]


def words_of(options: dict) -> list[str]:
    words = []
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(with_dashes(f"--{name}" if value else f"--no-{name}"))
        else:
            words += [with_dashes(f"--{name}"), str(value)]
    return words


def from_command_line(*words: str) -> RunConfig:
    """What `ptv2-fast train` makes of its options."""
    parser = Parser(prog="train", argument_default=argparse.SUPPRESS)
    add_run_settings(parser)
    parsed = vars(parser.parse_args(list(words)))
    return run_config({"recipe": None, "config": None} | parsed)


def test_every_option_that_a_data_set_sets_is_tested_against_the_plain_default():
    tested = {(task, name) for task, name, value in GIVEN_VALUES if value == PLAIN[name]}
    assert {("squad", "unanswerable"), ("stsb", "regression")} <= tested
    assert {name for _, name, _ in GIVEN_VALUES} == DataOptions.dependent


@pytest.mark.parametrize("task", BENCHMARKS)
def test_what_a_data_set_sets_stands_where_nothing_was_given(task):
    data = DataOptions(task=task)
    assert data.given == ["task"]
    own = {"template": BENCHMARKS[task].templates[0], **BENCHMARKS[task].options}
    assert {name: getattr(data, name) for name in own} == own
    rest = data.model_dump(exclude={"task", *own})
    assert rest == {name: PLAIN[name] for name in rest}
    unset = {name: None for name in own if PLAIN[name] is None}
    assert DataOptions(task=task, **unset).model_dump() == data.model_dump()
    assert DataOptions(task=task, **unset).given == ["task"], "None is not given"


@pytest.mark.parametrize(("task", "name", "value"), GIVEN_VALUES)
def test_what_is_given_stands_wherever_it_comes_from(task, name, value, tmp_path):
    own = {name: value}
    base = {"task": task, "model": "m"}
    plain = RunConfig.from_dict(base)
    files = {
        "given.json": json.dumps(base | own),
        "given.yaml": yaml.safe_dump({"data": {"task": task, **own}, "model": {"model": "m"}}),
    }
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    write_config(tmp_path, plain.changed(own), FOUND)
    tasks = [{"name": "a", "task": task, **own}, {"name": "b", "task": task}]
    multi = MultiTaskConfig.from_dict({"model": "m", "tasks": tasks})
    shared = MultiTaskConfig.from_dict({"model": "m", "tasks": [{"task": task}, tasks[1]], **own})
    write_config(tmp_path / "multi", multi, FOUND)
    seeds_sweep(plain.changed(own), [1, 2]).write(tmp_path)
    words = ["--task", task, "--model", "m"]
    data = {
        "Python": DataOptions(task=task, **own),
        "changed": DataOptions(task=task).changed(**own),
        "changed elsewhere": DataOptions(task=task, **own).changed(long_input="error"),
        "a dictionary": RunConfig.from_dict(base | own).data,
        "tables": RunConfig.from_dict(plain.changed(own).to_dict()).data,
        "all values": RunConfig.from_dict(plain.changed(own).flat()).data,
        "a copy": copy.deepcopy(pickle.loads(pickle.dumps(DataOptions(task=task, **own)))),
        "command line": from_command_line(*words, *words_of(own)).data,
        "over a file": from_command_line(
            "--config", str(tmp_path / "given.json"), *words_of(own)
        ).data,
        "a run's folder": read_run_config(tmp_path)[0].data,
        "a run's file": from_command_line("--config", str(tmp_path / "config.json")).data,
        "an override": sweep_of("own", plain, {"a": own}, [1]).configs()["a-seed-1"].data,
        "a sweep": read_sweep(tmp_path).configs()["seed-2"].data,
        "a task of several": multi.tasks[0],
        "one for all of several": shared.tasks[1],
        "a folder of several": read_run_config(tmp_path / "multi", MultiTaskConfig)[0].tasks[0],
    }
    data |= {file: from_command_line("--config", str(tmp_path / file)).data for file in files}
    for place, options in data.items():
        assert getattr(options, name) == value and name in options.given, place
    assert multi.tasks[1] == plain.data and multi.tasks[1].given == ["task"]
    if name != "template":
        check_space({name: {"choices": [value]}}, plain)


def earlier(config: RunConfig, **values) -> dict:
    """The tables that a version wrote which did not keep what was given, with its raw defaults."""
    raw = {name: PLAIN[name] for name in DataOptions.dependent if name not in config.data.given}
    tables = config.to_dict()
    del tables[GIVEN]
    tables["data"] |= raw | values
    return tables


@pytest.mark.parametrize("task", BENCHMARKS)
def test_a_run_of_before_means_what_it_meant(task, tmp_path):
    """It lists every option, and what had the plain default was what the data set sets."""
    config = RunConfig.from_dict({"task": task, "model": "m", "seed": 3, "decoding": "argmax"})
    tables = earlier(config)
    folders = {"run": {"found": FOUND}, "best": {}}
    for name, more in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(tables | more))
    flat = {k: v for table in tables.values() for k, v in table.items()}
    runs = {"seed-1": {"seed": 1}}
    (tmp_path / "sweep.json").write_text(
        json.dumps({"kind": "seeds", "runs": runs, "changes": runs, "base": flat})
    )
    read = {
        "evaluated": read_run_config(tmp_path / "run")[0],
        "repeated": RunConfig.from_dict(read_config_file(tmp_path / "run" / "config.json")),
        "a search's best": RunConfig.from_dict(read_config_file(tmp_path / "best" / "config.json")),
        "a sweep": read_sweep(tmp_path).base,
    }
    for place, again in read.items():
        assert again == config, place
        assert again.data.given == ["task", "decoding"], place
        assert again.training.given == ["batch_size", "seed"], "which was written out"
    check_same_run(tmp_path / "run", config)
    several = [{"name": name, **tables["data"]} for name in ("a", "b")]
    content = {"tasks": several, "model": tables["model"], "training": tables["training"]}
    (tmp_path / "multi").mkdir()
    (tmp_path / "multi" / "config.json").write_text(json.dumps(content | {"found": FOUND}))
    multi, _ = read_run_config(tmp_path / "multi", MultiTaskConfig)
    assert multi.tasks == (config.data, config.data) and multi.tasks[0].given == config.data.given


def test_a_run_goes_on_with_what_it_was_given(tmp_path):
    base = {"task": "squad", "model": "m"}
    plain, given = RunConfig.from_dict(base), RunConfig.from_dict(base | {"unanswerable": True})
    for name, config in (("plain", plain), ("given", given)):
        write_config(tmp_path / name, config, FOUND)
        check_same_run(tmp_path / name, config)
    # A run of before had the option taken back.
    (tmp_path / "before").mkdir()
    content = earlier(plain, unanswerable=True) | {"found": FOUND}
    (tmp_path / "before" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="unanswerable True against False"):
        check_same_run(tmp_path / "given", plain)
    for name in ("plain", "before"):
        with pytest.raises(ValueError, match="unanswerable False against True"):
            check_same_run(tmp_path / name, given)
        assert read_run_config(tmp_path / name)[0].data.changed(unanswerable=True).unanswerable


def test_a_file_of_a_run_goes_to_another_task_without_its_defaults(tmp_path):
    given = {"task": "conll2004", "model": "m", "max_length": 99, "conll_tag_column": 3}
    config = RunConfig.from_dict(given)
    assert config.data.conll_word_column == 1
    write_config(tmp_path, config, FOUND)
    file = str(tmp_path / "config.json")
    data = from_command_line("--config", file, "--task", "conll2003").data
    assert (data.conll_word_column, data.conll_tag_column, data.max_length) == (None, 3, 99)
    # A file that lists everything wins over a recipe, also by defaults.
    assert from_command_line("--recipe", "conll2004-roberta-large", "--config", file) == config


def test_what_is_scored_follows_what_is_given():
    """Not the published figures, where they are of something else."""
    labels, numbers = (make_task(DataOptions(task="stsb", regression=r)) for r in (False, True))
    assert labels.metric_names == ("accuracy", "f1") and numbers.metric_names == (
        "pearson",
        "spearmanr",
    )
    assert make_task(DataOptions(task="stsb")).metric_names == numbers.metric_names
    own = DataOptions(task="text-classification", regression=True)
    assert make_task(own).metric_names == numbers.metric_names
    squads = (make_task(DataOptions(task="squad", unanswerable=u)) for u in (False, True))
    assert ["1.1" in t.titles([])["f1"] for t in squads] == [True, False]


def test_values_stay_when_a_default_changes(tmp_path, monkeypatch):
    config = RunConfig.from_dict({"task": "squad", "model": "m"})
    write_config(tmp_path, config, FOUND)
    monkeypatch.setattr(DataOptions.model_fields["doc_stride"], "default", 64)
    DataOptions.model_rebuild(force=True)
    try:
        assert DataOptions(task="squad").doc_stride == 64
        data = read_run_config(tmp_path)[0].data
        assert data.doc_stride == 128 and "doc_stride" not in data.given
    finally:
        monkeypatch.undo()
        DataOptions.model_rebuild(force=True)


@pytest.mark.parametrize(
    ("table", "values", "message"),
    [
        (DataOptions, {"task": "rte", "max_lenght": 3}, "max_lenght: no such option; close to it"),
        (DataOptions, {"task": "rte", "long_input": "cut"},
         "long_input: expected one of ('truncate', 'error'), got 'cut'"),
        (DataOptions, {"task": "rte", "conll_comments": 1}, "expected true or false, got 1"),
        (DataOptions, {"task": "rte", "train_file": 3}, "train_file: expected None or text, got 3"),
        (DataOptions, {"task": "rte", "n_best": True}, "n_best: expected an integer >= 1, got Tru"),
        (DataOptions, {"task": "rte", "n_best": 2**70}, "n_best: expected an integer of 64 bits"),
        (DataOptions, {"task": "rte", "n_best": 2.0}, "n_best: expected an integer >= 1, got 2.0"),
        (ModelOptions, {"model": "m", "dropout": 1}, "None or a number in [0, 1), got 1"),
        (ModelOptions, {"model": "m", "lora_alpha": 0}, "lora_alpha: expected a number > 0, got 0"),
        (ModelOptions, {"model": "m", "method": "magic"}, "method: expected one of ('p-tuning-v2'"),
        (ModelOptions, {"model": "m", "memory_budget": "2"}, "None or an integer, got '2'"),
        (ModelOptions, {"model": "m", "prefix_dropout": float("nan")}, "in [0, 1), got nan"),
        (ModelOptions, {}, "model: expected a folder or a name on the hub, got None"),
        (TrainingOptions, {"learning_rate": float("inf")}, "None or a number > 0, got inf"),
        (TrainingOptions, {"learning_rate": 10**400}, "learning_rate: expected an integer of 64"),
        (TrainingOptions, {"weight_decay": float("nan")}, "expected a number >= 0, got nan"),
        (TrainingOptions, {"weight_decay": float("inf")}, "expected a number >= 0, got inf"),
        (TrainingOptions, {"ema_decay": 0}, "expected None or a number in (0, 1), got 0"),
        (TrainingOptions, {"seed": -1}, "seed: expected an integer in 0..2**32-1, got -1"),
        (TrainingOptions, {"save_steps": -1}, "expected None or an integer >= 0, got -1"),
    ],
)  # fmt: skip
def test_bad_values_are_named_in_one_line(table, values, message):
    with pytest.raises(ValueError) as raised:
        table(**values)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_table_takes_aliases_and_whole_numbers_and_cannot_be_changed_in_place():
    model = ModelOptions(model="m", pre_seq_len=5, hidden_dropout_prob=0)
    assert (model.num_virtual_tokens, model.dropout) == (5, 0.0) and type(model.dropout) is float
    assert model.given == ["model", "num_virtual_tokens", "dropout"]
    with pytest.raises(ValueError, match="frozen"):
        model.dropout = 0.5
    assert hash(model) == hash(ModelOptions(model="m", num_virtual_tokens=5, dropout=0.0))
    assert TrainingOptions(max_grad_norm=float("inf")).max_grad_norm == float("inf")


def test_a_list_of_what_was_given_is_checked():
    base = {"task": "squad", "model": "m", "unanswerable": True}
    assert RunConfig.from_dict(base | {GIVEN: ["task"]}).data.unanswerable is False
    for bad in ("task", [["task"]]):
        with pytest.raises(ValueError, match="given: expected a list of names, got"):
            RunConfig.from_dict(base | {GIVEN: bad})
    assert GIVEN not in {name for table in TABLES.values() for name in table.names()}
