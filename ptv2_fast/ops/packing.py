"""The packed layout in plain torch: tokens of all sequences one behind the other, and back.

Nothing is read from the device, so that it traces and never waits.
"""

import torch
from torch import Tensor

from ptv2_fast.ops.options import AttentionOptions


class PackedRows:
    """Where each token of [N, ...] lies in [B, ..., max_seqlen, ...]."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> None:
        starts = cu_seqlens.long()
        positions = torch.arange(tokens, device=starts.device)
        sequence = torch.searchsorted(starts[1:], positions, right=True)
        # Rows behind the last sequence, which belong to nothing, get something.
        self._sequence = sequence.clamp(max=len(starts) - 2)
        self._row = (positions - starts[self._sequence]).clamp(max=max_seqlen - 1)
        offsets = torch.arange(max_seqlen, device=starts.device)
        self.inside = offsets < starts.diff()[:, None]  # bool [B, max_seqlen]
        # Behind the last token stands a row of zeros for whatever is outside.
        self._source = torch.where(self.inside, starts[:-1, None] + offsets, tokens)

    def pad(self, packed: Tensor) -> Tensor:
        """[N, H, ...] -> [B, H, max_seqlen, ...] with zeros behind each sequence."""
        zeros = packed.new_zeros(1, *packed.shape[1:])
        return torch.cat((packed, zeros))[self._source].transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """[B, H, max_seqlen, ...] -> [N, H, ...]."""
        return padded.transpose(1, 2)[self._sequence, self._row]

    def padded_options(self, options: AttentionOptions) -> AttentionOptions:
        """The same call in the padded layout."""
        return options._replace(key_mask=self.inside, cu_seqlens=None, max_seqlen=0)
