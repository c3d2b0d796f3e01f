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

# transformers' name for the layer that gives the logits, and those of models that differ: the last
# one takes what the ones before it make of the states.
_HEAD = "qa_outputs"
_OTHER_HEADS = {"ModernBertForQuestionAnswering": ("head", "classifier")}


def leave_pads_out(model: nn.Module) -> list[Any]:
    """Hook a model's head for question answering, if it has one; pads need states of zeros then.

    Returns:
        The handles that take the hooks away.
    """
    *before, last = _OTHER_HEADS.get(type(model).__name__, (_HEAD,))
    head = getattr(model, last, None)
    if not isinstance(head, nn.Module):
        return []
    handles = [getattr(model, name).register_forward_hook(_keep_zeros) for name in before]
    return [*handles, head.register_forward_hook(_hide_pads)]


def reads_pads(model: nn.Module) -> bool:
    """Whether the logits of a model of transformers depend on the states of pad tokens."""
    return getattr(getattr(model, "sequence_summary", None), "summary_type", "first") != "first"


def clear_pads(output: Any, mask: Tensor | None) -> Any:
    """A backbone's output with zeros as the states of pad tokens, as frozen blocks give them.

    Args:
        output: of transformers, its first entry the states [B, T, C].
        mask: [B, T] or None.
    """
    if mask is None:
        return output
    states = output[0].masked_fill(~mask.bool()[..., None], 0.0)
    if isinstance(output, tuple):
        return (states, *output[1:])
    output.last_hidden_state = states
    return output


def _keep_zeros(module: nn.Module, args: tuple, states: Tensor) -> Tensor:
    """States [B, T, C] that are zero throughout where those that they were made of are."""
    return states.masked_fill((args[0] == 0).all(dim=-1, keepdim=True), 0.0)


def _hide_pads(head: nn.Module, args: tuple, logits: Tensor) -> Tensor:
    """Logits [B, T, 2] without those of positions whose states are zero throughout."""
    pads = (args[0] == 0).all(dim=-1, keepdim=True)
    return logits.masked_fill(pads, torch.finfo(logits.dtype).min)
