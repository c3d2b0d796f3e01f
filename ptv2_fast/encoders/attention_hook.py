"""The attention and mask functions that transformers calls in an attached model.

The prefixes of one forward travel as a keyword argument from the backbone to every attention
call, so that checkpointing recomputes with the prefix of the forward it belongs to.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function

from ptv2_fast.frozen.engine import Block, FrozenRun
from ptv2_fast.ops import prefix_attention

ATTENTION_NAME = "ptv2_prefix"
STATE_ARGUMENT = "ptv2_prefix_state"
LAYER_ATTRIBUTE = "layer_idx"  # transformers' name; attach sets it where it is missing
# Arguments that attention gets in some version of transformers and that do not change it: positions
# act in the embeddings, the others say what is returned, or how a loss is divided.
_WITHOUT_EFFECT = frozenset(
    (
        STATE_ARGUMENT,
        "cache_position",
        "num_items_in_batch",
        "output_hidden_states",
        "position_ids",
        "return_dict",
    )
)


@dataclass
class PrefixState:
    """What one forward of the backbone hands to its attention modules.

    `layers` maps a layer index to (prefix_key, prefix_value), each [H, P, D]; a layer that is not
    in it runs without a prefix. With `run` the layers are frozen `blocks` and call no attention
    function. Whoever used the prefix of a layer notes the layer in `called`.
    """

    layers: dict[int, tuple[Tensor, Tensor]]
    prefix_dropout: float
    keep_input_gradient: bool
    num_layers: int
    run: FrozenRun | None = None
    blocks: list[Block] = field(default_factory=list)
    called: list[int] = field(default_factory=list)
    backend: str | None = None

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


def _attention(
    module: nn.Module,
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, H, T, D]
    value: Tensor,  # [B, H, T, D]
    attention_mask: Tensor | None,  # bool [B, T]
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    state = kwargs.get(STATE_ARGUMENT)
    if not isinstance(state, PrefixState):
        raise RuntimeError(
            "the attention of an attached model was called from outside its backbone; call the "
            "model itself and not one of its layers, leave its backbone's forward in place (a "
            "wrapper may call it), or detach it"
        )
    if getattr(module, "is_causal", False):
        raise ValueError("is_causal: expected False (an encoder), got True")
    layer = _layer_of(module, state)
    check_served(kwargs, layer)
    prefix = state.layers.get(layer)
    if prefix is None:
        heads, head_dim = query.shape[1], query.shape[3]
        prefix_key = prefix_value = query.new_empty(heads, 0, head_dim)
    else:
        prefix_key, prefix_value = prefix
    state.called.append(layer)
    out = prefix_attention(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        key_mask=attention_mask,
        scale=scaling,
        dropout_p=dropout,
        prefix_dropout_p=state.prefix_dropout if prefix is not None and module.training else 0.0,
        backend=state.backend,
    )
    return out.transpose(1, 2), None


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
    **kwargs: object,
) -> Tensor | None:
    """The padding mask as it came, bool [B, T] or None; its values are never looked at.

    Lengths and offsets, which versions of transformers name differently, are left in `kwargs`: the
    backbone's inputs were checked to have one mask column per token and no cache.

    Raises:
        ValueError: for anything but padding of a bidirectional encoder (causal, packed or
            block-wise masks, masks of other ranks).
    """
    if mask_function is not bidirectional_mask_function:
        raise ValueError(
            "attention_mask: expected a plain bidirectional padding mask, got a causal, packed or "
            f"otherwise structured one ({mask_function!r})"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask: expected shape [B, T], got {list(attention_mask.shape)}")
    return attention_mask


AttentionInterface.register(ATTENTION_NAME, _attention)
# Without a mask function of the same name transformers drops every mask, without a word.
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _mask)
