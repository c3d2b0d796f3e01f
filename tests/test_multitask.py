"""Several data sets on one prefix: heads, batches, resuming, continuation, bad input."""

import collections
import copy
import dataclasses
import json
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from ptv2_fast import cli, load_adapter, save_adapter
from ptv2_fast.adapters import load_prefix
from ptv2_fast.training.callbacks import StepClock
from ptv2_fast.training.models import load_run
from ptv2_fast.training.multitask.config import MultiTaskConfig
from ptv2_fast.training.multitask.heads import TaskHeads, take_head
from ptv2_fast.training.multitask.order import (
    CombinedRows,
    MultiTaskOrder,
    batches_per_epoch,
)
from ptv2_fast.training.options import RunConfig, options_of_run
from ptv2_fast.training.order import Batching
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.run import train
from ptv2_fast.training.trainer import TaskTrainer
from tests.models import (
    P,
    attached,
    make_batch,
    one_thread,  # noqa: F401
    outputs_of,
    tiny_model,
)
from tests.tiny_run import save_tiny_model, tagged_sentences, write_conll, write_reviews

ADAPTER = "adapter/ptv2_adapter.safetensors"


def write_renamed(path: Path, count: int) -> str:
    """The tagged sentences with four labels of other names."""
    names = {"B-PER": "B-HUMAN", "B-LOC": "B-TOWN", "O": "O"}
    blocks = [
        "".join(f"{word} {'B-END' if word == '.' else names[tag]}\n" for word, tag in sentence)
        for sentence in tagged_sentences(count)
    ]
    path.write_text("\n".join(blocks), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("tiny")
    task = {"task": "token-classification"}
    return {
        "model": save_tiny_model(folder / "model"),
        "num_virtual_tokens": 4,
        "learning_rate": 0.1,
        "head_learning_rate": 0.03,
        "batch_size": 4,
        "dropout": 0.0,
        "progress": False,
        "tasks": [
            task
            | {
                "name": "first",
                "train_file": write_conll(folder / "train.txt", 24),
                "validation_file": write_conll(folder / "dev.txt", 8),
            },
            task
            | {
                "name": "second",
                "train_file": write_renamed(folder / "train2.txt", 18),
                "validation_file": write_renamed(folder / "dev2.txt", 6),
                "max_length": 20,
            },
        ],
        "reviews": write_reviews(folder / "reviews.csv", 8),
    }


def options_of(tiny, **changes) -> dict:
    return {**{name: value for name, value in tiny.items() if name != "reviews"}, **changes}


def multi_config(tiny, **changes) -> MultiTaskConfig:
    return MultiTaskConfig.from_dict(options_of(tiny, **changes))


def single_config(tiny, number: int = 0, **changes) -> RunConfig:
    values = options_of(tiny, **changes)
    data = {name: value for name, value in values.pop("tasks")[number].items() if name != "name"}
    return RunConfig.from_dict({**values, **data})


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "multi.json").write_text(json.dumps(options_of(tiny)))
    command = ["multitask", "--config", str(folder / "multi.json"), "--output"]
    assert cli.main([*command, str(folder / "multi"), "--init", "tokens",
                     "--num-train-epochs", "8"]) == 0  # fmt: skip
    return folder / "multi"


def test_one_prefix_learns_two_label_sets(trained, tiny, capsys):
    report = json.loads((trained / "report.json").read_text())
    assert set(report["metrics"]) == {"first/validation", "second/validation"}
    assert all(scores["f1"] > 0.9 for scores in report["metrics"].values())
    # Two layers of keys and values of 4 positions, and heads for three and four labels.
    assert report["trainable_parameters"] == 2 * 2 * 4 * 16 + (16 + 1) * 3 + (16 + 1) * 4
    # ceil((24 + 18) / 4) = 11 batches in proportion to 24 and 18: 6.3 and 4.7.
    counts = {name: task["batches_per_epoch"] for name, task in report["tasks"].items()}
    assert counts == {"first": 6, "second": 5} and report["steps"] == 8 * 11
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "eval_mean" in line]
    assert [line["step"] for line in scored] == [11 * epoch for epoch in range(1, 9)]
    for line in scored:
        assert line["eval_mean"] == (line["eval_first_f1"] + line["eval_second_f1"]) / 2
    config = json.loads((trained / "config.json").read_text())
    assert config["found"]["max_length"] == {"first": 24, "second": 20}


