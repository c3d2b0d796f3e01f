"""The rows of a mixed batch: what they are, what is expected of them, which share a pass."""

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ptv2_fast.adapters.bank_members import Member, Place
from ptv2_fast.encoders.bank_attachment import AdapterRows
from ptv2_fast.encoders.family import Family

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What stands for the tokens of texts: its shape, and its dtypes.
_SHAPES = {
    "input_ids": ("[B, T]", (torch.int64, torch.int32)),
    "inputs_embeds": ("[B, T, C]", _FLOATS),
}


class Row(NamedTuple):
    """One result of a batch: the text that it is of, and its adapter, None for the bare encoder."""

    text: int
    member: Member | None


def check_inputs(inputs: dict[str, Tensor], known: tuple[str, ...]) -> int:
    """The number of texts.

    Args:
        inputs: by name.
        known: names that the encoder takes.

    Raises:
        ValueError: for a name that the encoder does not know, and what is no tensor of as many
            texts as the others.
    """
    unknown = [name for name in inputs if name not in known]
    if unknown:
        raise ValueError(f"{unknown[0]}: expected None, which this encoder does not take, got one")
    tokens = [inputs[name] for name in _SHAPES if name in inputs]
    if len(tokens) != 1:
        raise ValueError("input_ids: expected these or inputs_embeds, got both or neither")
    for name in _SHAPES:
        if name in inputs:
            _check_tokens(name, inputs[name])
    for name, tensor in inputs.items():
        if not isinstance(tensor, Tensor) or tensor.dim() < 1 or len(tensor) != len(tokens[0]):
            shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name}: expected a tensor of {len(tokens[0])} texts, got {shape}")
    mask, expected = inputs.get("attention_mask"), tokens[0].shape[:2]
    if mask is not None and mask.shape != expected:
        raise ValueError(
            f"attention_mask: expected shape [B, T] = {list(expected)}, got {list(mask.shape)}"
        )
    return len(tokens[0])


def _check_tokens(name: str, tensor: object) -> None:
    shape, kinds = _SHAPES[name]
    expected = f"{name}: expected a tensor {shape} with tokens, one of {kinds}"
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{expected}, got a {type(tensor).__name__}")
    if tensor.dim() != shape.count(",") + 1 or tensor.shape[1] < 1 or tensor.dtype not in kinds:
        raise ValueError(f"{expected}, got {list(tensor.shape)} of {tensor.dtype}")


def select(inputs: dict[str, Tensor], texts: list[int]) -> dict[str, Tensor]:
    """The inputs of some texts, in this order."""
    if texts == [*range(len(next(iter(inputs.values()))))]:
        return inputs
    return {name: tensor[texts] for name, tensor in inputs.items()}


def places_of(mask: Tensor | None, batch: int) -> list[Place]:
    """Where the tokens of each text are."""
    if mask is None:
        return [slice(None)] * batch
    mask = mask.bool()
    is_right_padded = (mask[:, 1:] <= mask[:, :-1]).all()
    # One copy to the host for all.
    *lengths, is_right = torch.cat((mask.sum(dim=1), is_right_padded.long()[None])).tolist()
    return [slice(length) for length in lengths] if is_right else list(mask.unbind(0))


def passes(rows: list[Row], is_training: bool, apart: bool) -> list[list[int]]:
    """The numbers of the rows of each pass.

    In training, adapters of one pass have one probability of dropout on their prefix. Where some
    have values of their own inside of the layers, the rows of each stand together.

    Args:
        rows: of a batch.
        is_training: dropout is on.
        apart: adapters with such values have passes of their own.
    """
    found: dict[Any, list[int]] = {}
    for number, (_, member) in enumerate(rows):
        key: Any = 0.0
        if member is not None and (member.runs_alone or (apart and member.values is not None)):
            key = member
        elif member is not None and is_training:
            key = member.prefix_dropout
        found.setdefault(key, []).append(number)
    order = {member: n for n, member in enumerate(dict.fromkeys(row.member for row in rows))}
    for numbers in found.values():
        if any(_has_values(rows[number].member) for number in numbers):
            numbers.sort(key=lambda number: order[rows[number].member])
    return list(found.values())


def adapters_of(rows: list[Row]) -> AdapterRows | None:
    """What the adapters of a pass have inside of the layers, or None."""
    if not any(_has_values(row.member) for row in rows):
        return None
    counts = Counter(row.member for row in rows)
    values = [None if member is None else member.values for member in counts]
    return AdapterRows(values, list(counts.values()))


def _has_values(member: Member | None) -> bool:
    return member is not None and member.values is not None


def check_lengths(
    inputs: dict[str, Tensor], rows: list[Row], family: Family, config: PretrainedConfig
) -> None:
    """Check that each text and the positions in front of it fit into the encoder's table.

    Of texts with positions of their own nothing is known.

    Raises:
        ValueError: naming the first that does not.
    """
    offsets = [0 if row.member is None else row.member.offset for row in rows]
    tokens = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"]
    has_own = "position_ids" in inputs or not family.has_position_table(config)
    limit = None if has_own else family.max_positions(config)
    if limit is None or tokens.shape[1] + max(offsets, default=0) <= limit:
        return
    if family.pads_keep_position and "input_ids" in inputs:
        lengths = tokens.ne(config.pad_token_id).sum(dim=1).tolist()
    elif "attention_mask" in inputs:
        columns = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        lengths = (inputs["attention_mask"].bool() * columns).amax(dim=1).tolist()
    else:
        lengths = [tokens.shape[1]] * len(tokens)
    for row, offset in zip(rows, offsets, strict=True):
        if lengths[row.text] + offset > limit:
            raise ValueError(
                f"input_ids: expected at most {limit - offset} tokens in text {row.text}, got "
                f"{lengths[row.text]}; the encoder has {limit} positions, and the prefix of "
                f"its adapter takes {offset} of them"
            )
