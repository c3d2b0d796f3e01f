"""What `attach` leaves on a model: the hooks of its forward, and how to undo and save it."""

import copy
import dataclasses
import inspect
import os
import threading
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.encoders.adapter_content import describe_adapter, written_tensors
from ptv2_fast.encoders.adapter_files import CHECKPOINT_WEIGHTS_NAME, write_adapter
from ptv2_fast.encoders.adapter_tensors import (
    ENCODER_NAME,
    check_saved,
    find_saved_names,
    prefix_trains,
    trained_ids,
    trains_layers,
)
from ptv2_fast.encoders.attention_hook import ATTENTION_NAME, LAYER_ATTRIBUTE, STATE_ARGUMENT
from ptv2_fast.encoders.backbone_forward import (
    FIRST_TOKEN_ARGUMENT,
    give_forward_back,
    take_forward,
)
from ptv2_fast.encoders.blocks import Heads
from ptv2_fast.encoders.disabling import is_disabled
from ptv2_fast.encoders.family import Family
from ptv2_fast.encoders.first_token import reads_first_token_only
from ptv2_fast.encoders.frozen_backbone import FrozenBackbone
from ptv2_fast.encoders.input_checks import refuse_replica
from ptv2_fast.encoders.own_attention import (
    find_own_attention,
    give_attention_back,
    running_state,
    take_attention,
)
from ptv2_fast.encoders.pads import leave_pads_out
from ptv2_fast.encoders.vectors import TrainedVectors, find_vectors
from ptv2_fast.encoders.vocabulary import (
    ROWS_NAME,
    base_vocabulary_size,
    check_vocabulary,
    restore_rows,
)
from ptv2_fast.frozen.adapter_rows import AdapterRows
from ptv2_fast.frozen.layout import Repeat
from ptv2_fast.prefix import BankPrefix, LayerPrefix, PrefixEncoder, PTuningV2Config

ATTACHMENT_ATTRIBUTE = "_ptv2_attachment"
IGNORED_KEYS = "_keys_to_ignore_on_save"


_COUNT_LOCK = threading.Lock()


def find_attachment(model: nn.Module) -> "Attachment | None":
    """The attachment of a model, or of the model that a part of a backbone serves, or None."""
    return getattr(model, ATTACHMENT_ATTRIBUTE, None)


class Given(NamedTuple):
    """What one forward has in front of its tokens.

    `layers`: layer index -> prefix. `dropout`: on it, in training. `repeat`, `adapters`: see
    `PrefixState`.
    """

    layers: Mapping[int, LayerPrefix] | Mapping[int, BankPrefix]
    dropout: float
    repeat: Repeat | None = None
    adapters: AdapterRows | None = None


