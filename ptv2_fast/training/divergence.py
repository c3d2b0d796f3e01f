"""A run whose loss is no number any more stops and says so."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class DivergedError(ArithmeticError):
    """The training loss became infinite or NaN; what was trained is worth nothing."""


class StopWhenDiverged(TrainerCallback):
    """Raises DivergedError at the first logged loss that is not finite."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **unused: Any,
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise DivergedError(
                f"the training loss is {loss} at step {state.global_step}; a lower learning rate "
                "or max_grad_norm may help"
            )
