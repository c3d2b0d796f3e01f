"""One pass of the encoder for batches of several data sets, which their heads then read in turn."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.encoders.bank_attachment import GivenOutput
from ptv2_fast.encoders.families import find_family
from ptv2_fast.training.bank_batches import join_rows


def check_shared_pass(model: PreTrainedModel) -> None:
    """Check that the head of a model can read the states of a pass over several batches.

    Raises:
        ValueError: for a model of no known family, or whose head does not lie around a backbone.
    """
    try:
        find_family(model.config)
    except ValueError as error:
        raise ValueError(f"mixed_batches: expected a model of a known family: {error}") from error
    if model.base_model is model:
        raise ValueError(
            "mixed_batches: expected a model with a head around its backbone, got "
            f"{type(model).__name__}"
        )


class SharedPass:
    """Stands in front of a model's backbone while batches go through the model one by one.

    Within the context, a call of the model with the batch whose turn it is gives what it gives
    alone, beyond rounding, dropout and what a backbone makes of more pads. The backbone runs once,
    in the first of these calls and as that one calls it, with the rows of all batches.

    Args:
        model: see `check_shared_pass`.
        batches: inputs of the model, [rows, T] or [rows, choices, T].
        pad: the token id of pads.

    Attributes:
        turn: the number of the batch that the model is called with.
    """

    def __init__(
        self, model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], pad: int
    ) -> None:
        self.model, self.batches, self.pad = model, batches, pad
        self.turn = 0
        self._output: Any = None

    def __enter__(self) -> "SharedPass":
        # Not in the place of the module: the model's parameters stay what they are.
        vars(self.model)[self.model.base_model_prefix] = self
        return self

    def __exit__(self, *unused: object) -> None:
        vars(self.model).pop(self.model.base_model_prefix, None)

    def __call__(self, *args: Any, **kwargs: Any) -> GivenOutput:
        """As the backbone's own call, with the rows of one batch."""
        if self._output is None:
            self.__exit__()
            self._output = self._run(self.model.base_model, args, kwargs)
            self.__enter__()
        shapes = [batch["input_ids"].flatten(0, -2).shape for batch in self.batches]
        rows, length = shapes[self.turn]
        first = sum(count for count, _ in shapes[: self.turn])
        states, pooled = self._output.last_hidden_state, self._output.get("pooler_output")
        return GivenOutput(
            last_hidden_state=states[first : first + rows, :length],
            pooler_output=None if pooled is None else pooled[first : first + rows],
        )

    def _run(self, backbone: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The backbone's output for all rows, asked for as for those of one batch."""
        # zip is not strict: positional arguments are the first of the names.
        names = inspect.signature(backbone.forward).parameters
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                pad = self.pad if name == "input_ids" else 0
                parts = [batch[name].flatten(0, -2) for batch in self.batches]
                arguments[name] = join_rows(parts, [pad] * len(parts))
        return backbone(**arguments)


def call_as_forward(wrapper: nn.Module, model: nn.Module, function: Callable[[], Any]) -> Any:
    """What a function gives that runs as the one forward of a wrapped model.

    DistributedDataParallel expects one between two backward passes, however often the function
    calls the model itself.

    Args:
        wrapper: around the model.
        model: as it is, in the function too.
        function: uses the model.
    """
    before = {name: value for name, value in vars(model).items() if name == "forward"}

    def restore() -> None:
        vars(model).pop("forward", None)
        vars(model).update(before)

    def forward() -> Any:
        restore()
        return function()

    vars(model)["forward"] = forward
    try:
        return wrapper()
    finally:
        restore()
