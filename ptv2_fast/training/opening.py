"""Open what was trained, in one call."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptv2_fast.adapters import load_adapter, read_config, read_labels
from ptv2_fast.encoders.adapter_files import read_adapter
from ptv2_fast.encoders.attachment import ENCODER_NAME
from ptv2_fast.training.auto_classes import AUTO_CLASSES, auto_class_of
from ptv2_fast.training.fitting import drop_unknown_inputs, fit_padding
from ptv2_fast.training.models import load_config, load_run, load_tokenizer, read_pretrained
from ptv2_fast.training.run_place import find_place


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
        if find_place(folder).run is None:
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
    fit_padding(model.config, tokenizer)
    drop_unknown_inputs(tokenizer, model)
    return Loaded(model, tokenizer, [labels[number] for number in range(len(labels))])
