"""What a family of encoders is: where the parts of a backbone are, its positions and its heads."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ptv2_fast.encoders.blocks import DescribeBlock, FindBias, LayerOutput, describe_bert
from ptv2_fast.encoders.disentangled import (
    RelativePositions,
    part_of_product,
    unserved_option,
)

_T5_LENGTH = 512  # Raffel et al. 2020; where the configuration does not say


@dataclass(frozen=True)
class Family:
    """Where the parts of a backbone are, as dotted names relative to it or to one layer.

    `frozen` lists what P-Tuning v2 leaves untouched, in the order of a forward; what lies outside
    is trained and saved.
    `encoder`: the module around the layers; "" where they lie on the backbone itself.
    `query`, `key`, `value`: linear layers of the attention; one of the same name gives the three,
    one behind the other. `key_norm`: what keys go through before they are rotated, if anything.
    `pads_keep_position`: pad tokens stand at `pad_token_id` and the others are counted from
    `pad_token_id + 1` (fairseq's rule), instead of every column standing at its index.
    `describe_block` reads a layer as a frozen block; None: the family takes the hook path.
    `find_bias`, `layer_output`: of layers whose attention adds a bias, and of those that return
    more than their states.
    `exit` is the module that gives the last states; "" = the encoder, or the last layer.
    `position_types`: the served values of an option of that name; None: it has no effect, because
    attention always rotates queries and keys by their positions.
    `is_decoder`: transformers' class masks what comes later in the text, and has a cache.
    `keeps_positions`: those of tokens are the same with and without a prefix.
    `proof_indices`: arguments besides the token ids, indices [B], without which the backbone may
    not run.
    """

    frozen: tuple[str, ...] = ("embeddings", "encoder")
    embeddings: str = "embeddings"
    encoder: str = "encoder"
    layers: str = "encoder.layer"
    attention: str = "attention.self"
    query: str = "query"
    key: str = "key"
    value: str = "value"
    key_norm: str = ""
    pads_keep_position: bool = False
    describe_block: DescribeBlock | None = describe_bert
    find_bias: FindBias | None = None
    layer_output: LayerOutput | None = None
    exit: str = ""
    position_types: tuple[str | None, ...] | None = (None, "absolute")
    is_decoder: bool = False
    keeps_positions: bool = False
    proof_indices: tuple[str, ...] = ()

    def max_positions(self, config: PretrainedConfig) -> int:
        """Longest input, in tokens, that the backbone was made for.

        Raises:
            ValueError: when the configuration does not say it.
        """
        return _integer(config, "max_position_embeddings") - self.first_position(config)

    def first_position(self, config: PretrainedConfig) -> int:
        """Row of the position table at which the first token stands."""
        return _integer(config, "pad_token_id") + 1 if self.pads_keep_position else 0

    def has_position_table(self, config: PretrainedConfig) -> bool:
        """Whether positions are rows of a table, which has a last one."""
        return self.position_types is not None and _position_type(config) in (None, "absolute")

    def key_shape(self, config: PretrainedConfig) -> tuple[int, int]:
        """Number and width of the heads of keys and values, of which queries may have more.

        Raises:
            ValueError: when the configuration does not say it.
        """
        heads, width = _integer(config, "num_attention_heads"), getattr(config, "head_dim", None)
        if getattr(config, "num_key_value_heads", None) is not None:
            key_heads = _integer(config, "num_key_value_heads")
        else:
            key_heads = heads
        return key_heads, _integer(config, "hidden_size") // heads if width is None else width

    def encoder_config(self, backbone: nn.Module) -> PretrainedConfig:
        """The configuration that the layers were made from."""
        return backbone.config  # type: ignore[return-value]

    def check_offset(self, backbone: nn.Module) -> None:
        """Check that the positions of a backbone's embeddings can be shifted.

        Raises:
            ValueError: when they have no table of positions, or one that a prefix leaves alone.
        """
        if self.keeps_positions:
            raise ValueError(
                "position_offset: expected 'none' for a model whose positions a prefix leaves as "
                f"they are, got 'prefix' for a {type(backbone).__name__}"
            )
        embeddings = backbone.get_submodule(self.embeddings)
        arguments = inspect.signature(embeddings.forward).parameters
        table = getattr(embeddings, "position_embeddings", None)
        if table is None or "position_ids" not in arguments:
            raise ValueError(
                "position_offset: expected 'none' for embeddings without a table of positions, got "
                f"'prefix' for the {type(embeddings).__name__} of a {type(backbone).__name__}"
            )

    def positions(
        self,
        config: PretrainedConfig,
        input_ids: Tensor | None,
        tokens: Tensor,
        offset: int | Tensor,
    ) -> Tensor:
        """Rows of the position table, [B, T], when the first token stands `offset` further.

        Args:
            config: of the backbone.
            input_ids: [B, T]; None for embedded input, whose pads are not known.
            tokens: [B, T, ...], for the shape.
            offset: number of positions; int64 [B, 1] where it differs from text to text.
        """
        first = self.first_position(config)
        if self.pads_keep_position and input_ids is not None:
            is_token = input_ids.ne(first - 1).long()
            return (is_token.cumsum(dim=1) + offset) * is_token + first - 1
        positions = torch.arange(tokens.shape[1], device=tokens.device) + (first + offset)
        return positions.expand(tokens.shape[:2])

    def pooled(self, backbone: Any, states: Tensor) -> Tensor | None:
        """What a backbone makes of its last states [B, T, C] besides, [B, C], if anything."""
        pooler = getattr(backbone, "pooler", None)
        return None if pooler is None else pooler(states)

    def read_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a backbone's forward, by name, as what follows reads them.

        That is: with an attention_mask [B, T] of padding or None.
        """
        return arguments

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Check that a tokenizer makes what the heads read.

        Raises:
            ValueError: when it does not.
        """

    def layer_modules(self, backbone: nn.Module) -> list[nn.Module]:
        """The encoder layers in the order of their calls; one called twice is there twice."""
        return list(backbone.get_submodule(self.layers).children())

    def unserved_option(self, backbone: nn.Module) -> str | None:
        """What is expected of a backbone's options and what it has instead, or None."""
        return None

    def relative_positions(self, backbone: nn.Module) -> RelativePositions | None:
        """The position tables of a backbone whose attention is disentangled."""
        return None

    def third(self, attention: nn.Module, joined: Tensor, index: int) -> Tensor:
        """Query, key or value (0, 1, 2) of what one layer gives for all three, [T, H D]."""
        return joined.chunk(3, dim=-1)[index]


class AlbertFamily(Family):
    """Groups of layers, each group called several times in a row."""

    def layer_modules(self, backbone: nn.Module) -> list[nn.Module]:
        """As that of `Family`."""
        groups = super().layer_modules(backbone)
        count = _integer(backbone.config, "num_hidden_layers")  # type: ignore[arg-type]
        # The quotient of floats, as transformers computes it.
        called = [groups[int(i / (count / len(groups)))] for i in range(count)]
        return [layer for group in called for layer in group.get_submodule("albert_layers")]  # type: ignore[attr-defined]

    def pooled(self, backbone: Any, states: Tensor) -> Tensor | None:
        """As that of `Family`."""
        if backbone.pooler is None:
            return None
        return backbone.pooler_activation(backbone.pooler(states[:, 0]))


class DebertaFamily(Family):
    """Scores by distance; a table of positions too, where the configuration says so."""

    def has_position_table(self, config: PretrainedConfig) -> bool:
        """As that of `Family`."""
        return bool(getattr(config, "position_biased_input", True))

    def unserved_option(self, backbone: nn.Module) -> str | None:
        """As that of `Family`."""
        return unserved_option(backbone)

    def relative_positions(self, backbone: nn.Module) -> RelativePositions | None:
        """As that of `Family`."""
        return RelativePositions(backbone.get_submodule(self.encoder))

    def third(self, attention: nn.Module, joined: Tensor, index: int) -> Tensor:
        """As that of `Family`: of each head one after the other, in front of two biases."""
        return part_of_product(attention, joined, index).flatten(-2)


class MobileBertFamily(Family):
    """Attention of another width than the states between the layers."""

    def key_shape(self, config: PretrainedConfig) -> tuple[int, int]:
        """As that of `Family`."""
        heads = _integer(config, "num_attention_heads")
        return heads, _integer(config, "true_hidden_size") // heads


class MPNetFamily(Family):
    """Positions by fairseq's rule for a pad token of 1, which transformers does not ask for."""

    def first_position(self, config: PretrainedConfig) -> int:
        """As that of `Family`."""
        return 2


class T5Family(Family):
    """Positions are relative: each attention adds a bias by distance, for texts of any length."""

    def max_positions(self, config: PretrainedConfig) -> int:
        """The length of the texts that a checkpoint was trained on; longer ones run too."""
        named = getattr(config, "n_positions", None)
        return _T5_LENGTH if named is None else _integer(config, "n_positions")

    def has_position_table(self, config: PretrainedConfig) -> bool:
        """As that of `Family`."""
        return False

    def key_shape(self, config: PretrainedConfig) -> tuple[int, int]:
        """As that of `Family`."""
        return _integer(config, "num_heads"), _integer(config, "d_kv")

    def encoder_config(self, backbone: nn.Module) -> PretrainedConfig:
        """As that of `Family`; that of the backbone may be of an encoder with a decoder."""
        return backbone.encoder.config  # type: ignore[return-value, union-attr]


def _position_type(config: PretrainedConfig) -> str | None:
    return getattr(config, "position_embedding_type", None)


def _integer(config: PretrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise ValueError(f"model: expected an integer config.{name}, got {value!r}")
    return value
