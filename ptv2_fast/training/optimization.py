"""Learning rates: which parameters have one of their own, over epochs and over a time limit."""

from collections.abc import Callable, Iterator
from typing import Any, cast

from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainingArguments, get_scheduler

from ptv2_fast.encoders.adapter_tensors import ENCODER_NAME
from ptv2_fast.encoders.vectors import VECTORS_NAME
from ptv2_fast.training.baselines import LORA, PROMPT
from ptv2_fast.training.callbacks import StepClock
from ptv2_fast.training.options import MOST_FOR_BIASES, TrainingOptions


def own_rates(
    model: PreTrainedModel, options: TrainingOptions, of_prefix: float
) -> dict[str, tuple[list[Parameter], float | None]]:
    """Which parameters have a learning rate of their own, and it, by the name of the option.

    Args:
        model: prepared by a method.
        of_prefix: the learning rate of prefix, prompt, LoRA or backbone.

    Returns:
        None for a rate that is not given, which is that of the prefix.
    """
    head = options.head_learning_rate
    of_biases = options.bias_learning_rate or min(head or of_prefix, MOST_FOR_BIASES)
    return {
        "head_learning_rate": (head_parameters(model), head),
        "bias_learning_rate": (vector_parameters(model), of_biases),
        "low_rank_learning_rate": (update_parameters(model), options.low_rank_learning_rate),
    }


def split_groups(optimizer: Optimizer, parameters: list[Parameter], rate: float) -> None:
    """Give parameters a learning rate of their own: each group of the optimizer becomes two."""
    own = {id(parameter) for parameter in parameters}
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        inside = [p for p in group["params"] if id(p) in own]
        outside = [p for p in group["params"] if id(p) not in own]
        optimizer.param_groups += [
            {**group, "params": outside}, {**group, "params": inside, "lr": rate}
        ]  # fmt: skip


def head_parameters(model: PreTrainedModel) -> list[Parameter]:
    """What trains beside prefix, prompt, LoRA and pretrained weights.

    That is what lies outside the backbone, and a pooler whose backbone is frozen.
    """
    pretrained: set[int] = set()
    if model.get_input_embeddings().weight.requires_grad:
        pretrained = {id(p) for p in model.base_model.parameters()}
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and id(parameter) not in pretrained
        and not name.startswith((f"{ENCODER_NAME}.", f"{PROMPT}."))
        and LORA not in name
    ]


def vector_parameters(model: PreTrainedModel) -> list[Parameter]:
    """Biases and norms that train beside a prefix."""
    return [p for name, p in _beside_prefix(model) if LORA not in name]


def update_parameters(model: PreTrainedModel) -> list[Parameter]:
    """Low-rank updates that train beside a prefix."""
    return [p for name, p in _beside_prefix(model) if LORA in name]


def _beside_prefix(model: PreTrainedModel) -> Iterator[tuple[str, Parameter]]:
    """What trains of the layers, by name."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.startswith(f"{ENCODER_NAME}.{VECTORS_NAME}."):
            yield name, parameter


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
