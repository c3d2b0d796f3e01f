"""What a run shows on stderr while it lasts: bars, and a line for each entry of its log."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from ptv2_fast.tasks.task import Examples
from ptv2_fast.training.callbacks import StepClock
from ptv2_fast.training.output import is_first

_SECONDS = (
    "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of training [{elapsed}{postfix}]"
)


def scoring_bar(batches: Iterable[int], source: str, shown: bool | None) -> Iterable[int]:
    """The batches of a scoring, with a bar that goes away at the end.

    Args:
        source: what is scored; of a path, its last part is shown.
        shown: None = on a terminal alone.
    """
    hidden = None if shown is None else not shown
    return tqdm(
        batches,
        desc=f"scoring {PurePath(source).name}",
        unit="batch",
        leave=False,
        dynamic_ncols=True,
        disable=hidden if is_first() else True,
    )


def reading_bar(
    parts: Iterable[Examples], path: Path | None, shown: bool | None
) -> Iterator[Examples]:
    """The parts of a file, with a bar over its bytes that goes away at the end; none where the
    file comes whole.

    Args:
        path: of the file; of a stream nobody knows the size, and the examples are counted.
        shown: None = on a terminal alone.
    """
    size = None if path is None else path.stat().st_size
    bar: Any = None
    try:
        for examples in parts:
            part = examples.source.part
            if bar is None and part is not None:
                bar = tqdm(
                    desc=f"predicting {'stdin' if path is None else path.name}", total=size,
                    unit=" examples" if size is None else "B", unit_scale=size is not None,
                    leave=False, dynamic_ncols=True, disable=None if shown is None else not shown,
                )  # fmt: skip
            yield examples
            if part is not None:
                bar.update(len(examples) if size is None else part.read - bar.n)
    finally:
        if bar is not None:
            bar.close()


class Progress(TrainerCallback):
    """A bar over the steps, or over the seconds where they end the run, and the log's lines.

    Args:
        clock: of the run; a callback before this one.
        shown: whether there is a bar; the lines are written in any case.
    """

    def __init__(self, clock: StepClock, shown: bool) -> None:
        self.clock, self.shown = clock, shown
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        by_time = self.clock.max_seconds is not None
        self.bar = tqdm(
            desc="training",
            total=self.clock.max_seconds if by_time else state.max_steps,
            initial=self._done(state),
            unit="step",
            bar_format=_SECONDS if by_time else None,
            dynamic_ncols=True,
            disable=not (self.shown and state.is_world_process_zero),
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if self.clock.max_seconds is not None:
            self.bar.set_postfix_str(f"step {state.global_step}", refresh=False)
        self.bar.update(self._done(state) - self.bar.n)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **unused: Any,
    ) -> None:
        logs = logs or {}
        scores = [name for name in logs if name.startswith("eval_") and name != "eval_runtime"]
        if state.is_world_process_zero and (scores or "loss" in logs):
            names = [*scores, *(n for n in ("loss", "learning_rate", "epoch") if n in logs)]
            values = ", ".join(f"{name} {logs[name]:.4g}" for name in names)
            tqdm.write(f"step {state.global_step}: {values}", file=sys.stderr)

    def close(self) -> None:
        """After training, however it ended: what is written next gets a line of its own."""
        if self.bar is not None:
            self.bar.close()

    def _done(self, state: Any) -> float:
        """Of the bar's total."""
        limit = self.clock.max_seconds
        return state.global_step if limit is None else min(self.clock.seconds, limit)
