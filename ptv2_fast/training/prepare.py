"""Everything of a run that can fail on bad input, done before anything is written."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ptv2_fast.encoders import FAMILIES
from ptv2_fast.encoders.checkpointing import checkpoint_activations
from ptv2_fast.tasks import DataOptions, make_task
from ptv2_fast.tasks.sources import find_sources
from ptv2_fast.tasks.task import Examples, Features, Task, label_remarks
from ptv2_fast.training import run_folder
from ptv2_fast.training.methods import longest_input, prefix_config, prepare_model
from ptv2_fast.training.multitask.config import MultiTaskConfig
from ptv2_fast.training.multitask.heads import TaskHeads, take_head
from ptv2_fast.training.multitask.order import batches_per_epoch
from ptv2_fast.training.multitask.shared_pass import check_shared_pass
from ptv2_fast.training.options import ModelOptions, RunConfig
from ptv2_fast.training.order import Batching
from ptv2_fast.training.prepared_run import PreparedRun, RunPart
from ptv2_fast.training.pretrained import load_pretrained
from ptv2_fast.training.trainer import MEAN
from ptv2_fast.training.trainer_arguments import training_arguments
from ptv2_fast.training.warm_start import find_starts, warm_start


def prepare(
    config: run_folder.Config, folder: Path, *, resume: bool = False, overwrite: bool = False
) -> PreparedRun:
    """Read the data, load the model, attach what the method trains, and check the folder.

    Args:
        config: of a run of one task or of several.
        folder: where `train` will write.
        resume: go on with the run in the folder.
        overwrite: delete the run in the folder when training starts.

    Raises:
        ValueError, OSError: for any bad input.
    """
    if config.model.method == "p-tuning-v2":
        prefix_config(config.model)  # a bad prefix is known before the data is read
    find_starts(config.model)
    configs, several = config.parts(), isinstance(config, MultiTaskConfig)
    before = None
    if not several and resume and (folder / run_folder.CONFIG).is_file():
        _, before = run_folder.read_run_config(folder)
    data = {name: read_data(own, before) for name, own in configs.items()}

    set_seed(config.training.seed)
    model, tokenizer, heads = _load_model(config.model, list(data.values()))
    if isinstance(config, MultiTaskConfig) and config.mixed_batches:
        check_shared_pass(model)
    parts = {}
    for name, (task, examples, labels) in data.items():
        max_length = choose_max_length(configs[name].data, model, config.model)
        features = {
            split: task.featurize(part, tokenizer, labels, max_length)
            for split, part in examples.items()
        }
        place = run_folder.part_folder(folder, name) if several else folder
        parts[name] = RunPart(
            task, labels, tokenizer, max_length, model, configs[name], features, place
        )
    train = [part.features["train"] for part in parts.values()]
    prepare_model(model, config.model, _token_ids(train))
    first = next(iter(parts.values()))
    started_from = warm_start(model, config.model, None if several else first.config.data)
    if config.training.gradient_checkpointing:
        checkpoint_activations(model)

    batching = Batching.of(config.training)
    lengths = [batching.lengths_of(features) for features in train]
    together = batching.count([*itertools.chain.from_iterable(lengths)])
    temperature = config.temperature if isinstance(config, MultiTaskConfig) else 1.0
    batches = batches_per_epoch([*map(len, lengths)], together, temperature)
    rows = sum(map(batching.examples, lengths, batches))
    is_scored = any("validation" in part.features for part in parts.values())
    metric = MEAN if several else first.task.metric
    arguments = training_arguments(
        first.config, folder, rows, sum(batches), metric if is_scored else None
    )
    if several:
        # A batch does not reach every head; transformers' own choice depends on checkpointing.
        arguments.ddp_find_unused_parameters = True
    run = PreparedRun(
        config, model, tokenizer, parts, heads, batches, arguments, folder, resume, overwrite,
        started_from,
    )  # fmt: skip
    run_folder.check_run(folder, config, run.metadata, resume=resume, overwrite=overwrite)
    return run


def _token_ids(train: list[Features]) -> datasets.Dataset:
    """The token ids of all training examples, to start a prefix from."""
    return datasets.concatenate_datasets([part.table.select_columns("input_ids") for part in train])


def _load_model(
    options: ModelOptions, data: Sequence[tuple[Task, Any, list[str]]]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, TaskHeads | None]:
    """The pretrained model, with a head for each of several data sets.

    Every head is made as for its data set alone; all but the first one's encoder is dropped.
    """
    model, heads = None, []
    for task, _, labels in data:
        loaded, tokenizer = load_pretrained(options, task, labels)
        model = model or loaded
        if len(data) > 1:
            heads.append(take_head(loaded))
    assert model is not None
    return model, tokenizer, TaskHeads(model, heads) if heads else None


def read_data(
    config: RunConfig, before: dict[str, Any] | None = None
) -> tuple[Task, dict[str, Examples], list[str]]:
    """The task, the examples of each split, and the labels of the training split.

    Args:
        config: the run.
        before: the metadata of a run that goes on.

    Raises:
        ValueError, OSError: for bad data, or a label that the training split lacks.
    """
    task = make_task(config.data)
    examples = {name: task.read(source) for name, source in find_sources(config.data).items()}
    examples["train"] = task.trainable(examples["train"])
    # Of all training examples: the few that are drawn may lack a label of the other splits.
    labels = task.find_labels(examples["train"])
    remarks = examples["train"].remarks | label_remarks(labels)
    examples["train"] = dataclasses.replace(examples["train"], remarks=remarks)
    for part in examples.values():
        task.check_labels(part, labels)
    if before is None:
        task.learn(examples["train"], labels)
    else:
        task.remember(before)
    limits = {"train": config.data.max_train_examples, "test": None}
    for name, part in examples.items():
        kind = name.partition("_")[0]  # of "validation_mismatched", "test_wsj"
        count = limits.get(kind, config.data.max_eval_examples)
        if count is not None and count < len(part):
            drawn = part.draw(count, config.training.seed)
            if kind == "train":  # which may have a part of a group
                drawn = drawn[:count]
            examples[name] = dataclasses.replace(part.select(drawn), drawn_from=len(part))
    return task, examples, labels


def choose_max_length(data: DataOptions, model: PreTrainedModel, options: ModelOptions) -> int:
    """The longest input in tokens: what the data options ask for, or what the model allows.

    The default of a published data set gives way where the model allows less. Without a table of
    positions a model was made for a length, and takes a longer one that is asked for.

    Raises:
        ValueError: when more is asked for than a table of positions allows, saying how many remain.
    """
    limit, why = longest_input(model, options)
    if limit < 3:  # two special tokens and one of the text
        raise ValueError(f"num_virtual_tokens: expected room for an input, got none: {why}")
    if data.max_length is not None and data.max_length > limit:
        family = FAMILIES.get(model.config.model_type)
        if family is not None and not family.has_position_table(model.config):
            return data.max_length
        raise ValueError(f"max_length: expected at most {limit}, got {data.max_length}; {why}")
    return min(limit, data.with_benchmark_defaults().max_length or limit)