def test_each_data_set_has_a_run_folder_of_the_usual_form(trained, tiny, capsys):
    report = json.loads((trained / "report.json").read_text())
    mistakes = json.loads((trained / "mistakes.json").read_text())
    for task in tiny["tasks"]:
        single = str(trained / "tasks" / task["name"])
        assert cli.main(["eval", "--run", single, "--data", task["validation_file"]]) == 0
        scores = json.loads(capsys.readouterr().out)
        assert report["metrics"][f"{task['name']}/validation"].items() <= scores.items()
        assert mistakes[f"{task['name']}/validation"]["classes"] == scores["classes"]
    assert cli.main(["eval", "--run", str(trained), "--data", "x"]) == 2
    assert "its tasks are in" in capsys.readouterr().err


def test_numbers_of_batches_follow_the_sizes_and_the_temperature():
    # ceil(130 / 5) = 26 batches. Size ** 1: 20, 5, 1.
    assert batches_per_epoch([100, 25, 5], 26, temperature=1) == [20, 5, 1]
    # Size ** 1/2: 10, 5, 2.236 of 17.236, times 26: 15.08, 7.54, 3.37.
    assert batches_per_epoch([100, 25, 5], 26, temperature=2) == [15, 8, 3]
    # Size ** 0: 8.67 each; the two left over go to the larger ones.
    assert batches_per_epoch([100, 25, 5], 26, temperature=1e3) == [9, 9, 8]
    assert batches_per_epoch([1000, 1], 101, temperature=1) == [100, 1]
    assert batches_per_epoch([1, 1, 1], 1, temperature=1) == [1, 1, 1]
    # 0.9, 2.6, 2.5 of 6: a data set that got its one batch has no remainder left.
    assert batches_per_epoch([9, 26, 25], 6, temperature=1) == [1, 3, 2]


def test_batches_are_of_one_data_set_and_no_example_is_left_out():
    lengths = [torch.randint(1, 50, (10,)).tolist(), torch.randint(1, 50, (4,)).tolist()]
    order = MultiTaskOrder(lengths, [4, 1], Batching(3, None), seed=5)
    seen: collections.Counter = collections.Counter()
    epochs = []
    for epoch in range(20):
        order.set_epoch(epoch)
        rows = list(order)
        assert len(rows) == len(order) == 15
        batches = [rows[i : i + 3] for i in range(0, 15, 3)]
        assert sorted(sum(row >= 10 for row in batch) for batch in batches) == [0, 0, 0, 0, 3]
        seen.update(rows)
        epochs.append(rows)
    # 20 epochs of 12 rows of the first data set and of 3 rows of the second.
    assert seen == dict.fromkeys(range(10), 24) | dict.fromkeys(range(10, 14), 15)
    assert len({tuple(rows) for rows in epochs}) == 20
    fresh = MultiTaskOrder(lengths, [4, 1], Batching(3, None), seed=5)
    torch.rand(1)  # another state of the global generator
    fresh.set_epoch(7)
    assert list(fresh) == epochs[7]


def test_batches_of_tokens_are_of_one_data_set():
    lengths = [torch.randint(1, 50, (100,)).tolist(), torch.randint(1, 50, (40,)).tolist()]
    order = MultiTaskOrder(lengths, [8, 6], Batching(None, 250), seed=5)
    seen: collections.Counter = collections.Counter()
    for epoch in range(6):
        order.set_epoch(epoch)
        batches = order.batches()
        assert len(batches) == order.count == 14
        assert sum(map(len, batches)) == len(list(order)) == len(order)
        owners = [{row >= 100 for row in batch} for batch in batches]
        assert sorted(owners, key=max) == [{False}] * 8 + [{True}] * 6
        seen.update(row for batch in batches for row in batch)
    assert len(seen) == 140


