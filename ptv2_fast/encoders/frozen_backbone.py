"""Encoder layers of transformers that run as frozen blocks, or the reason why they do not."""

import inspect
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

from ptv2_fast.encoders.attention_hook import STATE_ARGUMENT, PrefixState, check_served
from ptv2_fast.encoders.blocks import DescribeBlock, Heads, NotServedError
from ptv2_fast.encoders.checkpointing import (
    checkpoint_unless_frozen,
    is_checkpointed,
    restore_checkpointing,
)
from ptv2_fast.encoders.family import Family
from ptv2_fast.encoders.hooks import has_backward_hooks, has_foreign_hooks
from ptv2_fast.encoders.own_attention import replaces_attention, running_state
from ptv2_fast.encoders.vectors import StandInForward
from ptv2_fast.frozen.call import AttentionInputs
from ptv2_fast.frozen.engine import Block, FrozenRun, products_dtype
from ptv2_fast.frozen.layout import full_layout, masked_layout
from ptv2_fast.frozen.modules import BlockModules
from ptv2_fast.frozen.vectors import StandIns
from ptv2_fast.frozen.weights import WeightReader, is_plain
from ptv2_fast.prefix import PTuningV2Config

# A LayerNorm of transformers' own.
_DEBERTA_NORM = "transformers.models.deberta.modeling_deberta.DebertaLayerNorm"


