"""The adapters of a bank, each with its prefix and its head, and what heads make of states."""

import contextlib
import inspect
import os
import threading
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.adapters.bank_models import has_known_code
from ptv2_fast.encoders.adapter_content import describe_adapter, written_tensors
from ptv2_fast.encoders.adapter_files import write_adapter
from ptv2_fast.encoders.adapter_tensors import ENCODER_NAME, frozen_stems
from ptv2_fast.encoders.attaching import require_attachment
from ptv2_fast.encoders.attachment import Attachment
from ptv2_fast.encoders.bank_attachment import BankAttachment, GivenStates
from ptv2_fast.encoders.family import Family
from ptv2_fast.encoders.first_token import reads_first_token_only
from ptv2_fast.encoders.pads import reads_pads
from ptv2_fast.prefix import LayerPrefix

# Where the tokens of a row are in its columns.
Place = slice | Tensor


class Member:
    """One adapter of a bank.

    Args:
        shared: the bank's backbone.
        backbone: the same without prefixes.
        model: with the adapter, on what is frozen of this backbone; it is taken apart.
        make: makes such a model without the adapter.
        base_model: what the adapter was trained on, by its name.
        dtypes: of the adapter's tensors, in which they are written.
        keep_projection: do not fold that of its prefix, so that it can train.

    Attributes:
        model: of its class, without encoder layers where it shares the bank's pass.
        encoder: its prefix.
        runs_alone: its layers or embeddings are others than those of the bank, or a class of the
            user's calls them in a way that is not known.
        values: the biases, norms and updates that it has inside of them, or None.
        lowest: the lowest layer with one; behind the last one where there is none.
        offset: positions in front of its first token.
        prefix_dropout: in training.
        first_token_only: its head reads the first token's state and no other.
        labels: by number; None where the results are numbers, places or states.
        run_of: what is known of the run that trained it, if anything.
    """

    run_of: Any = None

    def __init__(
        self,
        shared: BankAttachment,
        backbone: PreTrainedModel,
        model: PreTrainedModel,
        make: Callable[[], PreTrainedModel],
        base_model: str | None,
        dtypes: dict[str, torch.dtype],
        keep_projection: bool,
    ) -> None:
        attachment = require_attachment(model)
        self.model, self.encoder = model, attachment.encoder
        self._base_model, self._dtypes = base_model, dtypes
        self.offset = attachment.positions_taken
        self.prefix_dropout = attachment.config.prefix_dropout
        self.first_token_only = _reads_first_token_only(attachment)
        self.labels = _labels_of(model)
        self._has_own_code = not has_known_code(type(model))
        self._has_choices = type(model).__name__.endswith("ForMultipleChoice")
        self._reads_pads = reads_pads(model)
        self._names = _inputs_of(model)
        self._head_names = [n for n in attachment.saved_names if not n.startswith(ENCODER_NAME)]
        vectors, family = attachment.vectors, attachment.family
        has_words = (
            model.get_input_embeddings().weight is not backbone.get_input_embeddings().weight
        )
        differs = has_words or self._has_own_code or _differs_inside(attachment)
        self.runs_alone = differs or shared.cannot_read(vectors)
        self.values = None if self.runs_alone else shared.values_of(vectors)
        self.lowest = min(vectors.layers_inside, default=len(shared.layers))
        self._is_whole = self.runs_alone or self.values is not None
        if self._is_whole:
            attachment.frozen.share_weights(shared.frozen)
            for name, parameter in model.named_parameters():
                if name in self._head_names:
                    parameter.data = parameter.data.to(backbone.dtype)
        else:
            self._take_apart(attachment, keep_projection)
            self._read_by(model, family)
        if self.values is not None:
            head = make()
            _share(model, head, self._head_names)
            self._read_by(head, family)
        # Hooks of a task may keep something from one part of the model to the next.
        has_hooks = bool(model._forward_pre_hooks)
        self._lock: Any = threading.Lock() if has_hooks else contextlib.nullcontext()

    def _take_apart(self, attachment: Attachment, keep_projection: bool) -> None:
        """Leave nothing of the model but its head."""
        if self.encoder.projection is not None and not keep_projection:
            self.encoder = self.encoder.fold()
        self._description = {**describe_adapter(attachment), "base_model": self._base_model}
        has_projection = self.encoder.projection is not None
        self._description["prefix_config"]["prefix_projection"] = has_projection
        attachment.undo()

    def _read_by(self, head: PreTrainedModel, family: Family) -> None:
        """Let the head of this model read states; its layers are taken out."""
        self._head = head
        head.config.return_dict = True
        self._is_bare = head.base_model is head
        dtypes = (p.dtype for n, p in head.named_parameters() if n in self._head_names)
        self._head_dtype = next(dtypes, None)
        self._given = GivenStates(cast(Any, head.base_model), family)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the prefix and of the head."""
        encoder = {id(parameter) for parameter in self.encoder.parameters()}
        of_head = [
            parameter
            for name, parameter in self.model.named_parameters()
            if name in self._head_names and id(parameter) not in encoder
        ]
        return [*self.encoder.parameters(), *of_head]

    def train(self, mode: bool) -> None:
        """Train what the adapter holds, or freeze it."""
        self.model.train(mode)
        for parameter in self.parameters:
            parameter.requires_grad_(mode)
        if self._is_whole:
            require_attachment(self.model).set_trainable(mode)

    def save(self, directory: str | os.PathLike) -> None:
        """Write the adapter as `save_adapter` does."""
        if self._is_whole:
            attachment = require_attachment(self.model)
            kept = written_tensors(attachment)
            kept = {name: tensor.to(self._dtypes[name]) for name, tensor in kept.items()}
            description = {**describe_adapter(attachment), "base_model": self._base_model}
            write_adapter(directory, description, kept)
            return
        state = self.model.state_dict()
        tensors = {name: state[name] for name in self._head_names}
        tensors |= {f"{ENCODER_NAME}.{n}": t for n, t in self.encoder.state_dict().items()}
        write_adapter(directory, self._description, tensors)

    def layers(self) -> dict[int, LayerPrefix]:
        """Layer index -> its prefix."""
        if self.encoder.config.num_virtual_tokens == 0:
            return {}
        trains = torch.is_grad_enabled() and any(
            parameter.requires_grad for parameter in self.encoder.parameters()
        )
        return self.encoder.layer_prefixes() if trains else self.encoder.layer_views()

    def read(self, states: Tensor, inputs: dict[str, Tensor], places: list[Place]) -> list[Tensor]:
        """What the head makes of the backbone's last states, for each row.

        Args:
            states: [B, T, C].
            inputs: of these rows.
            places: of their tokens.
        """
        if self._is_bare:
            return _cut(states, places)
        states = states.to(self._head_dtype or states.dtype)
        if not self._reads_pads:
            with self._given.of(states):
                return self._run(self._head, inputs, places)
        results = []
        for row, place in enumerate(places):
            own = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
            length = states.shape[1]
            own = {n: t[:, place] if t.shape[1:2] == (length,) else t for n, t in own.items()}
            with self._given.of(states[row : row + 1, place]):
                results += self._run(self._head, own, [slice(None)])
        return results

    def run(self, inputs: dict[str, Tensor], places: list[Place]) -> list[Tensor]:
        """What the model makes of rows, for each."""
        return self._run(self.model, inputs, places)

    def _run(
        self, model: PreTrainedModel, inputs: dict[str, Tensor], places: list[Place]
    ) -> list[Tensor]:
        names = inputs if self._names is None else self._names
        known: dict[str, Any] = {n: tensor for n, tensor in inputs.items() if n in names}
        if self._has_choices:  # each row is one choice of one example
            known = {n: t[:, None] if t.dim() > 1 else t for n, t in known.items()}
        if not self._has_own_code or "return_dict" in names:
            known["return_dict"] = True
        with self._lock:
            output = model(**known)
        if "start_logits" in output:
            return _cut(torch.stack((output.start_logits, output.end_logits), dim=-1), places)
        if "logits" not in output:
            return _cut(output.last_hidden_state, places)
        logits = output.logits
        if self._has_choices:
            return list(logits.squeeze(1).unbind(0))
        return _cut(logits, places) if logits.dim() == 3 else list(logits.unbind(0))


def _cut(rows: Tensor, places: list[Place]) -> list[Tensor]:
    """[B, T, ...] -> what belongs to the tokens of each row."""
    return [row[place] for row, place in zip(rows.unbind(0), places, strict=True)]


def _inputs_of(model: PreTrainedModel) -> tuple[str, ...] | None:
    """The names of what a model takes; None where a user's class takes any."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return None if takes_any and not has_known_code(type(model)) else tuple(parameters)


