"""The packed layout of one batch: which tokens are attended, one behind the other, and back."""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Where the attended tokens of [B, T] lie among the N rows of the packed layout.

    Args:
        shape: (B, T) of the padded batch.
        index: int64 [N], the place of each row in [B * T]; None when every token is attended.
        cu_seqlens: int32 [B + 1], as in `prefix_attention`.
        coordinates: int32 [rows, 2], the sequence and the row in it of each row, for dropout.
        has_holes: tokens that are not attended lie between others, so that rows of the packed
            layout are closer to each other than their columns.

    On CPUs rows of zeros follow the N of the tokens: oneDNN keeps about half a megabyte for each
    number of rows that a product has seen, so there must not be many of them.
    """

    shape: tuple[int, int]
    index: Tensor | None
    cu_seqlens: Tensor
    coordinates: Tensor
    has_holes: bool = False

    @property
    def tokens(self) -> int:
        """N, the rows that belong to a token."""
        return self.shape[0] * self.shape[1] if self.index is None else len(self.index)

    def pack(self, padded: Tensor) -> Tensor:
        """[B, T, C] -> [rows, C]."""
        flat = padded.reshape(-1, padded.shape[-1])
        if self.index is not None:
            flat = flat[self.index]
        return _with_rows(flat)

    def packed_lengths(self, lengths: Tensor | None) -> Tensor | None:
        """Of int32 [B] numbers of columns, how many rows of each sequence they hold."""
        if lengths is None or self.index is None:
            return lengths
        sequence, column = self.index // self.shape[1], self.index % self.shape[1]
        is_inside = (column < lengths[sequence]).to(torch.int32)
        return torch.zeros_like(lengths).index_add_(0, sequence, is_inside)

    def unpack(self, packed: Tensor) -> Tensor:
        """[rows, C] -> [B, T, C], zeros where nothing is attended."""
        packed = packed[: self.tokens]
        if self.index is not None:
            zeros = packed.new_zeros(self.shape[0] * self.shape[1], packed.shape[1])
            packed = zeros.index_put((self.index,), packed)
        return packed.view(*self.shape, -1)

    def unpack_first_tokens(self, rows: Tensor) -> Tensor:
        """[B, C], one row of each sequence -> [B, T, C], zeros behind the first token."""
        zeros = rows.new_zeros(self.shape[0], self.shape[1] - 1, rows.shape[1])
        return torch.cat((rows[:, None], zeros), dim=1)


class Repeat(NamedTuple):
    """Several rows that read one text: it runs once below a layer, and each row from there on.

    `layer`: the lowest one that differs from row to row. `rows`: int64 [B'], the text of each row.
    """

    layer: int
    rows: Tensor


def repeat_sequences(layout: Layout, packed: Tensor, rows: Tensor) -> tuple[Layout, Tensor]:
    """The layout and the packed rows of a batch whose sequences are `rows`, int64 [B'], of another.

    Args:
        layout: of the texts.
        packed: [rows, C] in it.
    """
    batch, tokens = layout.shape
    if layout.index is None:
        repeated = full_layout(len(rows), tokens, rows.device)
        return repeated, _with_rows(
            packed[: layout.tokens].view(batch, tokens, -1)[rows].flatten(0, 1)
        )
    is_token = torch.zeros(batch * tokens, dtype=torch.bool, device=rows.device)
    is_token[layout.index] = True
    # Every text has a first token, as those of `layout` have.
    repeated = cast(Layout, masked_layout(is_token.view(batch, tokens)[rows]))
    if repeated.index is None:  # no text with padding is among them
        places = torch.arange(repeated.tokens, device=rows.device)
    else:
        places = repeated.index
    row_of = torch.zeros_like(is_token, dtype=torch.int64)
    row_of[layout.index] = torch.arange(layout.tokens, device=rows.device)
    source = row_of[rows[places // tokens] * tokens + places % tokens]
    return repeated, _with_rows(packed[source])


def full_layout(batch: int, tokens: int, device: torch.device) -> Layout:
    """The layout of a batch without padding."""
    cu_seqlens = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=device)
    sequence = torch.arange(batch, dtype=torch.int32, device=device)
    row = torch.arange(tokens, dtype=torch.int32, device=device)
    coordinates = torch.stack((sequence.repeat_interleave(tokens), row.repeat(batch)), dim=1)
    return Layout((batch, tokens), None, cu_seqlens, _with_rows(coordinates))


def masked_layout(mask: Tensor) -> Layout | None:
    """The layout of the tokens where `mask`, bool [B, T], is True.

    None when the first token of a sequence is not attended: heads may read it all the same, and
    the packed layout would have no row for it. Waits for the device once.
    """
    batch, tokens = mask.shape
    has_holes = (mask[:, 1:] > mask[:, :-1]).any()
    # One copy to the host for all numbers.
    numbers = torch.stack((mask.sum(), mask[:, :1].all(), has_holes))
    rows, starts_attended, holes = numbers.tolist()
    if not starts_attended:
        return None
    if rows == batch * tokens:
        return full_layout(batch, tokens, mask.device)
    lengths = mask.sum(dim=1, dtype=torch.int32)
    cu_seqlens = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    # Attended places in order; unlike nonzero, a sort leaves the number of rows to us.
    order = torch.argsort(mask.flatten().to(torch.uint8), descending=True, stable=True)
    index = order[:rows].clone()  # which is kept, and not the places of the padding with it
    sequence = index // tokens
    row = torch.arange(rows, device=mask.device) - cu_seqlens[sequence]
    coordinates = torch.stack((sequence, row), dim=1).to(torch.int32)
    return Layout((batch, tokens), index, cu_seqlens, _with_rows(coordinates), bool(holes))


def _number_of_rows(tokens: int, device: torch.device) -> int:
    """Rows for so many tokens: at most 8 numbers between a power of two and the next."""
    if device.type != "cpu":
        return tokens
    step = max(16, 2 ** (tokens.bit_length() - 4))
    return -(-tokens // step) * step


def _with_rows(tensor: Tensor) -> Tensor:
    """[N, C] -> [rows, C], with zeros."""
    return append_zeros(tensor, _number_of_rows(len(tensor), tensor.device))


def append_zeros(tensor: Tensor, rows: int) -> Tensor:
    """[N, ...] -> [rows, ...]; the tensor itself where none are missing."""
    missing = rows - len(tensor)
    return (
        nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing)) if missing else tensor
    )
