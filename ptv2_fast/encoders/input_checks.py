"""What an attached model refuses at the start of a forward, each with one clear error."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.encoders.family import Family

# Versions of transformers name the cache differently.
_UNSERVED_ARGUMENTS = (
    "cache",
    "past_key_values",
    "encoder_hidden_states",
    "encoder_attention_mask",
)


def check_arguments(
    arguments: dict[str, Any], model: PreTrainedModel, family: Family, positions_taken: int
) -> None:
    """Check the arguments of the backbone's forward, by name.

    Raises:
        ValueError: for a cache, cross attention, is_causal, output_attentions, a mask that is not
            [B, T], or more tokens than positions remain.
    """
    for name in _UNSERVED_ARGUMENTS:
        if arguments.get(name) is not None:
            raise ValueError(f"{name}: expected None on a model with a prefix, got a value")
    if family.is_decoder and arguments.get("use_cache"):
        raise ValueError(
            "use_cache: expected None or False on a model with a prefix, which does not generate, "
            "got True"
        )
    if arguments.get("is_causal"):
        raise ValueError("is_causal: expected False (an encoder), got True")
    wants_attentions = arguments.get("output_attentions")
    if wants_attentions or (wants_attentions is None and model.config.output_attentions):
        raise ValueError(
            "output_attentions: expected False, got True (the fused attention never forms the "
            "probabilities)"
        )
    tokens = input_tokens(arguments)
    if tokens is None:
        return  # transformers' own error names the two arguments
    mask = arguments.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(f"attention_mask: expected a tensor [B, T], got a {type(mask).__name__}")
    if mask is not None and mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"attention_mask: expected shape [B, T] = {list(tokens.shape[:2])}, got "
            f"{list(mask.shape)}"
        )
    has_table = family.has_position_table(model.config)
    if has_table and arguments.get("position_ids") is None:
        _check_length(arguments.get("input_ids"), tokens.shape[1], model, family, positions_taken)


def input_tokens(arguments: dict[str, Any]) -> Tensor | None:
    """Token ids [B, T], or the embeddings [B, T, C] that stand for them; None without either."""
    input_ids = arguments.get("input_ids")
    return arguments.get("inputs_embeds") if input_ids is None else input_ids


def _check_length(
    input_ids: Tensor | None, length: int, model: PreTrainedModel, family: Family, taken: int
) -> None:
    limit = family.max_positions(model.config)
    if length <= limit - taken:
        return
    if family.pads_keep_position and input_ids is not None:
        # Pads take no position here, so a padded batch may be wider than the position table.
        length = int(input_ids.ne(model.config.pad_token_id).sum(dim=1).max())
    if length > limit - taken:
        reason = f", because position_offset='prefix' takes {taken} of them" if taken else ""
        raise ValueError(
            f"input_ids: expected at most {limit - taken} tokens, got {length}; "
            f"{type(model).__name__} has {limit} positions and {limit - taken} remain{reason}"
        )


def refuse_replica(module: nn.Module, args: tuple) -> None:
    """A hook in front of the backbone.

    Raises:
        RuntimeError: when `module` is a replica that nn.DataParallel made.
    """
    if getattr(module, "_is_replica", False):
        raise RuntimeError(
            "nn.DataParallel cannot train a prefix: its replicas are thrown away after each "
            "step; use DistributedDataParallel (torchrun) or show the process one GPU"
        )