def _differs_inside(attachment: Attachment) -> bool:
    """Whether modules inside the frozen part of a model train, or have trained, themselves."""
    stems = frozen_stems(attachment.model, attachment.family)
    return any(name.startswith(stems) for name in attachment.saved_names)


def _share(model: PreTrainedModel, other: PreTrainedModel, names: list[str]) -> None:
    """Give another model of the same class these tensors of a model."""
    for name in names:
        path, _, key = name.rpartition(".")
        own, others = model.get_submodule(path), other.get_submodule(path)
        for kept, taken in ((own._parameters, others._parameters), (own._buffers, others._buffers)):
            if key in kept:
                taken[key] = kept[key]  # type: ignore[assignment]


def _reads_first_token_only(attachment: Attachment) -> bool:
    model, backbone, family = attachment.model, attachment.backbone, attachment.family
    if model is backbone:
        return False
    exit = backbone.get_submodule(family.exit) if family.exit else None
    return reads_first_token_only(model, backbone, backbone.get_submodule(family.encoder), exit)


def _labels_of(model: PreTrainedModel) -> list[str] | None:
    config, kind = cast(Any, model.config), type(model).__name__
    is_number = config.problem_type == "regression" or config.num_labels == 1
    has_labels = kind.endswith(("ForSequenceClassification", "ForTokenClassification"))
    if not has_labels or is_number:
        return None
    return [config.id2label[number] for number in range(config.num_labels)]
