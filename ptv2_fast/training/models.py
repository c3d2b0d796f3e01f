"""Pretrained encoders with a head in, trained ones out: loading and saving for every method."""

import contextlib
import dataclasses
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ptv2_fast.adapters import check_tensors, load_adapter, save_adapter
from ptv2_fast.encoders import FAMILIES
from ptv2_fast.encoders.family_table import is_encoder
from ptv2_fast.tasks import make_task
from ptv2_fast.tasks.task import Task
from ptv2_fast.training import run_folder
from ptv2_fast.training.baselines import (
    LORA,
    PROMPT,
    final_tensors,
    trained_tensors,
    write_tensors,
)
from ptv2_fast.training.fitting import (
    check_dropout,
    drop_unknown_inputs,
    fit_padding,
    set_dropout,
)
from ptv2_fast.training.methods import prepare_model
from ptv2_fast.training.options import ModelOptions, RunConfig
from ptv2_fast.training.run_place import find_run


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
    assert options.model is not None
    config = load_config(options.model, **changes)
    _check_class(config, task)
    set_dropout(config, options)
    tokenizer = load_tokenizer(options.model)
    fit_padding(config, tokenizer)
    if config.model_type in FAMILIES:
        FAMILIES[config.model_type].check_tokenizer(tokenizer)
    model, drawn = read_pretrained(task.model_class, options.model, config)
    _require_finite(model, options.model)
    missing = [name for name in drawn if _is_of_encoder(name, model)]
    if missing:
        raise ValueError(
            f"model: expected every weight of the encoder in {options.model}, missing "
            f"{sorted(missing)!r:.200}"
        )
    if drawn and not task.head_is_new:
        warnings.warn(
            f"model: {options.model} has no pretrained head for {task.model_class}; a new one is "
            "used, which has to be trained from nothing",
            stacklevel=2,
        )
    drop_unknown_inputs(tokenizer, model)
    check_dropout(model, options)
    task.adapt_model(model, tokenizer, labels)
    return model, tokenizer


def load_encoder(name: str) -> PreTrainedModel:
    """A pretrained encoder without a head, on the GPU where there is one.

    Raises:
        OSError, ValueError: for a model that cannot be loaded, lacks weights or is not served.
    """
    config = load_config(name)
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model: expected an encoder that is served (`ptv2-fast models` lists them), got the "
            f"model_type {config.model_type!r}"
        )
    auto = "AutoModelForTextEncoding" if config.is_encoder_decoder else "AutoModel"
    with reading(f"model: {name}"):
        model, report = getattr(transformers, auto).from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    _require_finite(model, name)
    missing = [key for key in report["missing_keys"] if "pooler" not in key]
    if missing:
        raise ValueError(
            f"model: expected every weight of the encoder in {name}, missing {missing!r:.200}"
        )
    return model.cuda() if torch.cuda.is_available() else model


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Within the context transformers reads a model, a configuration or a tokenizer.

    Args:
        what: is read, for the message.

    Raises:
        OSError, MemoryError: of the machine.
        ValueError: for whatever goes wrong in files of others: transformers and tokenizers check
            few of them, and their errors are of any type.
    """
    try:
        yield
    except BaseException as error:
        of_machine = isinstance(error, MemoryError) or getattr(error, "errno", None) is not None
        # A panic of tokenizers is no Exception.
        is_panic = type(error).__name__ == "PanicException"
        if of_machine or not (is_panic or isinstance(error, Exception)):
            raise
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        words = " ".join(str(error).split())
        raise ValueError(f"{what} cannot be read: {kind}{words:.300}") from error


def read_pretrained(
    auto: str, name: str, config: PretrainedConfig, dtype: torch.dtype = torch.float32
) -> tuple[Any, list[str]]:
    """A pretrained model, and the names of its weights that were drawn at random.

    The checkpoint lacks these, or has others in their place, as of a head for more labels.

    Args:
        auto: name of transformers' class.
        name: of the model, on the hub or a folder.
        config: of the model.
        dtype: of its weights.

    Raises:
        OSError, ValueError: when it cannot be read.
    """
    with reading(f"model: {name}"):
        model, report = getattr(transformers, auto).from_pretrained(
            name,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    others = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    return model, [*report["missing_keys"], *others]


def load_config(name: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a pretrained model; code that comes with it does not run.

    Raises:
        OSError, ValueError: when it cannot be read, or asks for code from elsewhere.
    """
    with reading(f"model: {name}"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **changes)
    attention = config._attn_implementation
    if attention is not None and not str(attention).isidentifier():  # a kernel of the hub
        raise ValueError(f"model: expected {name} to run without foreign code, got the attention "
                         f"implementation {attention!r:.100}")  # fmt: skip
    return config


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A fast tokenizer that also takes text split into words; code with it does not run.

    Args:
        name: on the hub, or a folder; a Path is a folder and never looked for on the hub.

    Raises:
        OSError, ValueError: when there is no fast tokenizer of this model, or a damaged one.
    """
    if isinstance(name, Path) and not name.is_dir():
        raise ValueError(f"tokenizer: expected a folder, got {str(name)!r}")
    # Byte-level tokenizers refuse split words without the blank in front; others ignore it.
    with reading(f"tokenizer: {name}"):
        tokenizer = AutoTokenizer.from_pretrained(
            name, add_prefix_space=True, trust_remote_code=False
        )
    if not tokenizer.is_fast:
        raise ValueError(f"model: expected one with a fast tokenizer, got {str(name)!r}")
    first = [*tokenizer.model_input_names][:1]
    if first != ["input_ids"]:  # by which batches are padded
        raise ValueError(
            f"tokenizer: expected model_input_names that begin with 'input_ids' in {name}, got "
            f"{first!r:.100}"
        )
    return tokenizer


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


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A finished run, loaded from its folder."""

    config: RunConfig
    task: Task
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    labels: list[str]
    max_length: int


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
    config, found = run_folder.read_run_config(folder)
    # How the run was carried out is not what it is: its cache may be anywhere.
    own = {"feature_cache": None, "preprocessing_num_workers": 1}
    task = make_task(config.data.changed(**own, **(changes or {})))
    task.remember(found)
    return OpenedRun(folder, checkpoint, config, task, found["labels"], found["max_length"])


