"""Seconds spent in training steps, and a run that is limited by them."""

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy


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
    def over(self) -> bool:
        """Whether the limit is reached."""
        return self.max_seconds is not None and self.seconds >= self.max_seconds

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        callbacks: Any = state.stateful_callbacks
        saved = callbacks.get(type(self).__name__)
        if saved is not None:
            self.seconds = saved["attributes"]["seconds"]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        assert self._started is not None
        before = self.seconds
        self.step_seconds.append(time.perf_counter() - self._started)
        self.seconds += self.step_seconds[-1]
        self._started = None
        control.should_training_stop |= self.over
        interval = self.eval_seconds
        if self.over or (interval and self.seconds // interval > before // interval):
            control.should_evaluate |= args.eval_strategy != IntervalStrategy.NO
            control.should_save |= args.save_strategy != SaveStrategy.NO
