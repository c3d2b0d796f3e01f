"""What Trainer calls while a run lasts: time limit, diverged losses, log file, best checkpoint."""

import json
import math
import time
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ptv2_fast.training.baselines import trained_tensors
from ptv2_fast.training.run_folder import write_text


class StepClock(TrainerCallback, ExportableState):
    """Counts the seconds of training steps: forward, backward and optimizer.

    Scoring, logging and saving are not counted. When the count reaches `max_seconds`, training
    stops after the step. Checkpoints keep the count.

    Args:
        max_seconds: None = no limit.
        eval_seconds: seconds between two scorings; None = Trainer's rule alone.
    """

    def __init__(self, max_seconds: float | None = None, eval_seconds: float | None = None) -> None:
        self.max_seconds = max_seconds
        self.eval_seconds = eval_seconds
        self.seconds = 0.0
        self.step_seconds: list[float] = []
        self._started: float | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        limits = {"max_seconds": self.max_seconds, "eval_seconds": self.eval_seconds}
        return {"args": limits, "attributes": {"seconds": self.seconds}}

    def elapsed(self) -> float:
        """Seconds so far, the running step included."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self.seconds + running

    @property
    def is_over(self) -> bool:
        """Whether the limit is reached."""
        return self.max_seconds is not None and self.seconds >= self.max_seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is not None:
            self.seconds = saved["attributes"]["seconds"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **unused: Any) -> None:
        assert self._started is not None
        before = self.seconds
        self.step_seconds.append(time.perf_counter() - self._started)
        self.seconds += self.step_seconds[-1]
        self._started = None
        control.should_training_stop |= self.is_over
        interval = self.eval_seconds
        if self.is_over or (interval and self.seconds // interval > before // interval):
            control.should_evaluate |= args.eval_strategy != IntervalStrategy.NO
            control.should_save |= args.save_strategy != SaveStrategy.NO


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

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **unused: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise DivergedError(
                f"the training loss is {loss} at step {state.global_step}; a lower learning rate "
                "or max_grad_norm may help"
            )


class FindBestCheckpoint(TrainerCallback):
    """Finds the best checkpoint of a resumed run again, whatever its folder is called now."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        # What the state says is a path on the machine where it was written.
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        is_there = type(state.best_global_step) is int and best.is_dir()
        state.best_model_checkpoint = str(best) if is_there else None


class MetricsFile(TrainerCallback):
    """Keeps metrics.jsonl equal to Trainer's log, also after a resume."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if state.is_world_process_zero:
            lines = [json.dumps(entry) + "\n" for entry in state.log_history]
            write_text(self.path, "".join(lines))
