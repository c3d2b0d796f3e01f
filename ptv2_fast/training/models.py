"""What runs trained: written into their folders, and loaded from there or from adapters alone."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptv2_fast.adapters import (
    check_tensors,
    load_adapter,
    read_config,
    read_labels,
    save_adapter,
)
from ptv2_fast.encoders.adapter_files import read_adapter, read_average, read_tensors
from ptv2_fast.encoders.attachment import ENCODER_NAME
from ptv2_fast.tasks import make_task
from ptv2_fast.tasks.task import Task
from ptv2_fast.training import run_folder
from ptv2_fast.training.auto_classes import AUTO_CLASSES, auto_class_of
from ptv2_fast.training.baselines import (
    LORA,
    PROMPT,
    final_tensors,
    trained_tensors,
    write_tensors,
)
from ptv2_fast.training.methods import prepare_model
from ptv2_fast.training.options import ModelOptions, RunConfig
from ptv2_fast.training.predictions import BoundTask
from ptv2_fast.training.pretrained import (
    fit_inputs,
    load_config,
    load_pretrained,
    load_tokenizer,
    read_pretrained,
    reading,
    require_finite_weights,
)
from ptv2_fast.training.run_lookup import find_run, locate


def save_trained(model: PreTrainedModel, method: str, folder: Path) -> None:
    """Write what the method trained into a run folder."""
    if method == "p-tuning-v2":
        save_adapter(model, folder / run_folder.ADAPTER)
    elif method == "fine-tuning":
        temporary = folder / f"{run_folder.MODEL}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        shutil.rmtree(folder / run_folder.MODEL, ignore_errors=True)
        os.replace(temporary, folder / run_folder.MODEL)
    else:
        write_tensors(folder / run_folder.TRAINED, final_tensors(model))


@dataclasses.dataclass(eq=False)
class TaskModel(BoundTask):
    """The same with its model, which has the head of the task, and the options of the run."""

    model: PreTrainedModel
    config: RunConfig


class OpenedRun(NamedTuple):
    """What a finished run says about itself.

    Attributes:
        folder: of the run.
        checkpoint: the one that is named instead of what the run ended with, or None.
    """

    folder: Path
    checkpoint: Path | None
    config: RunConfig
    task: Task
    labels: list[str]
    max_length: int

    @property
    def adapter(self) -> Path:
        """The folder of the adapter that a run of P-Tuning v2 trained."""
        return self.checkpoint or self.folder / run_folder.ADAPTER


def open_run(folder: Path, changes: dict[str, Any] | None = None) -> OpenedRun:
    """Read what a run is, without its model.

    Args:
        folder: of the run, or of one of its checkpoints.
        changes: data options to use instead of the run's, such as other columns.

    Raises:
        ValueError, OSError: for a folder without a run.
    """
    folder, checkpoint = find_run(folder)
    config, metadata = run_folder.read_run_config(folder)
    # How the run was carried out is not what it is: its cache may be anywhere.
    own = {"feature_cache": None, "preprocessing_num_workers": 1}
    task = make_task(config.data.changed(**own, **(changes or {})))
    task.remember(metadata)
    labels, max_length = metadata["labels"], metadata["max_length"]
    return OpenedRun(folder, checkpoint, config, task, labels, max_length)


def load_run(folder: Path, changes: dict[str, Any] | None = None) -> TaskModel:
    """Load what a run trained, in eval mode; the folder runs no code and names no place to write.

    Args:
        folder: of the run, or of one of its checkpoints.
        changes: data options to use instead of the run's, such as other columns.

    Raises:
        ValueError, OSError: for a folder without a finished run, a corrupt or foreign adapter, or
            a pretrained model that is gone.
    """
    opened = open_run(folder, changes)
    options, task, labels = opened.config.model, opened.task, opened.labels
    tokenizer = load_tokenizer(opened.folder / run_folder.TOKENIZER)
    model: Any
    if options.method == "fine-tuning":
        model = _load_whole(opened)
        fit_inputs(model, tokenizer)
        task.adapt_model(model, tokenizer, labels)
    else:
        model, _ = load_pretrained(options, task, labels)
        fit_inputs(model, tokenizer)
        if options.method == "p-tuning-v2":
            load_adapter(model, opened.adapter)
        elif opened.checkpoint is not None:
            raise ValueError(f"run: expected a finished run of {options.method}, got its "
                             f"{opened.checkpoint.name}")  # fmt: skip
        else:
            _load_tensors(model, options, opened.folder / run_folder.TRAINED)
    if torch.cuda.is_available():
        model.cuda()
    return TaskModel(task, labels, tokenizer, opened.max_length, model.eval(), opened.config)


def _load_whole(run: OpenedRun) -> PreTrainedModel:
    """The model that fine-tuning wrote."""
    folder = run.checkpoint or run.folder / run_folder.MODEL
    _require(folder / "config.json")
    with reading(f"model: {folder}"):
        model, report = getattr(transformers, run.task.model_class).from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    if report["missing_keys"]:
        raise ValueError(
            f"{folder}: expected every weight of {type(model).__name__}, missing "
            f"{sorted(report['missing_keys'])!r:.200}"
        )
    model.load_state_dict(read_average(folder), strict=False)
    require_finite_weights(model, folder)
    return model


class Loaded(NamedTuple):
    """A trained model, ready to use.

    Attributes:
        model: of a class of transformers, in eval mode; on the GPU where there is one.
        tokenizer: that of its training.
        labels: by number, as the head numbers them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    labels: list[str]