def load_run(folder: Path, changes: dict[str, Any] | None = None) -> TrainedRun:
    """Load what a run trained, in eval mode; the folder runs no code and names no place to write.

    Args:
        folder: of the run, or of one of its checkpoints.
        changes: data options to use instead of the run's, such as other columns.

    Raises:
        ValueError, OSError: for a folder without a finished run, a corrupt or foreign adapter, or
            a pretrained model that is gone.
    """
    opened = open_run(folder, changes)
    folder, checkpoint, config, task, labels, max_length = opened
    method = config.model.method
    tokenizer = load_tokenizer(folder / run_folder.TOKENIZER)
    if method == "fine-tuning":
        directory = checkpoint or folder / run_folder.MODEL
        _require(directory / "config.json")
        with reading(f"model: {directory}"):
            model, report = _model_class(task).from_pretrained(
                directory,
                dtype=torch.float32,
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        if report["missing_keys"]:
            raise ValueError(
                f"{directory}: expected every weight of {type(model).__name__}, missing "
                f"{sorted(report['missing_keys'])!r:.200}"
            )
        _require_finite(model, directory)
        fit_padding(model.config, tokenizer)
        drop_unknown_inputs(tokenizer, model)
        task.adapt_model(model, tokenizer, labels)
    else:
        model, _ = load_pretrained(config.model, task, labels)
        fit_padding(model.config, tokenizer)
        drop_unknown_inputs(tokenizer, model)
        if method == "p-tuning-v2":
            load_adapter(model, opened.adapter)
        elif checkpoint is not None:
            raise ValueError(f"run: expected a finished run of {method}, got its {checkpoint.name}")
        else:
            _load_tensors(model, config.model, folder / run_folder.TRAINED)
    if torch.cuda.is_available():
        model.cuda()
    return TrainedRun(config, task, model.eval(), tokenizer, labels, max_length)


def _model_class(task: Task) -> Any:
    return getattr(transformers, task.model_class)


def _check_class(config: PretrainedConfig, task: Task) -> None:
    """Check that transformers has this encoder with the task's head, and what the encoder needs.

    Raises:
        ValueError: when it has not, or a default is missing that no task can give.
    """
    mapping, kind = _model_class(task)._model_mapping, type(config)
    is_served = kind in mapping
    if is_served and config.model_type in FAMILIES:
        is_served = is_encoder(mapping[kind], config)
    if not is_served:
        raise ValueError(
            f"model: expected an encoder with a class for {task.model_class}, got the model_type "
            f"{config.model_type!r} (`ptv2-fast models` lists the heads)"
        )
    if getattr(config, "default_language", "") is None:
        raise ValueError(
            "model: expected a configuration with a default_language, which chooses the language "
            f"adapters of {config.model_type!r}, got None"
        )


def _require(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"run: expected a finished run, got no {file}")


def _is_of_encoder(name: str, model: PreTrainedModel) -> bool:
    """Whether a method may leave a weight frozen; many encoders come without a pooler."""
    return name.startswith(f"{model.base_model_prefix}.") and "pooler" not in name


def _require_finite(model: PreTrainedModel, place: str | Path) -> None:
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        raise ValueError(f"{place}: expected finite numbers, got infinite or NaN ones in {bad[:3]}")


def _load_tensors(model: PreTrainedModel, options: ModelOptions, file: Path) -> None:
    """Prepare the model by its method and fill in the trained tensors."""
    _require(file)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: corrupt or truncated safetensors file ({error})") from error
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
