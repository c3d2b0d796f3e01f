"""Learning rates over the epochs and over a time limit."""

from collections.abc import Callable
from typing import Any, cast

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from ptv2_fast.training.clock import StepClock


def exponential_schedule(optimizer: Any, decay: float, epoch: int) -> LambdaLR:
    """The learning rates times `decay` after every `epoch` steps, as the authors' tagging runs do.

    The rates depend on the number of steps alone, so that a run may resume within an epoch.
    """
    return LambdaLR(optimizer, lambda step: decay ** (step // epoch))


def timed_schedule(
    args: TrainingArguments, optimizer: Any, num_training_steps: int, clock: StepClock
) -> LambdaLR:
    """The schedule of `args` over the clock's time limit, or the steps if they end sooner."""
    assert clock.max_seconds is not None
    limit = clock.max_seconds
    steps = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        args.get_warmup_steps(num_training_steps),
        num_training_steps,
        scheduler_specific_kwargs=cast(Any, args.lr_scheduler_kwargs),
    )
    assert isinstance(steps, LambdaLR)

    def by_time(factor: Callable[[int], float]) -> Callable[[int], float]:
        def factor_now(step: int) -> float:
            part = min(1.0, max(clock.elapsed() / limit, step / num_training_steps))
            return factor(int(part * num_training_steps))

        return factor_now

    return LambdaLR(optimizer, [by_time(factor) for factor in steps.lr_lambdas])