def load(folder: str | os.PathLike) -> Loaded:
    """Load a trained model, its tokenizer and its labels; code that comes with it does not run.

    Args:
        folder: of a finished run of any method; of a checkpoint of a run; or of an adapter that
            `save_adapter`, `save_pretrained` or Trainer wrote, whose base model is then loaded by
            its name.

    Returns:
        A named tuple: `model, tokenizer, labels = load("runs/ner")`.

    Raises:
        ValueError: for a folder without any of them, one of several runs (naming them), one that is
            corrupt, or a base model that cannot be loaded.
    """
    if not isinstance(folder, str | os.PathLike):
        raise ValueError(f"folder: expected a path, got {folder!r:.100}")
    folder = Path(folder)
    try:
        if locate(folder).run is None:
            return _load_alone(folder)
        run = load_run(folder)
    except OSError as error:
        raise ValueError(f"{folder}: {error}") from error
    return Loaded(run.model, run.tokenizer, run.labels)


def _load_alone(folder: Path) -> Loaded:
    """An adapter outside a run, into the model that it names, in the dtype of its head."""
    description, tensors = read_adapter(folder)
    read_config(description, folder)
    labels = read_labels(description, folder)
    base, made_for = description.get("base_model"), description["model_class"]
    auto = auto_class_of(str(made_for))
    if not isinstance(base, str) or not base or auto is None:
        raise ValueError(
            f"{folder}: expected an adapter that names its base model, and one of the heads "
            f"{[*AUTO_CLASSES]}, got {base!r:.100} and {made_for!r:.100}; make the model and call "
            "ptv2_fast.load_adapter(model, folder)"
        )
    heads = [t for name, t in tensors.items() if not name.startswith(ENCODER_NAME) and t.numel()]
    dtypes = {tensor.dtype for tensor in heads if tensor.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    if str(made_for).endswith("EncoderModel"):  # whose AutoModel has a decoder too
        auto = "AutoModelForTextEncoding"
    config = load_config(base, num_labels=len(labels))
    model, drawn = read_pretrained(auto, base, config, dtype)
    missing = sorted(set(drawn) - set(tensors))
    if missing:
        raise ValueError(
            f"{folder}: expected every weight in the adapter or in its base model {base}, missing "
            f"{missing!r:.300}"
        )
    load_adapter(model, folder)
    if torch.cuda.is_available():
        model.cuda()
    own = (folder / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(folder if own else base)
    fit_inputs(model, tokenizer)
    return Loaded(model, tokenizer, [labels[number] for number in range(len(labels))])


def _require(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"run: expected a finished run, got no {file}")


def _load_tensors(model: PreTrainedModel, options: ModelOptions, file: Path) -> None:
    """Prepare the model by its method and fill in the trained tensors."""
    _require(file)
    tensors = read_tensors(file)
    if options.method == "p-tuning-v1":  # of which the vectors were kept
        options = options.changed(method="prompt-tuning")
    _check_sizes(tensors, options, file)
    prepare_model(model, options)
    targets = trained_tensors(model)
    if set(tensors) != set(targets):
        raise ValueError(
            f"{file}: expected the trained tensors of {options.method}, missing "
            f"{sorted(set(targets) - set(tensors))!r:.150}, not expected "
            f"{sorted(set(tensors) - set(targets))!r:.150}"
        )
    check_tensors(tensors, targets, str(file))
    model.load_state_dict(tensors, strict=False)


def _check_sizes(tensors: dict[str, Tensor], options: ModelOptions, file: Path) -> None:
    """Compare the sizes that the options name with the tensors, before any is allocated."""
    if options.method == "prompt-tuning":
        given, name = options.num_virtual_tokens, "num_virtual_tokens"
        found = {len(t) for key, t in tensors.items() if key == f"{PROMPT}.weight"}
    elif options.method == "lora":
        given, name = options.lora_rank, "lora_rank"
        found = {len(t) for key, t in tensors.items() if f"{LORA}A." in key}
    else:
        return
    if found != {given}:
        raise ValueError(f"{file}: expected tensors of {name} {given}, got {sorted(found)}")
