"""An exponential moving average of what is trained."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ptv2_fast.encoders.adapter_files import AVERAGE_NAME


class MovingAverage:
    """The average of a model's trained parameters over the optimizer's steps.

    It begins as the parameters that it is made with. Step n, from 0, counts by the larger of
    1 - decay and 9 / (10 + n), so that the start is soon forgotten.

    Args:
        model: on its device.
        decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.tensors = {name: p.detach().clone() for name, p in self.parameters.items()}

    def update(self, step: int) -> None:
        """Take in the parameters as they are after step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [p.detach() for p in self.parameters.values()]
        get_ema_multi_avg_fn(decay)(list(self.tensors.values()), current, step)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the model has the average for its parameters."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def apply(self) -> None:
        """Give the model the average for good."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.tensors[name])

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            kept = parameter.clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)

    def save(self, folder: Path) -> None:
        """Write the average."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, folder / AVERAGE_NAME)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            OSError: when it is not there, damaged or of another model.
        """
        try:
            found = load_file(folder / AVERAGE_NAME)
            for name, tensor in self.tensors.items():
                tensor.copy_(found[name])
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise OSError(f"{folder / AVERAGE_NAME}: no average of this model: {error}") from error
