"""A model of an adapter's class on the frozen parts of one that is there already."""

import copy
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.encoders.vocabulary import ROWS_NAME


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
) -> PreTrainedModel:
    """A model in eval mode that shares what is frozen with a backbone; the rest is to be loaded.

    Args:
        backbone: of the bank, as it is without a prefix.
        kind: of the model.
        tensors: of the adapter, by their names in the model: not shared.
        labels: by number.
    """
    config = copy.deepcopy(backbone.config)
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
    dtype = old.dtype if stored is None else stored.dtype
    if same is not None:
        new = same.detach().to(dtype, copy=True)
    else:
        new = torch.zeros(old.shape, dtype=dtype, device=backbone.device)
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


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
    own = dict(backbone.named_parameters())
    stem = "" if model.base_model is model else f"{model.base_model_prefix}."
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
