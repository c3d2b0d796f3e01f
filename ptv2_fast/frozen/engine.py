"""Runs the blocks of one forward of an encoder: packing, seeds, policies, what passes upwards."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptv2_fast.frozen.arithmetic import BlockCall, BlockTensors, Dropout
from ptv2_fast.frozen.block import run_block
from ptv2_fast.frozen.layout import Layout
from ptv2_fast.frozen.memory import BlockShape, choose_policies
from ptv2_fast.frozen.weights import BlockModules, Norm, WeightReader

# Tokens that go through a feed-forward network at a time: its 4 x hidden activations neither set
# the peak of memory nor leave the last cache, and the products are as fast as whole ones.
CPU_CHUNK, GPU_CHUNK = 1024, 8192


@dataclass
class FrozenRun:
    """One forward through the blocks.

    Args:
        layout: of the batch.
        num_layers: blocks of the encoder.
        lowest: index of the lowest block whose backward pass runs.
        prefix_dropout: probability, in training.
        policy: what every block keeps for its backward pass (memory.py).
        memory_budget: bytes; chooses a policy for each block instead.
        unpack_each: give every block padded input and output, for whoever looks at them.
        first_rows_only: the last block computes the first token of each sequence only.
    """

    layout: Layout
    num_layers: int
    lowest: int
    prefix_dropout: float
    policy: str = "none"
    memory_budget: int | None = None
    unpack_each: bool = False
    first_rows_only: bool = False
    _seeds: Tensor | None = None
    _policies: tuple[str, ...] | None = None
    # What the block below normalised, its statistics and its LayerNorm.
    _below: tuple[Tensor, Tensor, Norm] | None = field(default=None, repr=False)

    def run_layer(
        self,
        index: int,
        hidden: Tensor,
        prefix: tuple[Tensor, Tensor] | None,
        modules: BlockModules,
        reader: WeightReader,
    ) -> Tensor:
        """The forward of one encoder layer.

        Args:
            index: of the layer.
            hidden: [B, T, hidden] for layer 0 and with `unpack_each`, else [N, hidden].
            prefix: (prefix_key, prefix_value), each [heads, P, head_dim], or None.
            modules, reader: of this layer.

        Returns:
            [B, T, hidden] from the last layer and with `unpack_each`, else [N, hidden].
        """
        is_last = index == self.num_layers - 1
        if index == 0 or self.unpack_each:
            hidden = self.layout.pack(hidden)
        weights = reader.read(_products_dtype(hidden, modules))
        # Under autocast the products have its dtype and the rest has the weights' own.
        hidden = hidden.to(modules.dtype)
        dropout = _dropout_of(modules, self.prefix_dropout if prefix is not None else 0.0)
        if prefix is None:
            empty = hidden.new_empty(modules.heads, 0, hidden.shape[1] // modules.heads)
            prefix = (empty, empty)
        first_rows_only = is_last and self.first_rows_only
        below = self._below if index > self.lowest else None
        call = BlockCall(
            weights=weights,
            dropout=dropout,
            policy=self._policy(index, hidden, weights.dtype, modules),
            chunk=_chunk(hidden),
            tokens=self.layout.tokens,
            max_seqlen=self.layout.shape[1],
            first_rows_only=first_rows_only,
            below=None if below is None else below[2],
        )
        tensors = BlockTensors(
            self.layout.cu_seqlens,
            self.layout.coordinates,
            self._seed(index, hidden) if any(dropout) else None,
            None if below is None else below[0],
            None if below is None else below[1],
        )
        out, total, statistics = run_block(hidden, *prefix, call, tensors)
        self._below = (total, statistics, weights.output_norm)
        if first_rows_only:
            return self.layout.unpack_first(out)
        return self.layout.unpack(out) if is_last or self.unpack_each else out

    def _policy(self, index: int, hidden: Tensor, dtype: torch.dtype, modules: BlockModules) -> str:
        if self.memory_budget is None:
            return self.policy
        if index < self.lowest:
            return "none"
        if self._policies is None:
            shape = BlockShape(
                hidden=hidden.shape[1],
                intermediate=modules.intermediate.out_features,
                heads=modules.heads,
                element_bytes=dtype.itemsize,
                residual_bytes=hidden.element_size(),
            )
            self._policies = choose_policies(
                self.memory_budget,
                hidden.shape[0],
                shape,
                self.num_layers,
                self.lowest,
                chunk=_chunk(hidden),
            )
        return self._policies[index - self.lowest]

    def _seed(self, index: int, hidden: Tensor) -> Tensor:
        """int64 [1]; all layers' are drawn at once, at the first dropout of the forward."""
        if self._seeds is None:
            self._seeds = torch.randint(2**63 - 1, (self.num_layers,), device=hidden.device)
        return self._seeds[index : index + 1]


def _chunk(hidden: Tensor) -> int:
    if hidden.device.type != "cpu":
        return GPU_CHUNK
    # Halves are a number of rows that shorter batches have as a whole (layout.py).
    chunk = len(hidden)
    while chunk > CPU_CHUNK:
        chunk = -(-chunk // 2)
    return chunk


def _products_dtype(hidden: Tensor, modules: BlockModules) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return modules.dtype


def _dropout_of(modules: BlockModules, prefix: float) -> Dropout:
    def active(module: torch.nn.Dropout) -> float:
        return module.p if module.training else 0.0

    return Dropout(
        active(modules.attention_dropout),
        active(modules.attention_output_dropout),
        active(modules.output_dropout),
        prefix if modules.attention_dropout.training else 0.0,
    )