class FrozenLayerForward:
    """Takes the place of an encoder layer's `forward`.

    The module stays and is called as ever, so that hidden states are recorded and hooks of others
    run; gradient checkpointing does not (checkpointing.py).

    Args:
        layer: of the encoder.
        index: its number; None for a module that is several layers, which go by their calls.
        family: of the model; it describes such a layer.
        heads: of keys and values.
    """

    def __init__(self, layer: nn.Module, index: int | None, family: Family, heads: Heads) -> None:
        self.layer, self.index, self.family, self.heads = layer, index, family, heads
        # Read here because it is needed in every forward.
        self._names = _arguments(layer)[2:]  # without self and the hidden states
        self._take(self._describe())

    def refresh(self) -> None:
        """Take over modules that were replaced since, say by those of another adapter."""
        modules = self._describe()
        if modules != self.block.modules:
            self._take(modules)

    def _describe(self) -> BlockModules:
        return cast(DescribeBlock, self.family.describe_block)(self.layer, self.heads)

    def _take(self, modules: BlockModules) -> None:
        self.block = Block(modules, WeightReader(modules))
        self.inside = _modules_inside(self.layer)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own forward, which runs where the engine does not."""
        state = kwargs.get(STATE_ARGUMENT, running_state())
        if not isinstance(state, PrefixState) or state.run is None:
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        # zip is not strict: positional arguments are the first of the names.
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        arguments.pop("attention_mask", None)  # which is in the layout of the run
        inputs = AttentionInputs()
        if self.block.modules.spec.rotary is not None:
            inputs = AttentionInputs(*arguments.pop("position_embeddings"))
        if self.family.find_bias is not None:
            given, tokens = arguments.pop("position_bias", None), state.run.layout.shape[1]
            bias = self.family.find_bias(self.layer, given, tokens)
            inputs = inputs._replace(bias=state.readable_bias(bias))
        if state.relative is not None:
            arguments.pop("relative_pos", None)  # distances, which the operator knows
            attention = self.layer.get_submodule(self.family.attention)
            dtype = products_dtype(hidden_states, self.block.modules)
            embeddings, tokens = arguments.pop("rel_embeddings", None), state.run.layout.shape[1]
            positions = state.relative.of(attention, embeddings, tokens, dtype)
            inputs = inputs._replace(positions=positions)
        index = len(state.called) if self.index is None else self.index
        check_served(arguments, index)
        state.called.append(index)
        above = state.blocks[index + 1].modules if index + 1 < state.num_layers else None
        prefix = state.layers.get(index)
        states = state.run.run_layer(index, hidden_states, prefix, self.block, above, inputs)
        if self.family.layer_output is not None:
            return self.family.layer_output(states, inputs.bias)
        return states


class FrozenBackbone:
    """The layers of one model as frozen blocks.

    Args:
        layers: the encoder layers in the order of their calls.
        family: of the model.
        heads: of its attention's keys and values.
        config: the prefix's configuration.
        trains_layers: parameters of the layers are to be trained.

    Raises:
        ValueError: with `backbone="frozen"` or `strict`, when the layers cannot be frozen blocks.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        family: Family,
        heads: Heads,
        config: PTuningV2Config,
        trains_layers: bool,
    ) -> None:
        self.layers, self.heads, self.config = layers, heads, config
        self.modules = list(dict.fromkeys(layers))
        self.family = family
        self._warned: set[str] = set()
        self._forwards: list[FrozenLayerForward] = []
        self.is_possible = config.backbone != "hook"
        if self.is_possible:
            reason = static_fallback_reason(self.modules, family, heads)
            if reason is None and trains_layers:
                reason = "modules_to_save trains parameters of the layers"
            if reason is not None:
                self._fall_back(reason, config.backbone == "frozen")
                self.is_possible = False

    def install(self) -> None:
        """Take over the forward of every layer, when that is possible."""
        if not self.is_possible:
            return
        is_shared = len(self.modules) < len(self.layers)
        for index, layer in enumerate(self.modules):
            number = None if is_shared else index
            forward = FrozenLayerForward(layer, number, self.family, self.heads)
            layer.forward = forward  # type: ignore[method-assign]
            self._forwards.append(forward)

    def undo(self) -> None:
        """Give the layers their own forward, and their parameters their own memory."""
        for forward in self._forwards:
            if forward.layer.__dict__.get("forward") is forward:
                del forward.layer.forward
            forward.block.reader.separate()
        restore_checkpointing(self.modules)

    def start(
        self,
        tokens: Tensor,
        arguments: dict[str, Any],
        state: PrefixState,
        shows_layers: bool,
        first_token_only: bool,
        reads_pads: bool,
        stand_ins: StandIns,
    ) -> FrozenRun | None:
        """Begin a forward of the backbone; None when it has to take the hook path.

        Args:
            tokens: [B, T] or [B, T, hidden].
            arguments: of the backbone's forward, by name.
            state: of this forward.
            shows_layers: the states between the layers are asked for.
            first_token_only: nothing but the first token of the last layer's output is read.
            reads_pads: the states of pad tokens are.
            stand_ins: of modules of the layers whose vectors train.

        Raises:
            ValueError: with `strict`, and for unfrozen layers with `backbone="frozen"`.
        """
        # A compiler sees through transformers' own layers and fuses them itself; a trace of the
        # blocks would hold the lengths of its example.
        if not self._forwards or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        reason = self._dynamic_fallback_reason(stand_ins)
        if reason is not None:
            self._fall_back(reason, self.config.backbone == "frozen")
            return None
        if has_any_global_hook():
            self._fall_back("hooks on all modules are registered, which would miss their calls")
            return None
        mask = arguments.get("attention_mask")
        if mask is not None:
            layout = masked_layout(mask.bool())
        else:
            layout = full_layout(tokens.shape[0], tokens.shape[1], tokens.device)
        if layout is None:
            self._fall_back("attention_mask hides the first token of a sequence (left padding)")
            return None
        if reads_pads and layout.index is not None:
            self._fall_back("the head's summary reads pad tokens")
            return None
        if layout.has_holes and self._reads_distances(state):
            self._fall_back("attention_mask hides tokens between others, and attention goes by how "
                            "far tokens are apart")  # fmt: skip
            return None
        shows_layers = shows_layers or any(has_foreign_hooks(layer) for layer in self.modules)
        policy = self.config.recompute
        if any(is_checkpointed(layer) for layer in self.modules):
            checkpoint_unless_frozen(self.modules)
            if policy == "none":
                policy = "block"
        lowest = 0 if state.keep_input_gradient else min(state.layers, default=len(self.layers))
        blocks = {forward.layer: forward.block for forward in self._forwards}
        state.blocks = [blocks[layer] for layer in self.layers]
        reads_all = state.blocks[-1].modules.spec.is_causal or state.relative is not None
        has_convolution = state.relative is not None and state.relative.has_convolution
        return FrozenRun(
            layout,
            num_layers=len(self.layers),
            lowest=lowest,
            prefix_dropout=state.prefix_dropout,
            policy=policy,
            memory_budget=self.config.memory_budget,
            unpack_each=shows_layers,
            context_lengths=layout.packed_lengths(arguments.get("context_lengths")),
            first_token_only=first_token_only and not shows_layers and not reads_all,
            padded_above=0 if has_convolution else None,
            stand_ins=stand_ins,
            repeat=state.repeat,
            adapters=state.adapters,
        )

    def _reads_distances(self, state: PrefixState) -> bool:
        """Whether some attention has a window, or a bias or scores by distance."""
        has_window = any(f.block.modules.spec.window is not None for f in self._forwards)
        return has_window or self.family.find_bias is not None or state.relative is not None

    def share_weights(self, other: "FrozenBackbone") -> None:
        """Read the weights where another one does whose layers have the same parameters.

        Both would join those of layers with a common input, each in memory of its own.
        """
        for own, others in zip(self._forwards, other._forwards, strict=False):
            own.block = own.block._replace(reader=others.block.reader)

    def has_head_norms_of(self, stand_ins: StandIns) -> bool:
        """Whether norms of the heads of queries and keys are among these modules."""
        return any(
            norm in stand_ins
            for forward in self._forwards
            for norm in forward.block.modules.head_norms
        )

    def join_weights(self) -> None:
        """Do now, and not in the first forward, what rearranges parameters in memory."""
        for forward in self._forwards:
            forward.block.reader.read(forward.block.modules.dtype)

    def _dynamic_fallback_reason(self, stand_ins: StandIns) -> str | None:
        for index, forward in enumerate(self._forwards):
            try:
                forward.refresh()
            except NotServedError as error:
                return f"layer {index}: {error}"
            modules = forward.block.modules
            reason = _why_not(modules) or _why_not_trained(modules, stand_ins)
            reason = reason or _who_listens(forward.inside)
            if reason is None and forward.layer.forward is not forward:
                reason = "its forward was replaced by something else"
            if reason is None and has_backward_hooks(forward.layer):
                reason = "someone listens to its backward pass"
            for parameter in modules.parameters():
                if parameter.requires_grad:
                    reason = reason or "its parameters are trained"
            if reason is not None:
                return f"layer {index}: {reason}"
        return None

    def _fall_back(self, reason: str, is_error: bool = False) -> None:
        if is_error or self.config.strict:
            raise ValueError(f"backbone: expected layers that run as frozen blocks; {reason}")
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"the backbone runs without frozen blocks: {reason}", stacklevel=3)


