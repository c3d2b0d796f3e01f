"""The attention and mask functions that transformers calls in an attached model.

The prefixes of one forward travel as a keyword argument from the backbone to every attention
call, so that checkpointing recomputes with the prefix of the forward it belongs to.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function

from ptv2_fast.encoders.disentangled import RelativePositions
from ptv2_fast.frozen.adapter_rows import AdapterRows
from ptv2_fast.frozen.engine import Block, FrozenRun
from ptv2_fast.frozen.layout import Repeat
from ptv2_fast.ops import disentangled_prefix_attention, prefix_attention
from ptv2_fast.ops.attention import Positions
from ptv2_fast.prefix import BankPrefix, LayerPrefix

ATTENTION_NAME = "ptv2_prefix"
STATE_ARGUMENT = "ptv2_prefix_state"
LAYER_ATTRIBUTE = "layer_idx"  # transformers' name; attach sets it where it is missing
# Arguments that attention gets in some version of transformers and that do not change it: positions
# and types act in the embeddings, if a model has them; the others say what is returned, or how a
# loss is divided.
_WITHOUT_EFFECT = frozenset(
    (
        STATE_ARGUMENT,
        "cache_position",
        "deterministic",
        "num_items_in_batch",
        "output_hidden_states",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    )
)
# Classes of attention that add a `position_bias`, [1, H, T, T], to the scores of tokens.
_WITH_BIAS = ("MPNetSelfAttention", "MT5Attention", "T5Attention", "UMT5Attention")


class RowMask(NamedTuple):
    """Which columns attention may see, where that differs from row to row.

    `tokens`: bool [B, T], False for padding, or None. `is_causal`: no column behind the row.
    `window`: no column further away than so many tokens; None for any. `context_lengths`: int32
    [B], no column behind the row but those in front of that.
    """

    tokens: Tensor | None
    is_causal: bool = False
    window: int | None = None
    context_lengths: Tensor | None = None


@dataclass
class PrefixState:
    """What one forward of the backbone hands to its attention modules.

    `layers` maps a layer index to its prefix; a layer that is not in it runs without one.
    `repeat`: the rows that each text becomes, in frozen blocks from some layer on.
    `adapters`: what these have inside of the layers, which only frozen blocks read.
    `key_shape`: number and width of its heads. With `run` the layers are frozen `blocks` and call
    no attention function. Whoever used the prefix of a layer notes the layer in `called`.
    `relative`: the position tables of an encoder that has some.
    """

    layers: Mapping[int, LayerPrefix] | Mapping[int, BankPrefix]
    prefix_dropout: float
    keep_input_gradient: bool
    num_layers: int
    key_shape: tuple[int, int]
    run: FrozenRun | None = None
    blocks: list[Block] = field(default_factory=list)
    called: list[int] = field(default_factory=list)
    backend: str | None = None
    relative: RelativePositions | None = None
    repeat: Repeat | None = None
    adapters: AdapterRows | None = None
    # A bias as transformers has it, and its copy.
    _bias: tuple[Tensor, Tensor] | None = None

    def readable_bias(self, bias: Tensor | None) -> Tensor | None:
        """A bias with a last stride of 1; the layers that share it share its copy.

        Raises:
            ValueError: for one that trains.
        """
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "position_bias: expected one without a gradient, got one that trains: freeze the "
                "table that it is from (modules_to_save may not name it)"
            )
        if bias is None or bias.stride(-1) == 1:
            return bias
        if self._bias is None or self._bias[0] is not bias:
            self._bias = bias, bias.contiguous()
        return self._bias[1]

    def missed(self, layers: Collection[int]) -> dict[int, int]:
        """Layer -> number of its attention calls, for those of `layers` with another than one."""
        counts = {layer: self.called.count(layer) for layer in layers}
        return {layer: count for layer, count in counts.items() if count != 1}


def check_served(arguments: dict[str, object], layer: int) -> None:
    """Check the keyword arguments of a layer's attention that the operator does not get.

    Raises:
        ValueError: when one could change the result: it is neither None nor False, and not known
            to have no effect.
    """
    for name, value in arguments.items():
        if value is not None and value is not False and name not in _WITHOUT_EFFECT:
            raise ValueError(
                f"{name}: expected None in the attention of layer {layer}, got a "
                f"{type(value).__name__}, which attention with a prefix does not serve"
            )


def attention_with_prefix(
    module: nn.Module,
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, H_kv, T, D]
    value: Tensor,  # [B, H_kv, T, D]
    attention_mask: RowMask | Tensor | None,  # bool [B, T]
    dropout: float = 0.0,
    scaling: float | None = None,
    positions: Positions | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """What attention modules call, [B, T, H, D]; `kwargs` as in `check_served`."""
    state = kwargs.get(STATE_ARGUMENT)
    if not isinstance(state, PrefixState):
        raise RuntimeError(
            "the attention of an attached model was called from outside its backbone; call the "
            "model itself and not one of its layers, leave its backbone's forward in place (a "
            "wrapper may call it), or detach it"
        )
    layer = _layer_of(module, state)
    mask = attention_mask if isinstance(attention_mask, RowMask) else RowMask(attention_mask)
    _check_mask(mask, module, kwargs, layer)
    bias: Any = kwargs.pop("position_bias", None) if _takes_bias(module) else None
    check_served(kwargs, layer)
    heads, head_dim = state.key_shape
    if (key.shape[1], key.shape[3]) != (heads, head_dim):
        raise ValueError(
            f"model: expected {heads} heads of width {head_dim} as keys of layer {layer}, by its "
            f"configuration, got {key.shape[1]} of width {key.shape[3]}"
        )
    prefix, has_prefix = state.layers.get(layer), layer in state.layers
    if prefix is None:
        empty = query.new_empty(heads, 0, head_dim)
        prefix = LayerPrefix(empty, empty)
    state.called.append(layer)
    # What is rotated may have the dtype of the model's input.
    operands = (query.to(value.dtype), key.to(value.dtype), value, prefix.key, prefix.value)
    options: dict[str, Any] = {
        "key_mask": mask.tokens,
        "scale": scaling,
        "dropout_p": dropout,
        "prefix_dropout_p": state.prefix_dropout if has_prefix and module.training else 0.0,
        "prefix_gate": prefix.query_gate(query.shape[1]),
        "prefix_index": prefix.prefix_index,
        "prefix_lengths": prefix.prefix_lengths,
        "backend": state.backend,
    }
    if positions is not None:
        out = disentangled_prefix_attention(*operands, *positions, **options)
    else:
        out = prefix_attention(
            *operands,
            context_lengths=_no_context(query) if mask.is_causal else mask.context_lengths,
            window=mask.window,
            bias=state.readable_bias(bias),
            **options,
        )
    return out.transpose(1, 2), None


def _takes_bias(module: nn.Module) -> bool:
    return any(kind.__name__ in _WITH_BIAS for kind in type(module).__mro__)


def _no_context(query: Tensor) -> Tensor:
    return torch.zeros(query.shape[0], dtype=torch.int32, device=query.device)


def _check_mask(mask: RowMask, module: nn.Module, arguments: dict[str, object], layer: int) -> None:
    """Check that a layer and its mask mean the same; takes the window out of the arguments.

    Raises:
        ValueError: when they do not.
    """
    is_causal = getattr(module, "is_causal", False)
    if is_causal != mask.is_causal:
        raise ValueError(
            f"is_causal: expected {mask.is_causal} in layer {layer}, by its mask, got {is_causal}"
        )
    if mask.window is not None:
        # transformers counts the row itself too.
        expected, actual = mask.window + 1, arguments.pop("sliding_window", None)
        if actual != expected:
            raise ValueError(
                f"sliding_window: expected {expected} in layer {layer}, by its mask, got {actual}"
            )


def _layer_of(module: nn.Module, state: PrefixState) -> int:
    """The number of a layer: that of its attention module, or, for one of many layers, of the call.

    Raises:
        RuntimeError: when such a module is called again.
    """
    layer: int | None = getattr(module, LAYER_ATTRIBUTE, None)
    if layer is not None:
        return layer
    if len(state.called) >= state.num_layers:
        raise RuntimeError(
            f"expected {state.num_layers} calls of {type(module).__name__} in a forward, got more: "
            "prefixes of layers that share a module go by the number of the call, which leaves no "
            "way to recompute one (checkpointing)"
        )
    return len(state.called)


def _mask(
    *,
    mask_function: Callable[..., bool] = bidirectional_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = False,
    allow_is_bidirectional_skip: bool = False,
    config: PretrainedConfig | None = None,
    **kwargs: object,
) -> RowMask | Tensor | None:
    """The padding mask as it came, bool [B, T] or None; its values are never looked at.

    What else hides columns is read from what transformers allows a mask function to leave to the
    attention, which it does where nothing is added to a causal or bidirectional mask, or one of
    these in a window.

    Lengths and offsets, which versions of transformers name differently, are left in `kwargs`: the
    backbone's inputs were checked to have one mask column per token and no cache.

    Raises:
        ValueError: for packed, block-wise and other masks, and those of other ranks.
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask: expected shape [B, T], got {list(attention_mask.shape)}")
    if mask_function is bidirectional_mask_function:
        return attention_mask
    # Of a causal window, and of Gemma's bidirectional one, the size itself is outside.
    inside = None if local_size is None else local_size - 1
    if allow_is_causal_skip:
        return RowMask(attention_mask, is_causal=True, window=inside)
    if allow_is_bidirectional_skip and local_size is not None:
        return RowMask(attention_mask, window=local_size)
    # The union of a causal mask and one that sees ahead as far as back.
    if getattr(config, "use_bidirectional_attention", False) is True:
        if mask_function.__name__ == "or_mask":
            return RowMask(attention_mask, window=inside)
    raise ValueError(
        "attention_mask: expected a padding mask, bidirectional or causal, with or without a "
        f"window, got a packed or otherwise structured one ({mask_function!r})"
    )


AttentionInterface.register(ATTENTION_NAME, attention_with_prefix)
# Without a mask function of the same name transformers drops every mask, without a word.
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _mask)
