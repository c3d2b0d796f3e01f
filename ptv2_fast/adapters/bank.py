"""Many adapters on one encoder: each row of a batch reads the prefix of its own, in one pass."""

import functools
import inspect
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.adapters.bank_members import Member, Place
from ptv2_fast.adapters.bank_models import (
    check_same_weights,
    copy_around,
    find_class,
    fit_dtypes,
    has_known_code,
    head_options,
    model_around,
    move_model,
    warn_of_another_base,
)
from ptv2_fast.adapters.bank_prefixes import stack_prefixes
from ptv2_fast.adapters.bank_rows import (
    Row,
    adapters_of,
    check_inputs,
    check_lengths,
    passes,
    places_of,
    select,
)
from ptv2_fast.adapters.loading import (
    check_same_model,
    check_tensors,
    put_adapter,
    read_config,
    read_labels,
)
from ptv2_fast.encoders.adapter_content import describe_adapter, written_tensors
from ptv2_fast.encoders.adapter_files import read_adapter
from ptv2_fast.encoders.attaching import check_model, require_attachment
from ptv2_fast.encoders.backbone_forward import NeedsFrozenBlocksError
from ptv2_fast.encoders.bank_attachment import BankCall, Repeat, attach_bank
from ptv2_fast.prefix import PTuningV2Config

BASE = "__base__"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_ASKED = "adapter_names"


