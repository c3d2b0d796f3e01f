"""What heads make of pad tokens, which have no states in frozen blocks.

Question answering chooses a position. In transformers' loss every column of a batch competes, pad
tokens as well, so that a text's loss depends on the longest text beside it. Here the logits of pads
are the lowest number there is, in frozen blocks and on the hook path: the loss of a padded batch is
the mean of what its texts have alone.

A summary of all tokens ("mean", "last") reads pads as transformers computes them, and takes the
hook path where a batch has some. Other heads of transformers read the first token, or leave pads to
the labels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ptv2_fast.encoders.attention_hook import STATE_ARGUMENT

_HEAD = "qa_outputs"  # transformers' name for it in every model


def leave_pads_out(model: nn.Module, last_layer: nn.Module) -> list[Any]:
    """Hook a model's head for question answering, if it has one.

    Args:
        model: of a supported family.
        last_layer: of its encoder.

    Returns:
        The handles that take the hooks away.
    """
    head = getattr(model, _HEAD, None)
    if not isinstance(head, nn.Module):
        return []
    return [
        last_layer.register_forward_hook(_clear_pads, with_kwargs=True),
        head.register_forward_hook(_hide_pads),
    ]


def reads_pads(model: nn.Module) -> bool:
    """Whether the logits of a model of transformers depend on the states of pad tokens."""
    return getattr(getattr(model, "sequence_summary", None), "summary_type", "first") != "first"


def _clear_pads(layer: nn.Module, args: tuple, kwargs: dict[str, Any], states: Tensor) -> Tensor:
    """States [B, T, C] with zeros for pad tokens, as frozen blocks give them."""
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    if mask is None or kwargs[STATE_ARGUMENT].run is not None:
        return states
    return states.masked_fill(~mask.bool()[..., None], 0.0)


def _hide_pads(head: nn.Module, args: tuple, logits: Tensor) -> Tensor:
    """Logits [B, T, 2] without those of positions whose states are zero throughout."""
    pads = (args[0] == 0).all(dim=-1, keepdim=True)
    return logits.masked_fill(pads, torch.finfo(logits.dtype).min)
