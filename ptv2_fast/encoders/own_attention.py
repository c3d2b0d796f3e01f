"""Attention modules that ask transformers for no attention function, but compute it themselves.

Those of MPNet and DeBERTa do in every version of transformers, T5's in those before 5.17. Their
forward is replaced by one that calls the function of attention_hook.py. Their backbones hand no
keyword arguments down, so that a forward's state is found by the thread that runs it; layers that
are recomputed in the backward pass keep it.
"""

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ptv2_fast.encoders.attention_hook import STATE_ARGUMENT, PrefixState, attention_with_prefix
from ptv2_fast.encoders.disentangled import MODULE, project, score_scale


class _Running(threading.local):
    """The forwards that the running thread is in, the innermost last."""

    def __init__(self) -> None:
        self.states: list[PrefixState] = []


_RUNNING = _Running()


def running_state() -> PrefixState | None:
    """The state of the innermost forward that `call_within` runs in this thread."""
    return _RUNNING.states[-1] if _RUNNING.states else None


def call_within(state: PrefixState, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function whose attention modules find a state."""
    _RUNNING.states.append(state)
    try:
        return function(*args, **kwargs)
    finally:
        _RUNNING.states.pop()


def keep_state(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs with the state of now, whenever it is called."""
    state = running_state()
    return function if state is None else functools.partial(call_within, state, function)


def find_own_attention(attentions: list[nn.Module]) -> list[nn.Module]:
    """Those of attention modules that need a forward of ours.

    Raises:
        ValueError: when the forward of one was replaced already.
    """
    found = [module for module in attentions if computes_itself(module)]
    for index, module in enumerate(found):
        if "forward" in vars(module):
            raise ValueError(
                f"model: expected the {type(module).__name__} of transformers in layer {index}, "
                "got one whose forward was replaced by something else"
            )
    return found


def take_attention(attentions: list[nn.Module]) -> None:
    """Replace the forward of attention modules."""
    for module in attentions:
        forward = functools.partial(_FORWARDS[type(module).__name__], module)
        module.forward = forward  # type: ignore[method-assign]


def give_attention_back(attentions: list[nn.Module]) -> None:
    """Undo `take_attention`."""
    for module in attentions:
        del module.forward


def replaces_attention(forward: object) -> bool:
    """Whether a module's forward is that of `take_attention`."""
    return isinstance(forward, functools.partial) and forward.func in _FORWARDS.values()


def computes_itself(module: nn.Module) -> bool:
    """Whether an attention module asks for no attention function."""
    # What a module asks for a function has this name in every version.
    names = vars(sys.modules[type(module).__module__])
    return type(module).__name__ in _FORWARDS and "ALL_ATTENTION_FUNCTIONS" not in names


def _mpnet_forward(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor]:
    # One bias for all sequences, which transformers has copied for each.
    bias = None if position_bias is None else position_bias[:1]
    width, dropout = module.attention_head_size, module.dropout.p
    states = _attend(module, hidden_states, attention_mask, bias, width, dropout, None, kwargs)
    return (states,)


def _t5_forward(
    module: Any,
    hidden_states: Tensor,
    mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    if position_bias is None:
        position_bias = _relative_bias(module, hidden_states)
    width, dropout = module.key_value_proj_dim, module.dropout
    states = _attend(module, hidden_states, mask, position_bias, width, dropout, 1.0, kwargs)
    return states, position_bias


def _umt5_forward(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    states, _ = _t5_forward(module, hidden_states, attention_mask, **kwargs)
    return states, None


def _deberta_forward(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    # `relative_pos` are the distances of tokens, which the operator knows.
    query, key, value = project(module, hidden_states)
    # [B, 1, T, T], rows of padding hidden as columns are.
    visible = None
    if attention_mask is not None:
        visible = attention_mask[:, 0].diagonal(dim1=1, dim2=2).bool().contiguous()
    state = running_state()
    positions = None
    if state is not None and state.relative is not None:
        tokens = hidden_states.shape[1]
        positions = state.relative.of(module, rel_embeddings, tokens, value.dtype)
    out, _ = attention_with_prefix(
        module,
        query,
        key,
        value,
        visible,
        module.dropout.p if module.training else 0.0,
        score_scale(module),
        positions=positions,
        query_states=query_states,
        **{**kwargs, STATE_ARGUMENT: state},
    )
    return out.flatten(start_dim=2), None


_FORWARDS: dict[str, Callable[..., tuple]] = {
    MODULE: _deberta_forward,
    "MPNetSelfAttention": _mpnet_forward,
    "MT5Attention": _t5_forward,
    "T5Attention": _t5_forward,
    "UMT5Attention": _umt5_forward,
}


def _relative_bias(module: Any, hidden_states: Tensor) -> Tensor | None:
    """[1, H, T, T], or None without a table."""
    if not module.has_relative_attention_bias:
        return None
    length = hidden_states.shape[1]
    return module.compute_bias(length, length, device=hidden_states.device)


def _attend(
    module: Any,
    hidden_states: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    head_dim: int,
    dropout: float,
    scale: float | None,
    arguments: dict[str, Any],
) -> Tensor:
    """Attention with its four linear layers, [B, T, hidden].

    Args:
        module: the attention module.
        hidden_states: [B, T, hidden].
        mask: as transformers' own attention adds it to the scores, [B, 1, 1 or T, T].
        bias: [1, H, T, T].
        head_dim: D.
        dropout: on probabilities, in training mode.
        scale: as in `prefix_attention`.
        arguments: what else the module got.
    """
    query, key, value = (
        linear(hidden_states).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        for linear in (module.q, module.k, module.v)
    )
    visible = None
    if mask is not None:
        row = mask[:, 0, 0]  # padding is the same for every row
        visible = row if row.dtype == torch.bool else row == 0
    out, _ = attention_with_prefix(
        module,
        query,
        key,
        value,
        visible,
        dropout if module.training else 0.0,
        scale,
        position_bias=bias,
        **{**arguments, STATE_ARGUMENT: running_state()},
    )
    return module.o(out.flatten(start_dim=2))