def static_fallback_reason(layers: list[nn.Module], family: Family, heads: Heads) -> str | None:
    """Why the layers of a model are no frozen blocks; None when they are.

    Args:
        layers: each once.
        family: of the model.
        heads: of its attention's keys and values.
    """
    describe = family.describe_block
    if describe is None:
        return "the layers of this family are not served"
    for index, layer in enumerate(layers):
        if "forward" in layer.__dict__:
            return f"layer {index}: its forward was replaced by something else"
        try:
            modules = describe(layer, heads)
            reason = _why_not(modules)
            if modules.spec.rotary and "position_embeddings" not in _arguments(layer):
                reason = "this version of transformers rotates inside of its attention"
        except NotServedError as error:
            reason = str(error)
        except AttributeError as error:  # of another version of transformers
            reason = f"expected the modules of its family, got a layer where {error}"
        reason = reason or _who_listens(_modules_inside(layer))
        if reason is not None:
            return f"layer {index}: {reason}"
    return None


def _arguments(layer: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(layer).forward).parameters)


def _why_not(modules: BlockModules) -> str | None:
    """Why these modules cannot be one frozen block; None when they can."""
    for name, linear in modules.linears().items():
        kind = type(linear)
        # Quantised layers are linear layers of their own kind; adapters wrap one.
        if not isinstance(linear, nn.Linear):
            return f"{name} is a {kind.__module__}.{kind.__qualname__}, not a Linear"
        if is_plain(linear) and type(linear.weight) is not nn.Parameter:  # sharded, say
            return f"the weight of {name} is a {type(linear.weight).__qualname__}"
    for norm in modules.norms():
        name = f"{type(norm).__module__}.{type(norm).__qualname__}"
        is_rms = not modules.spec.subtract_mean and name.startswith("transformers.models.")
        is_layer_norm = type(norm) is nn.LayerNorm or name == _DEBERTA_NORM
        if not (is_rms or is_layer_norm) or not isinstance(norm.weight, Tensor):
            return f"expected a norm with weights, got a {name}"
    return None


def _why_not_trained(modules: BlockModules, stand_ins: StandIns) -> str | None:
    """Why what trains inside of a block cannot be added to its products; None when it can."""
    for linears in modules.products():
        other = next((linear for linear in linears if not is_plain(linear)), None)
        if other is not None and any(linear in stand_ins for linear in linears):
            kind = f"{type(other).__module__}.{type(other).__qualname__}"
            return f"something of a linear layer trains that is a {kind}, or shares its input"
    return None


def _modules_inside(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in layer.named_modules() if module is not layer]


def _who_listens(inside: list[tuple[str, nn.Module]]) -> str | None:
    """A module inside a layer whose call someone watches or replaced: it will not be called."""
    for name, module in inside:
        own = module.__dict__
        hooks = own["_forward_hooks"] or own["_forward_pre_hooks"]
        listened = (hooks and has_foreign_hooks(module)) or has_backward_hooks(module)
        forward = own.get("forward")
        is_ours = isinstance(forward, StandInForward) or replaces_attention(forward)
        if listened or (forward is not None and not is_ours):
            return f"{name} has hooks or a forward of someone else"
    return None
