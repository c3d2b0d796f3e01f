"""The forward of an attached backbone: what happens around transformers' own."""

import inspect
from collections.abc import Callable
from itertools import takewhile
from types import CodeType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

from ptv2_fast.encoders.attention_hook import ATTENTION_NAME, STATE_ARGUMENT, PrefixState
from ptv2_fast.encoders.checkpointing import (
    checkpoint_unless_frozen,
    refuse_reentrant_checkpointing,
)
from ptv2_fast.encoders.hooks import (
    WithoutProducts,
    has_backward_hooks,
    has_foreign_hooks,
    in_eval_mode,
    without_foreign_hooks,
)
from ptv2_fast.encoders.input_checks import check_arguments, input_tokens
from ptv2_fast.encoders.own_attention import call_within
from ptv2_fast.encoders.pads import clear_pads, reads_pads
from ptv2_fast.frozen.engine import FrozenRun

if TYPE_CHECKING:
    from ptv2_fast.encoders.attachment import Attachment

# The argument by which an attached model tells its backbone, for one call, that only the first
# token is read. transformers' heads hand it down among their keyword arguments.
FIRST_TOKEN_ARGUMENT = "ptv2_first_token_only"
_OWN_NAME = "_ptv2_forward"


class NeedsFrozenBlocksError(RuntimeError):
    """A forward that only frozen blocks can run, where transformers' own code would."""


class BackboneForward:
    """Takes the place of a backbone's `forward`, so that `model.forward(...)` has its prefix too.

    It stands for a bound method, and, unlike one that is set on an object, pickles. Who wraps a
    method by its `__func__`, as accelerate does, finds one. A wrapper that is still around when
    the prefix is taken off keeps calling it: then it is the forward that was there before.

    Args:
        backbone: the module.
        replaced: the forward that was set on the module itself; None = that of its class.
    """

    __name__ = "forward"

    def __init__(self, backbone: nn.Module, replaced: Callable[..., Any] | None) -> None:
        self.backbone, self.replaced = backbone, replaced
        self.attachment: Attachment | None = None
        # Read here because torch.compile cannot trace inspect.
        self._names = tuple(self.__signature__.parameters)

    @property
    def __self__(self) -> nn.Module:
        """The object of this method."""
        return self.backbone

    @property
    def __code__(self) -> CodeType:
        """Where torch.export finds the place of its trace."""
        return BackboneForward.__call__.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the forward which was there before: Trainer drops columns by it."""
        bound = type(self.backbone).forward.__get__(self.backbone)
        return inspect.signature(bound if self.replaced is None else self.replaced)

    @property
    def __func__(self) -> Callable[..., Any]:
        """The function of this method; it serves copies of the backbone as well."""

        def forward(backbone: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return vars(backbone)[_OWN_NAME](*args, **kwargs)

        signature = self.__signature__
        module = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        parameters = [module, *signature.parameters.values()]
        forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Check the inputs, compute the prefix once, send it along, prove that it was used."""
        if args and args[0] is self.backbone:  # accelerate binds what it finds below its wrappers
            args = args[1:]
        if self.attachment is None:
            return self._inner(*args, **kwargs)
        kwargs = dict(kwargs)
        first_token_only = kwargs.pop(FIRST_TOKEN_ARGUMENT, False)
        # zip is not strict: positional arguments are the first of the names.
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        arguments = self.attachment.family.read_arguments(arguments)
        state = _start(self.attachment, arguments, first_token_only)
        if state.repeat is not None:
            arguments = {n: _repeated(value, state.repeat.rows) for n, value in arguments.items()}
            if state.run is None:  # the layers' own code knows one batch
                self.attachment.repeat_inputs(state.repeat.rows)
                args, kwargs = (), dict(arguments)
        if self.attachment.family.is_decoder:
            kwargs |= _known_mask(arguments, self._names[: len(args)])
        output = self._run(state, *args, **kwargs)
        missed = state.missed(state.layers)
        if missed:
            raise RuntimeError(
                f"{_describe_missed(missed, self.backbone)} (was the model's attention "
                "implementation changed after attach?)"
            )
        needs_zeros = self.attachment.hides_pads
        if state.run is not None:
            # Of zeros, a norm behind the last block makes its bias.
            has_pads = state.run.layout.index is not None
            needs_zeros = has_pads and state.blocks[-1].modules.spec.pre_norm
        if needs_zeros:
            return clear_pads(output, arguments.get("attention_mask"))
        return output

    def prove(
        self, num_layers: int, key_shape: tuple[int, int], tokens: int, indices: tuple[str, ...]
    ) -> None:
        """Run a few tokens through the backbone: every layer has to call the operator once.

        The layers' own code runs, not frozen blocks, in eval mode, with the operator in plain torch
        and without the products of linear layers, whose weights would take long to read. Nobody
        else's hooks are called. A backbone on the meta device, and any while hooks on all modules
        are registered, is left to the check of its first forward.

        Args:
            num_layers: calls that have to be made.
            key_shape: number and width of the prefix's heads.
            tokens: how many.
            indices: arguments that get a 0 for each sequence.

        Raises:
            ValueError: when some layer does not, or has an attention that is not served.
        """
        tensors = (*self.backbone.parameters(), *self.backbone.buffers())
        if any(tensor.is_meta for tensor in tensors) or has_any_global_hook():
            return
        weight = self.backbone.get_input_embeddings().weight  # type: ignore[operator]
        ids = torch.zeros(1, tokens, dtype=torch.long, device=weight.device)
        # No layer has a prefix: empty ones are made where the layer is.
        state = PrefixState({}, 0.0, False, num_layers, key_shape, backend="reference")
        if self.attachment is not None:  # tables of these products are not to be kept
            state.relative = self.attachment.family.relative_positions(self.backbone)
        zeros = dict.fromkeys(indices, ids[:, 0])
        with torch.no_grad(), in_eval_mode(self.backbone), without_foreign_hooks(self.backbone):
            with WithoutProducts():
                self._run(state, input_ids=ids, **zeros)
        missed = state.missed(range(num_layers))
        if missed:
            raise ValueError(f"model: {_describe_missed(missed, self.backbone)}")

    def _run(self, state: PrefixState, *args: Any, **kwargs: Any) -> Any:
        """The forward itself, with a state for its attention modules."""
        if self.attachment is not None and self.attachment.own_attention:
            return call_within(state, self._inner, *args, **kwargs)
        return self._inner(*args, **{**kwargs, STATE_ARGUMENT: state})

    def _inner(self, *args: Any, **kwargs: Any) -> Any:
        if self.replaced is None:
            return type(self.backbone).forward(self.backbone, *args, **kwargs)
        return self.replaced(*args, **kwargs)


