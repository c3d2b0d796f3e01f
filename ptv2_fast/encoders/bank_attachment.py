"""A backbone that reads another prefix in each row of a batch: what `AdapterBank` runs."""

import contextlib
import copy
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ptv2_fast.encoders.attaching import check_model, make_encoder
from ptv2_fast.encoders.attachment import Attachment, Given
from ptv2_fast.encoders.backbone_forward import FIRST_TOKEN_ARGUMENT
from ptv2_fast.encoders.family import Family
from ptv2_fast.encoders.vectors import TrainedVectors
from ptv2_fast.frozen.adapter_rows import AdapterRows, AdapterValues
from ptv2_fast.frozen.layout import Repeat
from ptv2_fast.prefix import BankPrefix, LayerPrefix, PTuningV2Config


@dataclass
class BankCall:
    """One forward of the backbone.

    Attributes:
        layers: layer index -> the prefixes, and which one each row reads.
        offset: int64 [B, 1], positions in front of the first token of each row; None = none.
        prefix_dropout: in training.
        repeat: the rows that each text becomes (see `PrefixState`).
        first_token_only: nothing but the first token's state is read.
        adapters: what the rows' adapters have inside of the layers, or None.
    """

    layers: Mapping[int, LayerPrefix] | Mapping[int, BankPrefix]
    offset: Tensor | None = None
    prefix_dropout: float = 0.0
    repeat: Repeat | None = None
    first_token_only: bool = False
    adapters: AdapterRows | None = None


class _Running(threading.local):
    call: BankCall | None = None


_RUNNING = _Running()


@contextlib.contextmanager
def _running(call: BankCall) -> Iterator[None]:
    before, _RUNNING.call = _RUNNING.call, call
    try:
        yield
    finally:
        _RUNNING.call = before


def _call() -> BankCall:
    if _RUNNING.call is None:
        raise RuntimeError("the backbone of an AdapterBank was called by itself; call the bank")
    return _RUNNING.call


class BankAttachment(Attachment):
    """The state of a backbone whose prefixes come with each call; its own is not read."""

    @property
    def offset(self) -> int | Tensor:
        """As that of `Attachment`; none where `attach` proves that the layers are served."""
        call = _RUNNING.call
        return 0 if call is None or call.offset is None else call.offset

    @property
    def positions_taken(self) -> int:
        """None of all texts: the bank checks the length of each."""
        return 0

    def given(self) -> Given:
        """As that of `Attachment`."""
        call = _call()
        return Given(call.layers, call.prefix_dropout, call.repeat, call.adapters)

    def repeat_inputs(self, rows: Tensor) -> None:
        """As that of `Attachment`."""
        call = _call()
        call.offset = None if call.offset is None else call.offset[rows]

    def values_of(self, vectors: TrainedVectors) -> AdapterValues | None:
        """What an adapter of another model of this class has inside of the layers, if anything."""
        stand_ins = vectors.on(self.layers)
        return AdapterValues(stand_ins) if stand_ins else None

    def cannot_read(self, vectors: TrainedVectors) -> bool:
        """Whether norms of heads are among them, which are those of all rows of a pass."""
        return self.frozen.has_head_norms_of(vectors.on(self.layers))

    def run(self, call: BankCall, **inputs: Tensor) -> Tensor:
        """The last states of each row, [B, T, C].

        Raises:
            NeedsFrozenBlocksError: before anything runs, with `adapters` where the layers cannot be
                frozen blocks.
        """
        marks = {FIRST_TOKEN_ARGUMENT: True} if call.first_token_only else {}
        with _running(call):
            return self.model(**inputs, **marks).last_hidden_state


def attach_bank(backbone: PreTrainedModel, how: str = "auto") -> BankAttachment:
    """Let a copy of a backbone, with the same parameters, read prefixes of a bank.

    Args:
        backbone: stays as it is.
        how: "auto", "frozen" or "hook", as in PTuningV2Config.

    Raises:
        ValueError: as `attach`.
    """
    config = PTuningV2Config(num_virtual_tokens=1, inference_mode=True, backbone=how)
    family = check_model(backbone, config)
    with contextlib.suppress(ValueError):  # of families whose positions are not shifted
        family.check_offset(backbone)
        config = PTuningV2Config(num_virtual_tokens=1, inference_mode=True, backbone=how,
                                 position_offset="prefix")  # fmt: skip
    shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    model = copy.deepcopy(backbone, cast(Any, shared))
    model.config.return_dict = True
    attachment = BankAttachment(model, family, make_encoder(model, family, config))
    attachment.frozen.join_weights()
    return attachment


class _Handed(threading.local):
    states: Tensor | None = None


class GivenOutput(BaseModelOutputWithPooling):
    """States; what else the backbones of some families give, such as a cache, is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class GivenStates:
    """Takes the place of the `forward` of a backbone: what it makes of states that are there.

    Args:
        backbone: of the model whose head reads them; its layers are taken out.
        family: of this backbone.
    """

    def __init__(self, backbone: PreTrainedModel, family: Family) -> None:
        self.backbone, self.family = backbone, family
        self._handed = _Handed()  # by the running thread
        path, _, name = family.layers.rpartition(".")
        setattr(backbone.get_submodule(path), name, nn.ModuleList())
        backbone.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As the backbone's own forward, whatever it is given."""
        states = cast(Tensor, self._handed.states)
        pooled = self.family.pooled(self.backbone, states)
        return GivenOutput(last_hidden_state=states, pooler_output=pooled)

    @contextlib.contextmanager
    def of(self, states: Tensor) -> Iterator[None]:
        """Within the context the states are these, [B, T, C]."""
        before, self._handed.states = self._handed.states, states
        try:
            yield
        finally:
            self._handed.states = before
