"""Gradient checkpointing of transformers: not around frozen blocks, and never reentrant."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ptv2_fast.encoders.attention_hook import STATE_ARGUMENT, PrefixState
from ptv2_fast.encoders.disabling import keep_disabled
from ptv2_fast.encoders.own_attention import keep_state, running_state

_FUNCTION = "_gradient_checkpointing_func"  # transformers' name for it, on every layer


class UnlessFrozen:
    """Takes the place of a layer's checkpointing function.

    Some versions of transformers checkpoint around a layer's call, others in its forward, which
    `FrozenLayerForward` replaces. A frozen block recomputes by itself and is called directly; a
    layer on the hook path is checkpointed as ever, with its state where it has none among its
    arguments, and with what is disabled in the forward.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, call_layer: Callable[..., Any], *args: Any) -> Any:
        """As the function itself: runs the layer on `args`; the rest is bound to `call_layer`."""
        state = getattr(call_layer, "keywords", {}).get(STATE_ARGUMENT, running_state())
        if isinstance(state, PrefixState) and state.run is not None:
            return call_layer(*args)
        return self.function(keep_disabled(keep_state(call_layer)), *args)


def checkpoint_activations(model: PreTrainedModel, use_reentrant: bool = False) -> None:
    """Recompute the activations of the encoder layers in the backward pass.

    Raises:
        ValueError: for a model that transformers cannot run like that.
    """
    if not model.supports_gradient_checkpointing:
        raise ValueError(
            f"gradient_checkpointing: expected False for {type(model).__name__}, which "
            "transformers cannot checkpoint, got True (recompute='block' is for frozen blocks)"
        )
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(model, name):  # which one depends on the version of transformers
            getattr(model, name)({"use_reentrant": use_reentrant})
            return


def is_checkpointed(layer: nn.Module) -> bool:
    """Whether transformers recomputes this layer in the backward pass."""
    return layer.training and getattr(layer, "gradient_checkpointing", False)


def checkpoint_unless_frozen(layers: list[nn.Module]) -> None:
    """Keep transformers from checkpointing frozen blocks, however often it is switched on."""
    for layer in layers:
        function = getattr(layer, _FUNCTION, None)
        if function is not None and not isinstance(function, UnlessFrozen):
            setattr(layer, _FUNCTION, UnlessFrozen(function))


def restore_checkpointing(layers: list[nn.Module]) -> None:
    """Undo `checkpoint_unless_frozen`."""
    for layer in layers:
        function = getattr(layer, _FUNCTION, None)
        if isinstance(function, UnlessFrozen):
            setattr(layer, _FUNCTION, function.function)


def refuse_reentrant_checkpointing(layers: list[nn.Module]) -> None:
    """Turn reentrant checkpointing off with a warning.

    It gives no gradient to what a layer gets by keyword, and that is the prefix.
    """
    for layer in layers:
        if not getattr(layer, "gradient_checkpointing", False):
            continue
        function = getattr(layer, _FUNCTION, None)
        if isinstance(function, UnlessFrozen):
            function = function.function
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant", True):
            warnings.warn(
                "reentrant gradient checkpointing would not train the prefix: switched to "
                "use_reentrant=False",
                stacklevel=2,
            )
            function.keywords["use_reentrant"] = False
