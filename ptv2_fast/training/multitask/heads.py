"""Several heads on one model, of which one is active: multi-task training."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ptv2_fast.encoders.attachment import find_attachment


@dataclasses.dataclass(frozen=True)
class Head:
    """The head of a model and what its configuration says about it.

    Attributes:
        modules: those outside the backbone that hold parameters, by their name in the model.
        settings: of the configuration.
    """

    modules: dict[str, nn.Module]
    settings: dict[str, Any]


def take_head(model: PreTrainedModel) -> Head:
    """The head of a model of transformers.

    Raises:
        ValueError: for a model without one.
    """
    modules = {
        name: module
        for name, module in model.named_children()
        if module is not model.base_model and any(True for _ in module.parameters())
    }
    if not modules:
        raise ValueError(f"model: expected a model with a head, got {type(model).__name__}")
    names = ("id2label", "label2id", "problem_type")
    return Head(modules, {name: getattr(model.config, name) for name in names})


class SwitchedHead(nn.Module):
    """Modules of one place in the model, of which the active one is called."""

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.active = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the active module's forward."""
        return self.heads[self.active](*args, **kwargs)


class TaskHeads:
    """The heads of several tasks in the place of a model's own; the first is active.

    Args:
        model: changed in place, before a method prepares it.
        heads: of models of the same class, in the order of their numbers.

    Raises:
        ValueError: when the heads are not in the same places.
    """

    def __init__(self, model: PreTrainedModel, heads: Sequence[Head]) -> None:
        self.model, self.settings = model, [head.settings for head in heads]
        self.switches: dict[str, SwitchedHead] = {}
        for name in heads[0].modules:
            if any(set(head.modules) != set(heads[0].modules) for head in heads):
                raise ValueError(
                    "heads: expected modules of the same names, got "
                    f"{[sorted(head.modules) for head in heads]}"
                )
            self.switches[name] = SwitchedHead([head.modules[name] for head in heads])
            setattr(model, name, self.switches[name])
        self.activate(0)

    def activate(self, number: int) -> None:
        """From now on the model is that of one task: head, labels and loss."""
        for switch in self.switches.values():
            switch.active = number
        # Losses read the model's number of labels; attaching copies the configuration.
        for name, value in self.settings[number].items():
            setattr(self.model.config, name, value)
        if hasattr(self.model, "num_labels"):
            setattr(self.model, "num_labels", self.model.config.num_labels)  # noqa: B010

    @contextlib.contextmanager
    def alone(self, number: int) -> Iterator[PreTrainedModel]:
        """Within the context the model has one head, in its ordinary place: for saving."""
        self.activate(number)
        attachment = find_attachment(self.model)
        saved_names = attachment.saved_names if attachment else []
        for name, switch in self.switches.items():
            setattr(self.model, name, switch.heads[number])
        if attachment:
            attachment.saved_names = self._names_alone(saved_names, number)
        try:
            yield self.model
        finally:
            for name, switch in self.switches.items():
                setattr(self.model, name, switch)
            if attachment:
                attachment.saved_names = saved_names

    def _names_alone(self, names: list[str], number: int) -> list[str]:
        """Names of the state dict as they are without the other heads."""
        result = []
        for name in names:
            place = next((p for p in self.switches if name.startswith(f"{p}.heads.")), None)
            if place is None:
                result.append(name)
            elif name.startswith(f"{place}.heads.{number}."):
                result.append(place + name.removeprefix(f"{place}.heads.{number}"))
        return result
