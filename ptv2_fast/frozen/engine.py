"""Runs the blocks of one forward of an encoder: packing, seeds, policies, what passes upwards."""

from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ptv2_fast.frozen.adapter_rows import AdapterRows
from ptv2_fast.frozen.block import BlockResult, run_block
from ptv2_fast.frozen.call import AttentionInputs, BlockCall, BlockTensors, Dropout
from ptv2_fast.frozen.layout import Layout, Repeat, repeat_sequences
from ptv2_fast.frozen.memory import choose_policies
from ptv2_fast.frozen.modules import BlockModules, Norm, read_norm
from ptv2_fast.frozen.spec import Surroundings
from ptv2_fast.frozen.vectors import (
    StandIns,
    norm_with,
    read_updates,
    read_vectors,
    trained_norm,
    trains_input_matrix,
    trains_input_norm,
    trains_projections,
)
from ptv2_fast.frozen.weights import BlockWeights, WeightReader
from ptv2_fast.prefix import BankPrefix, LayerPrefix

# Tokens that go through a feed-forward network at a time: its 4 x hidden activations neither set
# the peak of memory nor leave the last cache, and the products are as fast as whole ones.
CPU_CHUNK, GPU_CHUNK = 1024, 8192


class Block(NamedTuple):
    """One layer's modules and the reader of their weights."""

    modules: BlockModules
    reader: WeightReader


class Handover(NamedTuple):
    """A block's result with the tensor that transformers carries to the next layer.

    Whoever changes that tensor on its way, in place or for another, has what the block handed up
    beside it left aside.
    """

    hidden: Tensor
    version: int
    result: BlockResult

    def belongs_to(self, hidden: Tensor) -> bool:
        """Whether a layer's input is what this block returned."""
        return hidden is self.hidden and _version(hidden) == self.version


