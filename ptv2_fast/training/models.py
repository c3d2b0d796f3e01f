"""Pretrained encoders with a head in, trained ones out: loading and saving for every method."""

import dataclasses
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ptv2_fast.adapters import load_adapter, save_adapter
from ptv2_fast.tasks import make_task
from ptv2_fast.tasks.task import Task
from ptv2_fast.training import run_folder
from ptv2_fast.training.baselines import final_tensors, trained_tensors, write_tensors
from ptv2_fast.training.methods import prepare_model
from ptv2_fast.training.options import ModelOptions, RunConfig


def load_pretrained(
    options: ModelOptions, task: Task, labels: list[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pretrained encoder with the task's head for the labels, and its tokenizer.

    Warns when a head that should be pretrained is not.

    Raises:
        OSError, ValueError: for a model that cannot be loaded, or cannot serve the task.
    """
    changes: dict[str, Any] = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    if options.dropout is not None:
        changes["hidden_dropout_prob"] = options.dropout
        changes["attention_probs_dropout_prob"] = options.dropout
    if options.attention_dropout is not None:
        changes["attention_probs_dropout_prob"] = options.attention_dropout
    if options.head_dropout is not None:
        changes["classifier_dropout"] = options.head_dropout
    assert options.model is not None
    config = AutoConfig.from_pretrained(options.model, **changes)
    tokenizer = load_tokenizer(options.model)
    model, report = _model_class(task).from_pretrained(
        options.model, config=config, dtype=torch.float32, output_loading_info=True
    )
    if report["missing_keys"] and not task.head_is_new:
        warnings.warn(
            f"model: {options.model} has no pretrained head for {task.model_class}; a new one is "
            "used, which has to be trained from nothing",
            stacklevel=2,
        )
    task.adapt_model(model, tokenizer, labels)
    return model, tokenizer


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A fast tokenizer that also takes text split into words.

    Raises:
        ValueError: when there is no fast tokenizer of this model.
    """
    # Byte-level tokenizers refuse split words without the blank in front; others ignore it.
    tokenizer = AutoTokenizer.from_pretrained(name, add_prefix_space=True)
    if not tokenizer.is_fast:
        raise ValueError(f"model: expected one with a fast tokenizer, got {str(name)!r}")
    return tokenizer


def save_trained(model: PreTrainedModel, method: str, folder: Path) -> None:
    """Write what the method trained into a run folder."""
    if method == "p-tuning-v2":
        save_adapter(model, folder / run_folder.ADAPTER)
    elif method == "fine-tuning":
        temporary = folder / f"{run_folder.MODEL}.tmp"
        model.save_pretrained(temporary)
        shutil.rmtree(folder / run_folder.MODEL, ignore_errors=True)
        os.replace(temporary, folder / run_folder.MODEL)
    else:
        write_tensors(folder / run_folder.TRAINED, final_tensors(model))


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A finished run, loaded from its folder."""

    config: RunConfig
    task: Task
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    labels: list[str]
    max_length: int


def load_run(folder: Path, changes: dict[str, Any] | None = None) -> TrainedRun:
    """Load what a run trained, in eval mode.

    Args:
        folder: of the run.
        changes: data options to use instead of the run's, such as other columns.

    Raises:
        ValueError, OSError: for a folder without a finished run, a corrupt or foreign adapter, or
            a pretrained model that is gone.
    """
    config, found = run_folder.read_run_config(folder)
    data = dataclasses.replace(config.data, **(changes or {}))
    task, labels, method = make_task(data), found["labels"], config.model.method
    tokenizer = load_tokenizer(folder / run_folder.TOKENIZER)
    if method == "fine-tuning":
        directory = folder / run_folder.MODEL
        _require(directory / "config.json")
        model = _model_class(task).from_pretrained(directory, dtype=torch.float32)
        task.adapt_model(model, tokenizer, labels)
    else:
        model, _ = load_pretrained(config.model, task, labels)
        if method == "p-tuning-v2":
            load_adapter(model, folder / run_folder.ADAPTER)
        else:
            _load_tensors(model, config.model, folder / run_folder.TRAINED)
    if torch.cuda.is_available():
        model.cuda()
    return TrainedRun(config, task, model.eval(), tokenizer, labels, found["max_length"])


def _model_class(task: Task) -> Any:
    return getattr(transformers, task.model_class)


def _require(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"run: expected a finished run, got no {file}")


def _load_tensors(model: PreTrainedModel, options: ModelOptions, file: Path) -> None:
    """Prepare the model by its method and fill in the trained tensors."""
    _require(file)
    if options.method == "p-tuning-v1":  # of which the vectors were kept
        options = dataclasses.replace(options, method="prompt-tuning")
    prepare_model(model, options)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: corrupt or truncated safetensors file ({error})") from error
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: list(tensor.shape) for name, tensor in trained_tensors(model).items()}
    if shapes != expected:
        raise ValueError(f"{file}: expected tensors of the shapes {expected}, got {shapes}")
    model.load_state_dict(tensors, strict=False)