class PrefixBank:
    """Adapters that share one encoder, without what runs know of their tasks; see `AdapterBank`."""

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backbone: str = "auto",
    ) -> None:
        check_model(model, PTuningV2Config(num_virtual_tokens=1))  # before it is changed
        move_model(model, device, dtype)
        model.requires_grad_(False).eval()
        self._plain: PreTrainedModel = model.base_model  # type: ignore[assignment]
        self._shared = attach_bank(self._plain, backbone)
        self._input_names = tuple(inspect.signature(self._plain.forward).parameters)
        # Replaced, never changed: a forward reads the one that is there when it starts.
        self._members: dict[str, Member] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they came."""
        return tuple(self._members)

    @property
    def device(self) -> torch.device:
        """Where the encoder is, and its inputs have to be."""
        return self._plain.device

    def labels(self, name: str) -> list[str] | None:
        """The labels of an adapter by number; None for numbers, places, choices and states.

        Raises:
            ValueError: for an unknown name.
        """
        return self._find(self._members, name).labels

    def load(self, name: str, folder: str | os.PathLike, is_trainable: bool = False) -> None:
        """Load the adapter in a folder that `save_adapter` or Trainer wrote.

        Args:
            name: by which rows ask for it.
            folder: of the adapter.
            is_trainable: keep the MLP of a prefix that has one, so that it can train; otherwise it
                is folded into a table.

        Raises:
            ValueError: for a bad name, or one that is there already; and as `load_adapter`.
        """
        self._check_new(name)
        self._load(name, folder, is_trainable)

    def add(self, name: str, attached_model: PreTrainedModel) -> None:
        """Take a copy of the adapter of an attached model.

        A model whose class is not of transformers runs in a pass of its own.

        Raises:
            ValueError: for a bad name, or one that is there already; a model that is not attached,
                or differs from the bank's encoder in its sizes, frozen weights or configuration.
        """
        self._check_new(name)
        attachment = require_attachment(attached_model)
        description = json.loads(json.dumps(describe_adapter(attachment)))
        tensors = {n: t.detach() for n, t in written_tensors(attachment).items()}
        check_same_model(description, self._plain, with_head=False)
        check_same_weights(attached_model, self._plain, tensors)
        options, kind = head_options(attached_model, self._plain), type(attached_model)
        dtypes = _dtypes_of(tensors)
        is_trainable, place = not attachment.config.inference_mode, f"model {name}"
        if has_known_code(kind):
            model, make = self._model(description, tensors, place, kind, options)
        else:
            check_tensors(tensors, tensors, place)
            make = functools.partial(copy_around, self._plain, attached_model, tensors)
            model = make()
        self._put(name, model, make, description, dtypes, is_trainable)

    def unload(self, name: str) -> None:
        """Forget an adapter; forwards that run already finish with it.

        Raises:
            ValueError: for an unknown name.
        """
        with self._lock:
            self._find(self._members, name)
            self._members = {n: member for n, member in self._members.items() if n != name}
        if not any(member.model.training for member in self._members.values()):
            self._shared.model.eval()  # nothing trains any more

    def save(self, name: str, folder: str | os.PathLike) -> None:
        """Write an adapter as `save_adapter` does; a folded projection as the table that it gave.

        Raises:
            ValueError: for an unknown name, or a file in the place of the folder.
        """
        self._find(self._members, name).save(folder)

    def train_mode(self, names: Iterable[str] = ()) -> None:
        """Train these adapters, prefix and head, and no others; the encoder's dropout is on.

        Without names all is as before: nothing trains and there is no dropout.

        Raises:
            ValueError: for an unknown name.
        """
        members, wanted = self._members, [names] if isinstance(names, str) else list(names)
        chosen = [self._find(members, name, "names") for name in wanted]
        for member in members.values():
            member.train(any(member is each for each in chosen))
        self._shared.model.train(bool(chosen))

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """The parameters of an adapter: of its prefix and of its head.

        Raises:
            ValueError: for an unknown name.
        """
        return self._find(self._members, name).parameters

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        adapter_names: Sequence[str | Sequence[str]] | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **more: Tensor | None,
    ) -> list[Any]:
        """Run each text with its adapter, all in one pass of the encoder.

        Adapters whose layers are others than the encoder's (`modules_to_save` inside it, added
        tokens, norms of heads that train) run in a pass of their own, and so do models of a user's
        own class. So do those with trained biases, norms or low-rank updates in training, and where
        no frozen blocks run.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], 0 for padding.
            adapter_names: the adapter of each text, "__base__" for the encoder alone; or a list of
                adapters, which all read this text: what is below the lowest layer with a prefix
                runs once for it.
            token_type_ids: [B, T].
            inputs_embeds: [B, T, C], instead of `input_ids`.
            more: tensors [B, ...] that the encoder takes besides (`position_ids` hold for all
                rows as they are, whatever an adapter's `position_offset` is).

        Returns:
            One result for each text, or a list of them where it has a list of adapters: logits
            [labels] (a regression's has one), of each token [tokens, labels], of the start and the
            end of an answer [tokens, 2], or hidden states [tokens, C], without padding. A row for
            an adapter of multiple choice is one choice of an example, and gives its score, [].

        Raises:
            ValueError: for an unknown adapter, before anything runs; for bad inputs.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "inputs_embeds": inputs_embeds,
            **more,
        }
        inputs = {name: tensor for name, tensor in given.items() if tensor is not None}
        return self._forward(self._members, inputs, adapter_names)

    def _forward(
        self,
        members: dict[str, Member],
        inputs: dict[str, Tensor],
        adapter_names: Sequence[str | Sequence[str]] | None,
    ) -> list[Any]:
        """A call, with the adapters that were there at its start."""
        batch = check_inputs(inputs, self._input_names)
        if not isinstance(adapter_names, list | tuple) or len(adapter_names) != batch:
            raise ValueError(
                f"adapter_names: expected one for each of {batch} texts, got {adapter_names!r:.100}"
            )
        each = [names if isinstance(names, list | tuple) else [names] for names in adapter_names]
        rows = [
            Row(text, None if name == BASE else self._find(members, name, _ASKED))
            for text, names in enumerate(each)
            for name in names
        ]
        check_lengths(inputs, rows, self._shared.family, self._plain.config)
        mask = inputs.get("attention_mask")
        if mask is not None:  # some code of transformers reads numbers
            inputs = {**inputs, "attention_mask": mask.bool().long()}
        places = places_of(mask, batch)
        is_training = self._shared.model.training
        apart = is_training or any(tensor.requires_grad for tensor in inputs.values())
        found = iter(self._results(rows, inputs, places, apart))
        return [
            next(found) if isinstance(names, str) else [next(found) for _ in names]
            for names in adapter_names
        ]

    def _results(
        self, rows: list[Row], inputs: dict[str, Tensor], places: list[Place], apart: bool
    ) -> list[Any]:
        """That of each row; `apart`: as that of `passes`."""
        results: list[Any] = [None] * len(rows)
        for group in passes(rows, self._shared.model.training, apart):
            chosen = [rows[number] for number in group]
            try:
                found = self._run(chosen, inputs, places)
            except NeedsFrozenBlocksError:
                found = self._results(chosen, inputs, places, apart=True)
            for number, result in zip(group, found, strict=True):
                results[number] = result
        return results

    def _find(self, members: dict[str, Member], name: str, what: str = "name") -> Member:
        """An adapter by its name; `what` names the argument, for the message."""
        if not isinstance(name, str) or name not in members:
            base = f"{BASE!r} or " if what == _ASKED else ""
            raise ValueError(
                f"{what}: expected {base}one of {list(members)!r:.300}, got {name!r:.100}"
            )
        return members[name]

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name == BASE:
            raise ValueError(
                f"name: expected 1 to 128 letters, digits, dots, hyphens and underscores, and not "
                f"{BASE!r}, got {name!r:.200}"
            )
        if name in self._members:
            raise ValueError(f"name: expected a new one, got {name!r}; unload that one first")

    def _load(
        self,
        name: str,
        folder: str | os.PathLike,
        is_trainable: bool,
        adapt: Callable[[PreTrainedModel], None] | None = None,
        run: Any = None,
    ) -> None:
        """As `load`.

        Args:
            name, folder, is_trainable: see there.
            adapt: what is done to a model of the adapter's class before the adapter is loaded.
            run: what is known of the run that trained it.
        """
        description, tensors = read_adapter(folder)
        dtypes = _dtypes_of(tensors)
        model, make = self._model(description, tensors, folder, adapt=adapt)
        warn_of_another_base(description.get("base_model"), self._plain, folder)
        self._put(name, model, make, description, dtypes, is_trainable, run)

    def _model(
        self,
        description: dict[str, Any],
        tensors: dict[str, Tensor],
        place: str | os.PathLike,
        kind: type[PreTrainedModel] | None = None,
        options: dict[str, Any] | None = None,
        adapt: Callable[[PreTrainedModel], None] | None = None,
    ) -> tuple[PreTrainedModel, Callable[[], PreTrainedModel]]:
        """A model with this adapter on the bank's encoder, and what makes one without it."""
        read_config(description, place)
        labels = read_labels(description, place)
        check_same_model(description, self._plain, with_head=False)
        kind = kind or find_class(self._plain, description["model_class"], place)
        tensors = fit_dtypes(tensors, kind, self._plain, self._shared.family)

        def make() -> PreTrainedModel:
            model = model_around(self._plain, kind, tensors, labels, options)
            if adapt is not None:
                adapt(model)
            return model

        return put_adapter(make(), description, tensors, place), make

    def _put(
        self,
        name: str,
        model: PreTrainedModel,
        make: Callable[[], PreTrainedModel],
        description: dict[str, Any],
        dtypes: dict[str, torch.dtype],
        is_trainable: bool,
        run: Any = None,
    ) -> None:
        base_model = description.get("base_model")
        member = Member(self._shared, self._plain, model, make, base_model, dtypes, is_trainable)
        member.train(False)
        member.run_of = run
        with self._lock:
            self._check_new(name)
            self._members = {**self._members, name: member}

    def _run(self, rows: list[Row], inputs: dict[str, Tensor], places: list[Place]) -> list[Tensor]:
        """The results of rows that share a pass."""
        texts = [row.text for row in rows]
        first = rows[0].member
        if first is not None and all(row.member is first for row in rows):
            if first.runs_alone or first.values is not None:
                return first.run(select(inputs, texts), [places[text] for text in texts])
        states = self._states(rows, inputs)
        results: list[Any] = [None] * len(rows)
        for member in dict.fromkeys(row.member for row in rows):
            numbers = [number for number, row in enumerate(rows) if row.member is member]
            own, cut = [texts[number] for number in numbers], [places[texts[n]] for n in numbers]
            chosen = states if len(numbers) == len(rows) else states[numbers]
            if member is None:
                found = [state[place] for state, place in zip(chosen, cut, strict=True)]
            else:
                found = member.read(chosen, select(inputs, own), cut)
            for number, result in zip(numbers, found, strict=True):
                results[number] = result
        return results

    def _states(self, rows: list[Row], inputs: dict[str, Tensor]) -> Tensor:
        """The encoder's last states of each row, [rows, T, C], in one pass."""
        shared = self._shared
        members = list(dict.fromkeys(row.member for row in rows))
        number_of = {member: number for number, member in enumerate(members)}
        layers = stack_prefixes(
            [{} if member is None else member.layers() for member in members],
            [number_of[row.member] for row in rows],
            self.device,
            self._plain.dtype,
        )
        # Texts that start at the same position are the same below the lowest prefix.
        starts = [(row.text, 0 if row.member is None else row.member.offset) for row in rows]
        once = list(dict.fromkeys(starts))
        adapters = adapters_of(rows)
        inside = [member.lowest for member in members if member is not None]
        lowest = min([*layers, *inside], default=len(shared.layers) - 1)
        # A convolution behind the first layer reads the batch of the embeddings.
        has_convolution = shared.relative is not None and shared.relative.has_convolution
        repeat = None
        if len(once) < len(starts) and not (has_convolution and lowest == 0):
            places = {start: place for place, start in enumerate(once)}
            texts = torch.tensor([places[start] for start in starts], device=self.device)
            repeat, starts = Repeat(lowest, texts), once
        offsets = [offset for _, offset in starts]
        call = BankCall(
            layers,
            torch.tensor(offsets, device=self.device)[:, None] if any(offsets) else None,
            0.0 if rows[0].member is None else rows[0].member.prefix_dropout,
            repeat,
            all(row.member is not None and row.member.first_token_only for row in rows),
            adapters,
        )
        return shared.run(call, **select(inputs, [text for text, _ in starts]))


def _dtypes_of(tensors: dict[str, Tensor]) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in tensors.items()}
