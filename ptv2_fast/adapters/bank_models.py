"""Models of adapters on the frozen parts of one that is there already."""

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.encoders.families import find_family
from ptv2_fast.encoders.family import Family
from ptv2_fast.encoders.vocabulary import ROWS_NAME

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Of a configuration: what the head alone reads, and what changes no result outside of training.
_OF_HEADS = ("classifier", "cls_", "head_", "pooler", "qa_", "seq_classif", "summary_")
_WITHOUT_EFFECT = (
    "architectures", "bos_token_id", "chunk_size_feed_forward", "cls_token_id", "dtype",
    "eos_token_id", "finetuning_task", "id2label", "label2id", "num_labels", "output_attentions",
    "output_hidden_states", "problem_type", "reference_compile", "return_dict", "sep_token_id",
    "task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
    "vocab_size",
)  # fmt: skip


def find_class(backbone: PreTrainedModel, name: str, place: Any) -> type[PreTrainedModel]:
    """The class of this name, beside that of the backbone.

    Args:
        backbone: of the bank.
        name: of a class of models.
        place: where it was read, for the message.

    Raises:
        ValueError: when there is none.
    """
    beside = vars(sys.modules[type(backbone).__module__])
    found = beside.get(name) if isinstance(name, str) else None
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not is_model or not isinstance(backbone.config, cast(Any, found).config_class):
        raise ValueError(
            f"{place}: expected an adapter for a model on a {type(backbone).__name__}, got one of "
            f"{name!r:.100}; bank.add(name, attached_model) takes models of other classes"
        )
    return found  # type: ignore[return-value]


