"""Prefix keys of a decoder that rotates keys, with tokens counted from P and from 0.

PEFT's tokens stand at P, P + 1, ..., and its prefix keys are not rotated. A score depends on how
far query and key are turned against each other, so that turning the prefix keys back by P gives
the same scores with tokens at 0, 1, ...
"""

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ptv2_fast.encoders.family import Family


def rotates(family: Family) -> bool:
    """Whether a backbone of this family that has a cache rotates its keys."""
    return family.is_decoder and family.position_types is None


@torch.no_grad()
def turn_keys(table: Tensor, backbone: nn.Module, family: Family, positions: int) -> Tensor:
    """The table of a prefix [P, 2 * L * H * D] with its keys turned on by `positions`.

    Args:
        table: in any dtype.
        backbone: the model without its head; prefixed in all of its layers.
        family: its row in the table of families.
        positions: may be negative.

    Returns:
        In the dtype of the table.
    """
    config: Any = backbone.config
    heads, width = family.key_shape(config)
    rows = table.double().unflatten(1, (-1, 2, heads, width)).clone()  # [P, L, 2, H, D]
    for layer in range(rows.shape[1]):
        cosine, sine = _angles(backbone, layer, positions, width)
        keys = rows[:, layer, 0]
        half = torch.cat((-keys[..., width // 2 :], keys[..., : width // 2]), dim=-1)
        rows[:, layer, 0] = keys * cosine + half * sine
    return rows.flatten(1).to(table.dtype)


def _angles(backbone: Any, layer: int, positions: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [D] of the rotation by so many positions in a layer."""
    rotary = backbone.rotary_emb
    kinds = {}
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        kinds["layer_type"] = backbone.config.layer_types[layer]
    device = backbone.get_input_embeddings().weight.device
    states = torch.zeros(1, 1, width, device=device)
    cosine, sine = rotary(states, torch.tensor([[positions]], device=device), **kinds)
    cosine, sine = cosine[0, 0].double().cpu(), sine[0, 0].double().cpu()
    size = (cosine**2 + sine**2).sqrt()  # some rotations scale, which the queries' still does
    return cosine / size, sine / size


def warn_of_windows(config: PretrainedConfig) -> None:
    """Warn where a layer has a window, out of which PEFT's prefix leaves with the text's length."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window is not None and (kinds is None or "sliding_attention" in kinds):
        warnings.warn(
            f"the model has windows of {window} tokens: PEFT's prefix is seen through them only "
            "while prefix and text fit in, while here every token sees it; longer texts get other "
            "results",
            stacklevel=4,
        )
