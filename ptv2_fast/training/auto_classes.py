"""transformers' auto classes open adapters, and so does whoever opens models by them.

sentence-transformers, SetFit and pipelines reopen the folders that they wrote, to resume, to take
back the best checkpoint, to load. Importing this module registers us; in a process without it, an
adapter's config.json says what to call.
"""

import os
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ptv2_fast.encoders.adapter_files import CONFIG_NAME
from ptv2_fast.files import NO_MODEL, find_description

AUTO_CLASSES = (
    "AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering", "AutoModelForMultipleChoice",
)  # fmt: skip
_CLASS = re.compile(r"[A-Z][A-Za-z0-9]*?(?:Encoder)?(Model|For[A-Z][A-Za-z]*)")
# The way to a folder, which is there already, and what every configuration says.
_WITHOUT_MEANING = {
    "adapter_kwargs", "cache_dir", "code_revision", "dtype", "force_download", "local_files_only",
    "model_type", "proxies", "revision", "subfolder", "token", "transformers_version",
    "trust_remote_code",
}  # fmt: skip


def auto_class_of(model_class: str) -> str | None:
    """The auto class that makes models of a class of transformers; None for heads not served."""
    match = _CLASS.fullmatch(model_class)
    auto = f"AutoModel{match[1].removeprefix('Model')}" if match else None
    return auto if auto in AUTO_CLASSES else None


class AdapterConfig(PretrainedConfig):
    """What the config.json beside an adapter is to transformers."""

    model_type = NO_MODEL["model_type"]


class _Opener:
    """Stands for the class of a model where transformers looks one up by its configuration."""

    config_class = AdapterConfig
    auto_class = ""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        config: PretrainedConfig,
        dtype: torch.dtype | str | None = None,
        **options: Any,
    ) -> PreTrainedModel:
        """The model that an adapter was made for, with it, in eval mode and without gradients.

        Raises:
            ValueError: as `load`; for a run's own folder, an adapter of another head, and options
                that have no meaning here.
        """
        from ptv2_fast.training.models import load  # which takes seconds to import

        if find_description(folder) is None:
            raise ValueError(f"{folder}: expected an adapter with {CONFIG_NAME}, got none; call "
                             "ptv2_fast.load(folder)")  # fmt: skip
        # Those of a configuration's names are in it.
        given = {**options, **{name: True for name in config.to_diff_dict()}}
        unknown = sorted(
            name
            for name, value in given.items()
            if value is not None and name not in _WITHOUT_MEANING and not name.startswith("_")
        )
        if unknown:
            raise ValueError(f"{folder}: expected no options but dtype with an adapter, got "
                             f"{unknown}; call ptv2_fast.load_adapter(model, folder)")  # fmt: skip
        model = load(folder).model
        if auto_class_of(type(model).__name__) != cls.auto_class:
            raise ValueError(
                f"{folder}: expected an adapter for {cls.auto_class}, got one of a "
                f"{type(model).__name__}"
            )
        if isinstance(dtype, torch.dtype):  # not "auto"
            nn.Module.to(model, dtype)
        return model


AutoConfig.register(AdapterConfig.model_type, AdapterConfig)
for _name in AUTO_CLASSES:
    getattr(transformers, _name).register(
        AdapterConfig, type(_name, (_Opener,), {"auto_class": _name})
    )