def test_rows_of_several_tables_come_in_the_order_that_is_asked_for():
    tables = [datasets.Dataset.from_dict({"a": rows}) for rows in ([0, 1, 2], [3, 4])]
    rows = CombinedRows(tables)
    assert len(rows) == 5 and rows[1] == (0, {"a": 1})
    found = [(number, row["a"]) for number, row in rows.__getitems__([4, 0, 3, 2])]
    assert found == [(1, 4), (0, 0), (1, 3), (0, 2)]


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("head", ["sequence", "token", "question", "choice"])
def test_the_active_head_is_that_of_its_own_model(model_type, head):
    more = {"num_labels": 5} if head in ("sequence", "token") else {}
    models = [tiny_model(model_type, head), tiny_model(model_type, head, **more)]
    models[1].base_model.load_state_dict(models[0].base_model.state_dict())
    batch = make_batch(head)
    plain = [outputs_of(head, model(**batch)) for model in map(copy.deepcopy, models)]
    model = models[0]
    heads = TaskHeads(model, [take_head(one) for one in models])
    switched = []
    for number in (1, 0):
        heads.activate(number)
        switched.insert(0, outputs_of(head, model(**batch)))
        with heads.alone(number):
            assert outputs_of(head, model(**batch)).equal(switched[0])
    assert all(a.equal(b) for a, b in zip(plain, switched, strict=True))


def test_an_adapter_of_one_head_loads_into_a_plain_model(tmp_path):
    heads = TaskHeads(model := tiny_model(), [take_head(tiny_model()) for _ in range(2)])
    backbone = copy.deepcopy(model.base_model.state_dict())
    attached(model=model)
    with heads.alone(1):
        save_adapter(model, tmp_path)
    plain = tiny_model()
    plain.base_model.load_state_dict(backbone)
    batch = make_batch()
    assert load_adapter(plain, tmp_path)(**batch).logits.equal(model(**batch).logits)
    heads.activate(0)
    assert not plain(**batch).logits.equal(model(**batch).logits)


def make_trainer(tiny, folder: Path, **changes) -> TaskTrainer:
    return TaskTrainer(prepare(multi_config(tiny, **changes), folder), StepClock())