@dataclass
class FrozenRun:
    """One forward through the blocks.

    Args:
        layout: of the batch.
        num_layers: blocks of the encoder.
        lowest: index of the lowest block whose backward pass runs.
        prefix_dropout: probability, in training.
        policy: what every block keeps for its backward pass (spec.py).
        memory_budget: bytes; chooses a policy for each block instead.
        unpack_each: give every block padded input and output, for whoever looks at them.
        first_token_only: the last block computes the first token of each sequence only; not with
            disentangled attention.
        padded_above: a layer whose output is padded, and the input of the next one, or None.
        context_lengths: int32 [B], of rows visible to all of a sequence, or None: see
            `prefix_attention`.
        stand_ins: what trains of the prefixed layers.
        adapters: what each sequence has inside of the layers, forward only; instead of `stand_ins`.
        repeat: from a layer on the batch is another one, whose rows read the texts of this one; not
            with `padded_above` in front of that layer.
    """

    layout: Layout
    num_layers: int
    lowest: int
    prefix_dropout: float
    policy: str = "none"
    memory_budget: int | None = None
    unpack_each: bool = False
    first_token_only: bool = False
    context_lengths: Tensor | None = None
    padded_above: int | None = None
    stand_ins: StandIns = field(default_factory=dict)
    adapters: AdapterRows | None = None
    repeat: Repeat | None = None
    _seeds: Tensor | None = None
    _policies: tuple[str, ...] | None = None
    _handover: Handover | None = field(default=None, repr=False)
    _angles: dict[int, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    def run_layer(
        self,
        index: int,
        hidden: Tensor,
        prefix: LayerPrefix | BankPrefix | None,
        block: Block,
        above: BlockModules | None,
        inputs: AttentionInputs,
    ) -> Tensor:
        """The forward of one encoder layer.

        Args:
            index: of the layer.
            hidden: [B, T, hidden] for layer 0, above `padded_above` and with `unpack_each`, else
                [rows, hidden].
            prefix: of this layer, or None.
            block: of this layer.
            above: modules of the next layer, or None.
            inputs: of the attention, as transformers gives them: cosine and sine [1 or B, T, D'].

        Returns:
            [B, T, hidden] from the last layer, `padded_above` and with `unpack_each`, else
            [rows, hidden].
        """
        modules, spec = block.modules, block.modules.spec
        is_last = index == self.num_layers - 1
        handover, self._handover = self._handover, None
        handed = None
        if handover is not None and handover.belongs_to(hidden):
            handed = handover.result
        is_padded_below = self.padded_above is not None and index == self.padded_above + 1
        if index == 0 or self.unpack_each or is_padded_below:
            hidden = self.layout.pack(hidden)
        if self.repeat is not None and index == self.repeat.layer:
            hidden, handed = self._repeat(hidden, self.repeat.rows), None
        weights = block.reader.read(products_dtype(hidden, modules))
        is_below_repeat = self.repeat is not None and index < self.repeat.layer
        adapters = None if is_below_repeat else self.adapters  # which have nothing there
        # Under autocast the products have its dtype and the rest has the weights' own.
        hidden = hidden.to(modules.dtype)
        attention_input = None
        if spec.pre_norm and modules.first_norm is not None:
            if handed is not None and handed.input is not None:
                attention_input = handed.input
            else:
                handed, attention_input = None, self._first_norm(hidden, modules, weights, adapters)
        dropout = _dropout_of(modules, self.prefix_dropout if prefix is not None else 0.0)
        if prefix is None:
            empty = hidden.new_empty(modules.key_value_heads, 0, modules.head_dim)
            prefix = LayerPrefix(empty, empty)
        previous = handed if handed is not None and index > self.lowest else None
        next_norm = None
        output_norm = None if spec.pre_norm else modules.second_norm
        if spec.pre_norm and above is not None and not self.unpack_each:
            output_norm = above.first_norm
            if index + 1 == self.lowest and output_norm in self.stand_ins:
                output_norm = None  # it trains: this block would have a backward pass
            if output_norm is not None:
                next_norm = read_norm(output_norm, above.spec.subtract_mean)
        updates = read_updates(modules, self.stand_ins)
        vectors = read_vectors(modules, output_norm, self.stand_ins, updates)
        if self.stand_ins:
            weights = weights.with_trained(vectors, updates)
            if next_norm is not None:
                beta = vectors.output_norm_beta
                next_norm = norm_with(next_norm, vectors.output_norm_weight, beta)
        first_token_only = is_last and self.first_token_only
        if adapters is not None:
            starts, chunk = self.layout.cu_seqlens, _chunk(hidden)
            weights, next_norm = adapters.of_block(
                weights, output_norm, next_norm, starts, chunk, first_token_only
            )
        call = BlockCall(
            weights=weights,
            dropout=dropout,
            policy=self._policy(index, hidden, weights.dtype, modules),
            chunk=_chunk(hidden),
            tokens=self.layout.tokens,
            max_seqlen=self.layout.shape[1],
            first_token_only=first_token_only,
            next_norm=next_norm,
            previous_norm=None if previous is None else previous.norm,
        )
        position_key, position_query, position_slots = inputs.positions or (None, None, None)
        tensors = BlockTensors(
            self.layout.cu_seqlens,
            self.layout.coordinates,
            self._seed(index, hidden) if any(dropout) else None,
            None if previous is None else previous.sum,
            None if previous is None else previous.stats,
            *self._rotary_rows(inputs, spec.rotary),
            inputs.bias,
            self.context_lengths,
            position_key,
            position_query,
            position_slots,
            prefix.prefix_index,
            prefix.prefix_lengths,
        )
        gate = prefix.query_gate(modules.heads)
        result = run_block(
            hidden, attention_input, prefix.key, prefix.value, gate, call, tensors, vectors
        )
        out = result.residual
        if call.first_token_only:
            return self.layout.unpack_first_tokens(out)
        if is_last or self.unpack_each or index == self.padded_above:
            out = self.layout.unpack(out)
        if not is_last and result.stats is not None:
            self._handover = Handover(out, _version(out), result)
        return out

    def _repeat(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """The input of a layer and all that follows for the sequences `rows`, int64 [B']."""
        self.layout, hidden = repeat_sequences(self.layout, hidden, rows)
        self._angles.clear()
        if self.context_lengths is not None:
            self.context_lengths = self.context_lengths[rows]
        return hidden

    def _first_norm(
        self,
        hidden: Tensor,
        modules: BlockModules,
        weights: BlockWeights,
        adapters: AdapterRows | None,
    ) -> Tensor:
        """The attention's input in a pre-norm block that no block below hands one to."""
        module, norm = cast(nn.Module, modules.first_norm), cast(Norm, weights.first_norm)
        if adapters is not None:
            norm = adapters.of_norm(norm, module, adapters.tokens(self.layout.cu_seqlens))
        if module not in self.stand_ins:
            return _normalise(hidden, norm)
        chunk, tokens = _chunk(hidden), self.layout.tokens
        return trained_norm(hidden, module, norm, self.stand_ins, _normalise, tokens, chunk)

    def _rotary_rows(
        self, inputs: AttentionInputs, pairs: str | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The angles of packed rows, fp32 [rows, rotary_dim / 2]; once for layers that share them.

        transformers gives an angle twice, for both elements of a pair.
        """
        if pairs is None:
            return None, None
        given = cast(Tensor, inputs.cosine)
        if id(given) not in self._angles:
            once = slice(given.shape[-1] // 2) if pairs == "half" else slice(None, None, 2)
            rows = (
                self.layout.pack(self._of_sequences(cast(Tensor, angle)[..., once].float()))
                for angle in (given, inputs.sine)
            )
            self._angles[id(given)] = (given, *rows)  # kept, so that its id stays its own
        _, cosine, sine = self._angles[id(given)]
        return cosine, sine

    def _of_sequences(self, given: Tensor) -> Tensor:
        """[1 or number of texts, T, C], as transformers gives it, for each sequence of now."""
        batch = self.layout.shape[0]
        if self.repeat is not None and len(given) not in (1, batch):
            given = given[self.repeat.rows]
        return given.expand(batch, -1, -1)

    def _policy(self, index: int, hidden: Tensor, dtype: torch.dtype, modules: BlockModules) -> str:
        if self.memory_budget is None:
            return self.policy
        if index < self.lowest:
            return "none"
        if self._policies is None:
            # Pre-norm blocks with padded results normalise their own input.
            hands_up = not (self.unpack_each and modules.spec.pre_norm)
            self._policies = choose_policies(
                self.memory_budget,
                hidden.shape[0],
                modules.shape(dtype),
                self.num_layers,
                self.lowest,
                chunk=_chunk(hidden),
                around=Surroundings(
                    has_previous=hands_up,
                    has_separate_input=modules.spec.pre_norm,
                    has_next_norm=hands_up,
                    trains_projections=trains_projections(modules, self.stand_ins),
                    trains_input_norm=trains_input_norm(modules, self.stand_ins),
                    trains_input_matrix=trains_input_matrix(modules, self.stand_ins),
                ),
            )
        return self._policies[index - self.lowest]

    def _seed(self, index: int, hidden: Tensor) -> Tensor:
        """int64 [1]; all layers' are drawn at once, at the first dropout of the forward."""
        if self._seeds is None:
            self._seeds = torch.randint(2**63 - 1, (self.num_layers,), device=hidden.device)
        return self._seeds[index : index + 1]


def _version(tensor: Tensor) -> int:
    """That of a tensor's values, which an inference tensor does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _normalise(hidden: Tensor, norm: Norm) -> Tensor:
    """The norm of a residual stream that comes from outside of the blocks; torch's own."""
    shape, weight = hidden.shape[-1:], norm.weight.to(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if norm.subtract_mean:
            beta = None if norm.beta is None else norm.beta.to(hidden.dtype)
            normal = nn.functional.layer_norm(hidden, shape, weight, beta, norm.epsilon)
        else:
            normal = nn.functional.rms_norm(hidden, shape, weight, norm.epsilon)
        norm.scale_parts(normal)
        return normal


def _chunk(hidden: Tensor) -> int:
    if hidden.device.type != "cpu":
        return GPU_CHUNK
    # Halves are a number of rows that shorter batches have as a whole (layout.py).
    chunk = len(hidden)
    while chunk > CPU_CHUNK:
        chunk = -(-chunk // 2)
    return chunk


def products_dtype(hidden: Tensor, modules: BlockModules) -> torch.dtype:
    """Of the products in a block: its weights', or autocast's."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return modules.dtype


def _dropout_of(modules: BlockModules, prefix: float) -> Dropout:
    return Dropout(
        modules.attention_dropout.probability,
        modules.attention_output_dropout.probability,
        modules.activation_dropout.probability,
        modules.output_dropout.probability,
        prefix if modules.is_training else 0.0,
    )