def model_around(
    backbone: PreTrainedModel,
    kind: type[PreTrainedModel],
    tensors: dict[str, Tensor],
    labels: dict[int, str],
    options: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """A model in eval mode that shares what is frozen with a backbone; the rest is to be loaded.

    Args:
        backbone: of the bank, as it is without a prefix.
        kind: of the model.
        tensors: of the adapter, by their names in the model: not shared.
        labels: by number.
        options: of the configuration, where they are not those of the backbone.
    """
    config = copy.deepcopy(backbone.config)
    for name, value in (options or {}).items():
        setattr(config, name, value)
    config.num_labels, config.id2label = len(labels), dict(labels)
    config.label2id = {label: number for number, label in labels.items()}
    with torch.device("meta"):
        model = kind(config)
    sources = dict(backbone.named_modules())
    inside = {id(module): name for name, module in model.base_model.named_modules()}
    words = model.get_input_embeddings() if ROWS_NAME in tensors else None
    made: dict[int, Tensor] = {}  # what is tied stays one
    for name, module in model.named_modules():
        source = sources.get(inside[id(module)]) if id(module) in inside else None
        for kept in (module._parameters, module._buffers):
            for key, old in kept.items():
                if old is not None and id(old) not in made:
                    stored = tensors.get(f"{name}.{key}" if name else key)
                    is_shared = stored is None and module is not words
                    made[id(old)] = _fill(old, _tensor_of(source, key), is_shared, stored, backbone)
                kept[key] = None if old is None else made[id(old)]  # type: ignore[assignment]
    return model.eval().requires_grad_(False)


def fit_dtypes(
    tensors: dict[str, Tensor],
    kind: type[PreTrainedModel],
    backbone: PreTrainedModel,
    family: Family,
) -> dict[str, Tensor]:
    """An adapter's tensors, those inside of the embeddings and layers in the dtype of a backbone.

    Args:
        tensors: by their names in a model.
        kind: of this model.
        backbone: of the bank.
        family: of this backbone.
    """
    stem, inside = f"{kind.base_model_prefix}.", tuple(f"{part}." for part in family.frozen)
    return {
        name: tensor.to(backbone.dtype)
        if name == ROWS_NAME or name.removeprefix(stem).startswith(inside)
        else tensor
        for name, tensor in tensors.items()
    }


def _tensor_of(module: nn.Module | None, key: str) -> Tensor | None:
    if module is None:
        return None
    found = module._parameters.get(key)
    return module._buffers.get(key) if found is None else found


def _fill(
    old: Tensor,
    same: Tensor | None,
    is_shared: bool,
    stored: Tensor | None,
    backbone: PreTrainedModel,
) -> Tensor:
    """The tensor that takes the place of one on the meta device.

    Args:
        old: on the meta device.
        same: that of the backbone, or None.
        is_shared: take that one.
        stored: that of the adapter, for its dtype.
        backbone: for the device.
    """
    if same is not None and is_shared:
        return same
    like = next((each for each in (stored, same) if each is not None), old)
    dtype = like.dtype
    if same is not None:
        new = same.detach().to(dtype, copy=True)
    else:
        new = torch.zeros(old.shape, dtype=dtype, device=backbone.device)
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def copy_around(
    backbone: PreTrainedModel, model: PreTrainedModel, tensors: dict[str, Tensor]
) -> PreTrainedModel:
    """A copy of an attached model that shares what is frozen with a backbone of the same weights.

    Args:
        backbone: of the bank.
        model: attached.
        tensors: of the adapter, by their names in the model: not shared.
    """
    own, stem = dict(backbone.named_parameters()), _stem(model)
    shared = {
        id(parameter): own[name]
        for name, parameter in model.base_model.named_parameters()
        if name in own and f"{stem}{name}" not in tensors and parameter.shape == own[name].shape
    }
    copied = copy.deepcopy(model, cast(Any, shared))
    copied.to(backbone.device)  # type: ignore[arg-type]
    return copied.eval()


def has_known_code(kind: type[PreTrainedModel]) -> bool:
    """Whether a class runs code of transformers or ours, which calls its backbone once."""
    return all(
        getattr(method, "__module__", "").startswith(("transformers.", "ptv2_fast."))
        for method in (kind.__init__, kind.forward)
    )


def head_options(model: PreTrainedModel, backbone: PreTrainedModel) -> dict[str, Any]:
    """What an attached model's configuration says of its head in another way than a backbone's.

    Raises:
        ValueError: when the configurations differ in what layers or embeddings may read.
    """
    # As JSON, in which lists and tuples are alike.
    given, own = (
        json.loads(each.config.to_json_string(use_diff=False)) for each in (model, backbone)
    )
    names = [
        name
        for name in given
        if given[name] != own.get(name, given[name])
        and not name.startswith("_")
        and "dropout" not in name
        and name not in _WITHOUT_EFFECT
    ]
    # Decoders classify by the last token that is no pad; others count positions from the pad token.
    of_heads: tuple[str, ...] = _OF_HEADS
    if not find_family(backbone.config).pads_keep_position:
        of_heads = (*_OF_HEADS, "pad_token_id")
    others = [
        f"{name} {given[name]!r:.100} against {own[name]!r:.100}"
        for name in names
        if not name.startswith(of_heads)
    ]
    if others:
        raise ValueError(
            "attached_model: expected the configuration of the bank's "
            f"{type(backbone).__name__}; model against bank: {', '.join(others)}"
        )
    return {name: getattr(model.config, name) for name in names}


def _stem(model: PreTrainedModel) -> str:
    """What is in front of the backbone's names in those of a model."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def check_same_weights(
    model: PreTrainedModel, backbone: PreTrainedModel, tensors: dict[str, Tensor]
) -> None:
    """Check that an attached model has the frozen weights of a backbone.

    Args:
        model: attached.
        backbone: without a prefix, of the same class as the model's.
        tensors: of the adapter, which may differ.

    Raises:
        ValueError: naming the first that differs.
    """
    own, stem = dict(backbone.named_parameters()), _stem(model)
    for name, parameter in model.base_model.named_parameters():
        given = own.get(name)
        if given is None or f"{stem}{name}" in tensors or parameter is given:
            continue
        rows = given[: len(parameter)] if ROWS_NAME not in tensors else given
        same = parameter[: len(rows)].to(rows)
        if same.shape != rows.shape or not torch.equal(same, rows):
            raise ValueError(
                f"attached_model: expected the weights of the bank's "
                f"{type(backbone).__name__}, got others in {name}"
            )


def move_model(
    model: PreTrainedModel, device: torch.device | str | None, dtype: torch.dtype | None
) -> None:
    """Move a model to where it is to run.

    Raises:
        ValueError: for another dtype than those of floating-point numbers, and a device that torch
            cannot use here; the model stays as it was.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype: expected None or one of {_DTYPES}, got {dtype!r}")
    if model.device.type == "meta":
        raise ValueError("model: expected one with weights, got one on the device meta")
    if device is not None:
        try:
            place = torch.device(device)
            if place.type == "meta":
                raise ValueError("it has no memory")
            model.to(place)  # type: ignore[arg-type]
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"device: expected one that torch can use here, got {device!r}: {error}"
            ) from error
    if dtype is not None:
        model.to(dtype)  # type: ignore[arg-type]


def warn_of_another_base(named: object, backbone: PreTrainedModel, place: Any) -> None:
    """Warn of an adapter that names another pretrained model, of the same sizes, than the bank's.

    Folders and names of the hub are compared by their last parts.

    Args:
        named: by the adapter.
        backbone: of the bank.
        place: of the adapter, for the message.
    """
    own = backbone.config.name_or_path
    if isinstance(named, str) and named and own and Path(named).name != Path(own).name:
        warnings.warn(
            f"{place}: the adapter was trained on {named!r:.200} and is loaded on {own!r:.200}; "
            "where these have other weights its results mean nothing",
            stacklevel=5,
        )