def test_a_batch_trains_the_prefix_and_its_own_head_only(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path)
    classifier = trainer.model.classifier
    seen = collections.Counter()
    for batch in trainer.get_train_dataloader():
        trainer.model.zero_grad()
        ((number, _),) = batch["parts"]
        seen[number] += 1
        trainer.compute_loss(trainer.model, batch).backward()
        assert trainer.model.prefix_encoder.embedding.weight.grad.abs().sum() > 0
        assert classifier.heads[number].weight.grad.abs().sum() > 0
        assert classifier.heads[1 - number].weight.grad is None
        assert trainer.model.config.num_labels == trainer.model.num_labels == (3, 4)[number]
    assert seen == {0: 6, 1: 5}
    with pytest.raises(RuntimeError, match="a batch holds rows of the data sets"):
        trainer.collate([trainer.train_dataset[0], trainer.train_dataset[24]])


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **unused):
        if state.global_step == 17:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("method", "batch"),
    [
        ("p-tuning-v2", {"batch_tokens": 40, "mixed_batches": True}),
        ("linear-probe", {}),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(method, batch, tiny, tmp_path):
    """In the middle of the second epoch; both heads and what they share."""
    if batch:
        tiny = {name: value for name, value in tiny.items() if name != "batch_size"} | batch
    config = multi_config(
        tiny, max_steps=30, save_steps=5, eval_steps=5, dropout=0.1, temperature=3, method=method
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    report = train(prepare(config, whole))
    with pytest.raises(KeyboardInterrupt):
        train(prepare(config, killed), [Kill()])
    cache = str(tmp_path / "cache")
    tasks = tuple(dataclasses.replace(task, feature_cache=cache) for task in config.tasks)
    config = dataclasses.replace(config, tasks=tasks)
    again = train(prepare(config, killed, resume=True))
    assert again["metrics"] == report["metrics"]
    assert report["mixed_batches"] is config.mixed_batches is ("mixed_batches" in batch)
    assert not (killed / "checkpoints").exists()
    file = ADAPTER if method == "p-tuning-v2" else "trained.safetensors"
    for name in ("first", "second"):
        paths = [folder / "tasks" / name / file for folder in (whole, killed)]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    with pytest.raises(ValueError, match=r"second\.max_length 20 against 19.*temperature 3.0 "):
        tasks = [tiny["tasks"][0], {**tiny["tasks"][1], "max_length": 19}]
        changed = multi_config(tiny, tasks=tasks, max_steps=30, save_steps=5, eval_steps=5,
                               dropout=0.1, method=method)  # fmt: skip
        prepare(changed, killed, resume=True)


@pytest.mark.parametrize("method", ["fine-tuning", "prompt-tuning"])
def test_other_methods_share_what_they_train(method, tiny, tmp_path):
    config = multi_config(tiny, method=method, max_steps=12, learning_rate=1e-2)
    report = train(prepare(config, tmp_path))
    runs = [load_run(tmp_path / "tasks" / name) for name in ("first", "second")]
    batch = {"input_ids": torch.tensor([[2, 5, 9, 3]])}
    assert [run.model(**batch).logits.shape[-1] for run in runs] == [3, 4]
    shared = "prompt" if method == "prompt-tuning" else "bert.encoder.layer.0.output.dense.weight"
    tensors = [[p for n, p in run.model.named_parameters() if n.startswith(shared)] for run in runs]
    assert tensors[0] and all(a.equal(b) for a, b in zip(*tensors, strict=True))
    assert report["method"] == method


@pytest.mark.parametrize("place", ["", "tasks/first", "tasks/first/adapter"])
def test_continuation_starts_with_the_trained_prefix_and_head(place, trained, tiny, tmp_path):
    config = single_config(tiny, start_from=str(trained / place), max_steps=1)
    prepared = prepare(config, tmp_path / "run")
    before = load_run(trained / "tasks" / "first")
    batch = {"input_ids": torch.tensor([[2, 5, 9, 11, 7, 3]])}
    expected = before.model(**batch).logits
    assert prepared.model.eval()(**batch).logits.equal(expected)
    assert prepared.model.prefix_encoder.embedding.weight.requires_grad
    names = None if place.endswith("adapter") else ["first", "second"]
    started = {"folder": str(trained / place), "trained_with": names, "head": True}
    assert prepared.metadata["started_from"] == started


def test_continuation_on_other_labels_takes_the_prefix_alone(trained, tiny, tmp_path):
    start = str(trained / "tasks" / "first")
    prepared = prepare(single_config(tiny, 1, start_from=start), tmp_path / "run")
    before = load_run(trained / "tasks" / "second")
    weights = [run.model.prefix_encoder.embedding.weight for run in (prepared, before)]
    assert weights[0].equal(weights[1])
    assert not prepared.model.classifier.weight.equal(before.model.classifier.weight)
    assert prepared.metadata["started_from"]["head"] is False
    whole = prepare(single_config(tiny, 1, start_from=str(trained)), tmp_path / "run")
    assert whole.model.classifier.weight.equal(before.model.classifier.weight)


def test_the_prefix_of_another_label_set_brings_its_pooler_but_no_head(tmp_path):
    save_adapter(source := attached("sequence"), tmp_path)
    target = attached(model=tiny_model("bert", "sequence", num_labels=5))
    head = target.classifier.weight.detach().clone()
    load_prefix(target, tmp_path)
    for name in ("prefix_encoder.embedding.weight", "bert.pooler.dense.weight"):
        assert target.get_parameter(name).equal(source.get_parameter(name))
    assert target.classifier.weight.equal(head) and target.config.num_labels == 5
    bare = attached("bare")
    with pytest.raises(ValueError, match="against"):
        load_prefix(attached("bare", num_virtual_tokens=P + 1), tmp_path)
    before = bare.prefix_encoder.embedding.weight.detach().clone()
    tensors = load_file(tmp_path / "ptv2_adapter.safetensors")
    del tensors["prefix_encoder.embedding.weight"]
    save_file(tensors, tmp_path / "ptv2_adapter.safetensors")
    with pytest.raises(ValueError, match=r"expected a tensor prefix_encoder\.embedding\.weight"):
        load_prefix(bare, tmp_path)
    assert bare.prefix_encoder.embedding.weight.equal(before)


BAD_START = {
    "P": ({"num_virtual_tokens": 5}, "num_virtual_tokens 4 against 5"),
    "layers": ({"depth": "2"}, r"layers None against \(1,\)"),
    "projection": ({"prefix_projection": True}, "prefix_projection False against True"),
    "folder": ({"start_from": "/nowhere"}, "start_from: expected the folder of a run or an"),
    "method": ({"method": "fine-tuning"}, "start_from: expected None for the method fine-tuning"),
    "init": ({"init": "tokens"}, "init: expected 'normal' with start_from"),
}


@pytest.mark.parametrize("case", BAD_START)
def test_bad_starts_are_refused_before_training(case, trained, tiny, tmp_path):
    changes, message = BAD_START[case]
    with pytest.raises(ValueError, match=message):
        prepare(single_config(tiny, **{"start_from": str(trained), **changes}), tmp_path / "run")


def test_a_start_from_another_encoder_or_an_unfinished_run_is_refused(trained, tiny, tmp_path):
    save_adapter(attached("token", num_virtual_tokens=4), tmp_path / "other")  # three layers
    with pytest.raises(ValueError, match="num_hidden_layers 3 against 2"):
        prepare(single_config(tiny, start_from=str(tmp_path / "other")), tmp_path / "run")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="start_from: expected a finished run of p-tuning-v2"):
        prepare(single_config(tiny, start_from=str(tmp_path / "begun")), tmp_path / "run")


def test_a_configuration_repeats_itself_and_shares_data_options(tiny):
    config = multi_config(tiny, long_input="error", temperature=2, **{"mixed-batches": True})
    assert [task.long_input for task in config.tasks] == ["error", "error"]
    assert [task.max_length for task in config.tasks] == [None, 20]
    content = json.loads(json.dumps(config.to_dict()))
    assert MultiTaskConfig.from_dict(content) == config
    assert config.mixed_batches and config.flat()["mixed_batches"]
    # A run of a version without --decoding and --mixed-batches.
    del content["tasks"][1]["decoding"], content["mixed_batches"]
    again = MultiTaskConfig.from_dict(options_of_run(content | {"found": {}}))
    assert [task.decoding for task in again.tasks] == [None, "argmax"]
    assert again.mixed_batches is False


def test_bad_configurations_name_what_is_wrong(tiny):
    first, second = tiny["tasks"]
    reviews = {"task": "text-classification", "train_file": tiny["reviews"]}
    for tasks, message in (
        ([first], "at least two data sets"),
        ({"first": first}, "expected a list of tables"),
        ([first, reviews], "one family.*'text-classification': 'text-classification'"),
        ([first, {**second, "name": "first"}], "a name of its own for each"),
        ([first, {**second, "name": "a/b"}], r"names of letters.*\['a/b'\]"),
        ([first, {**second, "name": 2004}], r"names of letters.*\[2004\]"),
        ([first, {**second, "seed": 1}], r"expected data options in the list, got \['seed'\]"),
        ([first, {**second, "trian_file": "x"}], "close to 'trian_file'"),
    ):
        with pytest.raises(ValueError, match=message):
            multi_config(tiny, tasks=tasks)
    with pytest.raises(ValueError, match="temperature: expected a number > 0, got 0"):
        multi_config(tiny, temperature=0)
    with pytest.raises(ValueError, match="mixed_batches: expected true or false, got 'yes'"):
        multi_config(tiny, mixed_batches="yes")