def _describe_missed(missed: dict[int, int], backbone: nn.Module) -> str:
    name = type(backbone).__name__
    silent = [layer for layer, count in missed.items() if count == 0]
    if silent:
        return (
            f"layers {silent} of {name} did not call the attention function {ATTENTION_NAME!r}: "
            "their prefix had no effect"
        )
    return (
        f"expected one call of {ATTENTION_NAME!r} by every layer of {name}, got "
        f"{', '.join(f'{count} by layer {layer}' for layer, count in missed.items())}"
    )


def take_forward(backbone: nn.Module, attachment: "Attachment") -> BackboneForward:
    """Put an attachment's `BackboneForward` in place."""
    own = vars(backbone)
    # One that `give_forward_back` had to leave behind is called by the wrapper around it.
    if _OWN_NAME not in own or "forward" not in own:
        setattr(backbone, _OWN_NAME, BackboneForward(backbone, own.get("forward")))
        backbone.forward = own[_OWN_NAME]  # type: ignore[method-assign]
    own[_OWN_NAME].attachment = attachment
    return own[_OWN_NAME]


def give_forward_back(backbone: nn.Module) -> None:
    """Undo `take_forward`, also under the wrapper of someone else."""
    own = vars(backbone)
    forward: BackboneForward = own[_OWN_NAME]
    forward.attachment = None
    if replaced_by_prefix(own.get("forward"), backbone) is None:
        return
    delattr(backbone, _OWN_NAME)
    if forward.replaced is None:
        del backbone.forward
    else:
        backbone.forward = forward.replaced  # type: ignore[method-assign]


