"""A run whose loss is no number any more stops and says so."""

import math
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ptv2_fast.training.baselines import trained_tensors


class DivergedError(ArithmeticError):
    """The training loss became infinite or NaN; what was trained is worth nothing."""


def require_finite(model: nn.Module) -> None:
    """Check what was trained: the loss of the last steps may not have been logged.

    Raises:
        DivergedError: naming the tensors that hold a number that is infinite or NaN.
    """
    bad = [name for name, t in trained_tensors(model).items() if not t.isfinite().all()]
    if bad:
        raise DivergedError(
            f"the trained {', '.join(bad[:3])} {'…' if bad[3:] else ''}hold numbers that are "
            "infinite or NaN; a lower learning rate or max_grad_norm may help"
        )


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
