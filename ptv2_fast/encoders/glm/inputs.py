"""What a GLM's forward takes beside tokens: what is visible to a row, and two positions a token."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptv2_fast.ops.validation import values_are_known

MASKS, START = ("[MASK]", "[sMASK]", "[gMASK]"), "<|startofpiece|>"


class Visible(NamedTuple):
    """Which columns are visible to a row: those of `tokens` that are True, and, with
    `context_lengths`, of these j <= i and j < context_lengths.

    `tokens`: bool [B, T], False for padding; `context_lengths`: int32 [B]. None: all.
    """

    tokens: Tensor | None
    context_lengths: Tensor | None

    def as_added(self, length: int, dtype: torch.dtype) -> Tensor | None:
        """What eager attention adds to its scores, [B, 1, 1 or T, T]: 0, or the lowest number."""
        visible = None if self.tokens is None else self.tokens[:, None, None]
        if self.context_lengths is not None:
            column = torch.arange(length, device=self.context_lengths.device)
            context = self.context_lengths[:, None, None, None]
            to_row = (column <= column[:, None]) | (column < context)
            visible = to_row if visible is None else to_row & visible
        if visible is None:
            return None
        added = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return added.masked_fill(~visible, torch.finfo(dtype).min)


def read_mask(
    attention_mask: Any, context_lengths: Any, shape: torch.Size, device: torch.device
) -> Visible:
    """Both ways in which the published code takes a mask.

    Args:
        attention_mask: [B, T], False or 0 for padding; or, instead of `context_lengths`, those.
        context_lengths: the length of part A of each text ("sep"): an integer, or integers [B].
        shape: (B, T).
        device: of the tokens.

    Raises:
        ValueError: for another shape, both lengths, and lengths outside 0..T.
    """
    batch, length = shape
    if isinstance(attention_mask, int) or (
        isinstance(attention_mask, Tensor) and attention_mask.dim() < 2
    ):
        if context_lengths is not None:
            raise ValueError(
                "attention_mask: expected a mask of padding [B, T] beside context_lengths, got "
                "lengths as well"
            )
        attention_mask, context_lengths = None, attention_mask
    tokens = None
    if attention_mask is not None:
        given = getattr(attention_mask, "shape", type(attention_mask).__name__)
        if given != shape:
            raise ValueError(
                f"attention_mask: expected shape [B, T] = {list(shape)}, or the lengths of part A, "
                f"[B] or one for all, got {list(given) if isinstance(given, tuple) else given}; "
                "a mask of rows and columns is not served"
            )
        tokens = attention_mask.bool()
    if context_lengths is None:
        return Visible(tokens, None)
    lengths = torch.as_tensor(context_lengths, device=device)
    if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.dim() > 1:
        raise ValueError(
            "context_lengths: expected integers [B] or one for all, got "
            f"{lengths.dtype} {list(lengths.shape)}"
        )
    if lengths.numel() != batch and lengths.numel() != 1:
        raise ValueError(f"context_lengths: expected [B] = [{batch}], got {list(lengths.shape)}")
    if lengths.device.type == "cpu" and values_are_known(lengths):
        outside = [number for number in lengths.flatten().tolist() if not 0 <= number <= length]
        if outside:
            raise ValueError(f"context_lengths: expected values in 0..{length}, got {outside}")
    return Visible(tokens, lengths.to(torch.int32).expand(batch).contiguous())


class BlankTokens(NamedTuple):
    """The ids of the tokens that stand for blanks, and of the one that starts to fill one."""

    masks: tuple[int, ...]
    start: int


def blank_tokens(tokenizer: Any) -> BlankTokens:
    """Those of a tokenizer; [sMASK] and [gMASK] are blanks as well, where it has them.

    Raises:
        ValueError: for one that lacks [MASK] or <|startofpiece|>, naming it.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in (MASKS[0], START) if token not in vocabulary]
    if missing:
        raise ValueError(
            f"tokenizer: expected one with the tokens {MASKS[0]} and {START} of GLM, got a "
            f"{type(tokenizer).__name__} without {' and '.join(missing)}"
        )
    masks = tuple(vocabulary[token] for token in MASKS if token in vocabulary)
    return BlankTokens(masks, vocabulary[START])


def blank_inputs(input_ids: Tensor, tokens: BlankTokens) -> dict[str, Tensor]:
    """Positions and lengths of texts with blanks and the pieces that fill them, for a forward.

    Part A is what stands in front of the first <|startofpiece|>; each of those starts a piece. The
    n-th piece fills the n-th blank of part A: all of it has that blank's position, and block
    positions 1, 2, ... Everything sees part A, and pieces what stands in front.

    Args:
        input_ids: [B, T], padded on the right.
        tokens: of the tokenizer.

    Returns:
        position_ids, int64 [B, 2, T], and context_lengths, int32 [B].

    Raises:
        ValueError: for a text without a piece, or with more pieces than blanks, naming it.
    """
    starts = input_ids == tokens.start
    pieces = starts.cumsum(dim=1)  # 0 in part A
    is_blank = torch.isin(input_ids, torch.tensor(tokens.masks, device=input_ids.device))
    blanks = is_blank & (pieces == 0)
    for row, (count, found) in enumerate(
        zip(starts.sum(dim=1).tolist(), blanks.sum(dim=1).tolist(), strict=True)
    ):
        if count == 0:
            raise ValueError(f"input_ids: expected {START} in each text, got none in text {row}")
        if count > found:
            raise ValueError(
                f"input_ids: expected a {MASKS[0]} for each {START}, got {found} for {count} in "
                f"text {row}"
            )
    column = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    # Of each text first its blanks, in order.
    order = torch.argsort((~blanks).to(torch.uint8), dim=1, stable=True)
    of_piece = order.gather(1, (pieces - 1).clamp(min=0))
    piece_start = torch.where(starts, column, 0).cummax(dim=1).values
    in_piece = pieces > 0
    position = torch.where(in_piece, of_piece, column)
    block = torch.where(in_piece, column - piece_start + 1, 0)
    lengths = (pieces == 0).sum(dim=1, dtype=torch.int32)
    return {"position_ids": torch.stack((position, block), dim=1), "context_lengths": lengths}