def replaced_by_prefix(forward: object, backbone: nn.Module) -> Callable[..., Any] | None:
    """What the forward of a prefix stands in for; None when `forward` is something else.

    Args:
        forward: the `BackboneForward`, or its function, which accelerate takes out of wrappers.
        backbone: to which it belongs.
    """
    function = forward.__func__ if isinstance(forward, MethodType) else forward
    is_ours = isinstance(function, BackboneForward)
    if not is_ours and getattr(function, "__globals__", None) is not globals():
        return None
    own = vars(backbone)[_OWN_NAME]
    return type(backbone).forward if own.replaced is None else own.replaced


def _start(
    attachment: "Attachment", arguments: dict[str, Any], first_token_only: bool
) -> PrefixState:
    """Check the arguments of a forward, by name, and make what it hands to the layers."""
    backbone = attachment.backbone
    check_arguments(arguments, attachment.model, attachment.family, attachment.positions_taken)
    if backbone.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        attachment.check_training()
    if not torch.compiler.is_compiling():
        attachment.vectors.check()
    embeds = arguments.get("inputs_embeds")
    given = attachment.given()
    state = PrefixState(
        layers=given.layers,
        prefix_dropout=given.dropout,
        keep_input_gradient=(embeds is not None and embeds.requires_grad)
        or _gradient_below_layers(attachment),
        num_layers=len(attachment.layers),
        key_shape=(attachment.encoder.num_heads, attachment.encoder.head_dim),
        relative=attachment.relative,
        repeat=given.repeat,
        adapters=given.adapters,
    )
    state.run = _start_blocks(attachment, arguments, state, first_token_only)
    if state.run is None and state.adapters is not None:
        raise NeedsFrozenBlocksError("several adapters with updates in one pass")
    if state.run is None and backbone.training:
        if attachment.own_attention or attachment.vectors.stand_ins:  # which a layer looks for
            checkpoint_unless_frozen(attachment.layers)
        refuse_reentrant_checkpointing(attachment.layers)
    return state


def _repeated(value: Any, rows: Tensor) -> Any:
    """An argument for the texts `rows`, int64 [B'], of its batch."""
    return value[rows] if isinstance(value, Tensor) else value


def _known_mask(arguments: dict[str, Any], positional: tuple[str, ...]) -> dict[str, Tensor]:
    """In a trace, the mask of a text without padding, where a decoder got none.

    From positions without a mask transformers finds out whether several texts are packed in one,
    unless it must not look at values: then it takes them to be, and attention refuses that.

    Args:
        arguments: of the backbone's forward, by name.
        positional: names of those that were given by position.
    """
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    tokens, given = input_tokens(arguments), ("attention_mask", "position_ids")
    if not is_traced or tokens is None or "attention_mask" in positional:
        return {}
    if any(arguments.get(name) is not None for name in given):
        return {}
    ones = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    return {"attention_mask": ones}


def _gradient_below_layers(attachment: "Attachment") -> bool:
    """Whether something in front of the layers trains, or someone's hook may want a gradient.

    The hook of transformers that goes with checkpointing wants none.
    """
    family, backbone = attachment.family, attachment.backbone
    stems = takewhile(lambda stem: not family.layers.startswith(stem), family.frozen)
    parts = [part for part in (_part(backbone, stem) for stem in stems) if part is not None]
    if any(parameter.requires_grad for part in parts for parameter in part.parameters()):
        return True
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return any(
        has_foreign_hooks(module) or has_backward_hooks(module)
        for part in parts
        for module in part.modules()
    )


def _part(backbone: nn.Module, stem: str) -> Any:
    """A part of a backbone by its dotted name, or None."""
    part: Any = backbone
    for name in stem.split("."):
        part = getattr(part, name, None)
    return part


def _start_blocks(
    attachment: "Attachment",
    arguments: dict[str, Any],
    state: PrefixState,
    first_token_only: bool,
) -> FrozenRun | None:
    tokens = input_tokens(arguments)
    if tokens is None:  # transformers' own error names the two arguments
        return None
    shows_layers = arguments.get("output_hidden_states")
    if shows_layers is None:
        shows_layers = attachment.model.config.output_hidden_states
    return attachment.frozen.start(
        tokens,
        arguments,
        state,
        shows_layers=bool(shows_layers),
        first_token_only=first_token_only,
        reads_pads=reads_pads(attachment.model),
        stand_ins=attachment.vectors.stand_ins if attachment.enabled else {},
    )