class Attachment:
    """The state of one attached model.

    Its methods are the hooks of the model's parts; what happens around a forward of the backbone
    is in backbone_forward.py. Creating one patches the model in place; `undo` restores it.

    Args:
        model: the model, already checked.
        family: its row in the table of families.
        encoder: the prefix, already on the model's device.
    """

    def __init__(self, model: PreTrainedModel, family: Family, encoder: PrefixEncoder) -> None:
        self.model, self.family = model, family
        self.config: PTuningV2Config = encoder.config
        self.backbone: nn.Module = model.base_model
        self.layers = family.layer_modules(self.backbone)
        self.base_vocabulary_size = base_vocabulary_size(model)
        # By all threads; compiled graphs are guarded by it, which they are not by a thread's own.
        self._times_disabled = 0
        embeddings = self.backbone.get_submodule(family.embeddings)
        # Read here because torch.compile cannot trace inspect.
        self._embeddings_names = tuple(inspect.signature(embeddings.forward).parameters)
        if self.config.position_offset == "prefix":
            family.check_offset(self.backbone)

        self._trained_ids: tuple[int, ...] = ()  # as they were when they were last checked
        # Nothing is changed before the last of these lines, which may raise. Below, only the proof
        # at the end may.
        self.saved_names = find_saved_names(model, family, self.config.modules_to_save)
        saved = set(self.saved_names)
        trained = frozenset(id(p) for name, p in model.named_parameters() if name in saved)
        vectors = find_vectors(self.backbone, family, self.config, trained)
        self.frozen = FrozenBackbone(
            self.layers,
            family,
            Heads(encoder.num_heads, encoder.head_dim),
            self.config,
            trains_layers(model, family, self.saved_names),
        )
        attentions = [layer.get_submodule(family.attention) for layer in self.layers]
        self.own_attention = find_own_attention(attentions)
        self.relative = family.relative_positions(self.backbone)
        self._old_requires_grad = {n: p.requires_grad for n, p in model.named_parameters()}
        # Empty where the model has that of its class.
        self._old_ignored_keys = {k: v for k, v in vars(model).items() if k == IGNORED_KEYS}
        self._old_configs = _give_own_configs(model)
        if family.is_decoder:
            model.config.use_cache = False  # the default where a caller does not say
        take_attention(self.own_attention)
        # Some versions of transformers leave out parts that have a configuration of their own.
        for module in model.modules() if not self.own_attention else ():
            if isinstance(module, PreTrainedModel):
                module.set_attn_implementation(ATTENTION_NAME)
        frozen_names = [name for name in model.state_dict() if name not in saved]
        # Trainer compares the keys a checkpoint lacks with this set and is content when equal.
        model._keys_to_ignore_on_save = set(frozen_names)
        self.guard_name = frozen_names[0]
        self.vectors = TrainedVectors(encoder, vectors, self.layers)
        model.add_module(ENCODER_NAME, encoder)
        self.saved_names += [f"{ENCODER_NAME}.{name}" for name in encoder.state_dict()]
        self.set_trainable(not self.config.inference_mode)
        self._old_dtypes: dict[str, torch.dtype] = {}
        self.frozen.install()
        self.vectors.install(self)
        forward = take_forward(self.backbone, self)
        # Modules that can serve one prefix only: no other attached model may share them.
        self._changed = list(dict.fromkeys((embeddings, *self.layers)))
        self._numbered = self._number_layers()
        pads = leave_pads_out(model)
        self.hides_pads = bool(pads)
        self._handles = self._register_hooks() + pads
        model.save_pretrained = self.save_pretrained  # type: ignore[assignment, method-assign]
        for module in (model, *self._changed):
            setattr(module, ATTACHMENT_ATTRIBUTE, self)
        try:
            positions = family.max_positions(model.config) - self.positions_taken
            key_shape = encoder.num_heads, encoder.head_dim
            forward.prove(len(self.layers), key_shape, min(2, positions), family.proof_indices)
        except BaseException:
            self.undo()
            raise
        # Last, because converting back does not restore what was rounded.
        self._old_dtypes = self._convert_backbone(set(frozen_names))

    def _number_layers(self) -> list[tuple[nn.Module, dict[str, None]]]:
        """Tell attention modules their layer where they do not know it and have one only.

        Returns:
            Those modules, each with the attribute as it was; empty where there was none.
        """
        numbered: list[tuple[nn.Module, dict[str, None]]] = []
        if len(set(self.layers)) < len(self.layers):
            return numbered
        for index, layer in enumerate(self.layers):
            attention = layer.get_submodule(self.family.attention)
            if getattr(attention, LAYER_ATTRIBUTE, None) is None:
                old = {k: v for k, v in vars(attention).items() if k == LAYER_ATTRIBUTE}
                numbered.append((attention, old))
                setattr(attention, LAYER_ATTRIBUTE, index)
        return numbered

    def _register_hooks(self) -> list[torch.utils.hooks.RemovableHandle]:
        family, backbone = self.family, self.backbone
        encoder = backbone.get_submodule(family.encoder) if family.encoder else None
        first, last = encoder or self.layers[0], encoder or self.layers[-1]
        handles = [
            backbone.register_forward_pre_hook(refuse_replica),
            first.register_forward_pre_hook(self.before_encoder, with_kwargs=True),
            self.model.register_load_state_dict_pre_hook(self.before_load),
        ]
        if backbone is not self.model:
            handles.append(self.model.register_forward_pre_hook(self.before_head, with_kwargs=True))
        if self.config.backbone_dtype is not None:
            last = backbone.get_submodule(family.exit) if family.exit else last
            handles.append(last.register_forward_hook(self.after_encoder))
        if self.config.position_offset == "prefix":
            embeddings = self._changed[0]
            handles.append(
                embeddings.register_forward_pre_hook(self.before_embeddings, with_kwargs=True)
            )
        return handles

    def _convert_backbone(self, frozen_names: set[str]) -> dict[str, torch.dtype]:
        """Give frozen parameters the dtype asked for; returns what they had, by name."""
        dtype, old = self.config.torch_backbone_dtype, {}
        if dtype is not None:
            for name, parameter in self.model.named_parameters():
                if name in frozen_names and parameter.is_floating_point():
                    old[name] = parameter.dtype
                    parameter.data = parameter.data.to(dtype)
        return old

    @property
    def encoder(self) -> PrefixEncoder:
        """The prefix encoder registered on the model."""
        return self.model.get_submodule(ENCODER_NAME)  # type: ignore[return-value]

    @property
    def enabled(self) -> bool:
        """Whether a call made now has its prefix; `disabled` holds for its own thread only."""
        return self._times_disabled == 0 or not is_disabled(self)

    def count_disabled(self, change: int) -> None:
        """Note that one thread more (1) or less (-1) has disabled this attachment."""
        with _COUNT_LOCK:
            self._times_disabled += change

    @property
    def positions_taken(self) -> int:
        """Positions in front of the first token: P with `position_offset="prefix"`, else 0."""
        shifted = self.enabled and self.config.position_offset == "prefix"
        return self.config.num_virtual_tokens if shifted else 0

    @property
    def offset(self) -> int | Tensor:
        """By how many positions the tokens of the running forward are shifted; [B, 1] or one."""
        return self.positions_taken

    def given(self) -> Given:
        """What a forward that starts now has in front of its tokens."""
        layers = self.encoder.layer_prefixes() if self.enabled else {}
        return Given(layers, self.config.prefix_dropout)

    def repeat_inputs(self, rows: Tensor) -> None:
        """Note that the running forward starts with the texts `rows`, int64 [B'], of its batch."""

    def set_trainable(self, trainable: bool) -> None:
        """Freeze the backbone; train, or freeze as well, everything that an adapter holds."""
        names = set(self.saved_names)
        self.config = dataclasses.replace(self.config, inference_mode=not trainable)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trainable and name in names)

    def check_training(self) -> None:
        """Check, in front of a training step, that it trains what the adapter holds.

        Warns when the prefix is frozen although it was attached for training.

        Raises:
            ValueError: when something else trains.
        """
        if self.config.inference_mode:
            return
        ids = trained_ids(self.model)
        if ids == self._trained_ids:
            return
        check_saved(self.model, self.saved_names)
        if not prefix_trains(self.model):
            warnings.warn(
                f"the prefix does not train: someone (PEFT, say) froze {ENCODER_NAME} after "
                "attach; unfreeze it, or attach with inference_mode=True",
                stacklevel=4,
            )
        self._trained_ids = ids

    def undo(self) -> None:
        """Restore the model as it was before `attach` (trained weights outside stay trained)."""
        for handle in self._handles:
            handle.remove()
        give_forward_back(self.backbone)
        model = self.model
        delattr(model, ENCODER_NAME)
        for module in (model, *self._changed):
            delattr(module, ATTACHMENT_ATTRIBUTE)
        del model.save_pretrained
        del model._keys_to_ignore_on_save
        vars(model).update(self._old_ignored_keys)
        for module, config in self._old_configs:
            module.config = config
        for attention, old in self._numbered:
            delattr(attention, LAYER_ATTRIBUTE)
            vars(attention).update(old)
        give_attention_back(self.own_attention)
        self.vectors.undo()
        self.frozen.undo()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._old_requires_grad.get(name, parameter.requires_grad))
            if name in self._old_dtypes:
                parameter.data = parameter.data.to(self._old_dtypes[name])

    def before_head(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Tell the backbone, in the arguments of this one call, which states the head reads."""
        if torch.compiler.is_compiling():
            return None
        family, backbone = self.family, self.backbone
        exit = backbone.get_submodule(family.exit) if family.exit else None
        encoder = backbone.get_submodule(family.encoder)
        if not reads_first_token_only(module, backbone, encoder, exit):
            return None
        return args, {**kwargs, FIRST_TOKEN_ARGUMENT: True}

    def after_encoder(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Give the head the dtype of its weights, with `backbone_dtype`."""
        if not self._old_dtypes:  # not converted yet
            return output
        dtype = next(iter(self._old_dtypes.values()))
        if isinstance(output, Tensor):
            return output.to(dtype)
        states, layers = output.last_hidden_state, output.get("hidden_states")
        output.last_hidden_state = states.to(dtype)
        if layers and layers[-1] is states:  # which DeBERTa's backbone gives to the head
            output.hidden_states = (*layers[:-1], output.last_hidden_state)
        return output

    def before_embeddings(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Shift the positions of real tokens by P, unless the caller gave position_ids."""
        # zip is not strict: positional arguments are the first of the names.
        arguments = {**dict(zip(self._embeddings_names, args, strict=False)), **kwargs}
        offset = self.offset
        if (isinstance(offset, int) and offset == 0) or arguments.get("position_ids") is not None:
            return None
        ids = arguments.get("input_ids")
        # Some versions of transformers leave an s out.
        names = ("input_ids", "inputs_embeds", "input_embeds")
        tokens = next(arguments[name] for name in names if arguments.get(name) is not None)
        family, config = self.family, self.model.config
        positions = family.positions(config, ids, tokens, offset)
        if isinstance(offset, Tensor):  # pads of a shorter text may stand behind the last one
            last = family.max_positions(config) + family.first_position(config) - 1
            positions = positions.clamp(max=last)
        arguments["position_ids"] = positions
        return (), arguments

    def before_encoder(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Cut the graph below the encoder layers.

        Checkpointing makes the embeddings require grad; without the cut the layers up to the
        lowest prefixed one would record a backward pass that nobody needs.
        """
        state = running_state() if self.own_attention else kwargs.get(STATE_ARGUMENT)
        if state is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = hidden if state.keep_input_gradient else hidden.detach()
        if self._old_dtypes:  # trained embeddings keep their dtype
            hidden = hidden.to(self.config.torch_backbone_dtype)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def before_load(
        self, module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *unused: object
    ) -> None:
        """Take what `save_pretrained` adds out of a state dict that is about to be loaded.

        Raises:
            ValueError: for rows of added tokens that the model lacks.
        """
        self.drop_guard(state_dict, prefix)
        rows = state_dict.pop(prefix + ROWS_NAME, None)
        if rows is not None:
            base = self.base_vocabulary_size
            sizes = {"vocab_size": base + len(rows), "base_vocab_size": base}
            check_vocabulary(sizes, rows, self.model, may_resize=False)
            restore_rows(self.model, rows)

    def drop_guard(self, tensors: dict[str, Tensor], prefix: str = "") -> None:
        """Remove the empty tensor that `save_pretrained` adds, if it is there."""
        name = prefix + self.guard_name
        if name in tensors and tensors[name].numel() == 0:
            del tensors[name]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **unused: object,
    ) -> None:
        """Stands in for the model's `save_pretrained`: writes the adapter as a checkpoint.

        The tensors lie in model.safetensors, the one name Trainer loads again; `load_adapter` reads
        it. An empty tensor in the name of a frozen weight makes `from_pretrained` fail on the
        folder, whatever its config.json: it would fill the backbone at random and only warn.
        Other arguments of transformers' method (shard size, format, variant) have no meaning for
        one small file.

        Raises:
            ValueError: for push_to_hub=True, or a `state_dict` without the adapter's tensors.
        """
        if push_to_hub:
            raise ValueError("push_to_hub: expected False, got True; upload the folder itself")
        if is_main_process:
            tensors = {**written_tensors(self, state_dict), self.guard_name: torch.empty(0)}
            write_adapter(save_directory, describe_adapter(self), tensors, CHECKPOINT_WEIGHTS_NAME)


def _give_own_configs(model: PreTrainedModel) -> list[tuple[nn.Module, Any]]:
    """Replace every configuration by a copy and return (module, old configuration).

    Changing the attention implementation writes into the configuration, an object that other
    models may share; modules that shared one go on sharing its copy.
    """
    old: list[tuple[nn.Module, Any]] = []
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            if id(config) not in copies:
                copies[id(config)] = copy.deepcopy(config)
            old.append((module, config))
            module.config = copies[id(config)]
    return old
