"""Hugging Face's Trainer with our order of batches, learning rates, time limit and scoring."""

import contextlib
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import SchedulerType

from ptv2_fast.encoders.adapter_tensors import ENCODER_NAME
from ptv2_fast.encoders.vectors import VECTORS_NAME
from ptv2_fast.tasks.task import Features, Task
from ptv2_fast.training.averaging import MovingAverage
from ptv2_fast.training.baselines import LORA, PROMPT
from ptv2_fast.training.checkpoints import check_best, load_old_norms
from ptv2_fast.training.clock import StepClock
from ptv2_fast.training.options import MOST_FOR_BIASES
from ptv2_fast.training.order import LengthGroupedOrder, OrderedBatches, TokenOrder
from ptv2_fast.training.progress import Progress
from ptv2_fast.training.schedules import exponential_schedule, timed_schedule
from ptv2_fast.training.scoring import score


class PacedTrainer(Trainer):
    """A Trainer with our learning rates, time limit and log; subclasses order and score.

    Args:
        model: prepared by a method.
        args: Trainer's own arguments.
        rows: what the collator takes a list of.
        collate: makes a batch.
        clock: counts the steps' seconds.
        progress: show bars.
        head_learning_rate: of what lies outside backbone, prefix, prompt and LoRA; None = the same.
        bias_learning_rate: of biases and norms that train beside a prefix; None = `vector_rate`.
        low_rank_learning_rate: of low-rank updates beside it; None = the same.
        epoch_decay: multiplies the learning rates after each epoch; None = the schedule of `args`.
        decay: of the schedule warmup_stable_decay: the part of the steps and the form, as
            transformers calls it.
        ema_decay: score and end with a moving average; None = with the weights.
        batch_tokens: in a batch; None = batches of as many examples each.
        callbacks: further callbacks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        rows: Any,
        collate: Callable[[list[Any]], Any],
        clock: StepClock,
        progress: bool = False,
        head_learning_rate: float | None = None,
        bias_learning_rate: float | None = None,
        low_rank_learning_rate: float | None = None,
        epoch_decay: float | None = None,
        decay: tuple[float, str] = (0.2, "cosine"),
        ema_decay: float | None = None,
        batch_tokens: int | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.clock, self.progress = clock, progress
        self.decay, self.ema_decay = decay, ema_decay
        self.batch_tokens = batch_tokens
        self.average: MovingAverage | None = None
        self.scored: dict[int, dict[str, dict[str, float]]] = {}
        self._mistakes: dict[int, dict[str, dict[str, Any]]] = {}
        self._shown = Progress(clock, progress)
        self.head_learning_rate, self.epoch_decay = head_learning_rate, epoch_decay
        of_head = head_learning_rate or args.learning_rate
        self.bias_learning_rate = vector_rate(bias_learning_rate, of_head)
        self.low_rank_learning_rate = low_rank_learning_rate
        super().__init__(
            model,
            args,
            data_collator=collate,
            train_dataset=rows,
            # Trainer asks that there is one; `evaluate` does not look at it.
            eval_dataset=None if args.eval_strategy == "no" else rows,
            callbacks=[clock, self._shown, *(callbacks or [])],
        )
        # Encoders take such arguments and ignore them, so that Trainer would add up the losses of
        # the batches in a step where they have to be averaged.
        self.model_accepts_loss_kwargs = False
        # Trainer divides the loss by the batches in a step; some versions let accelerate, too.
        self.accelerator.gradient_accumulation_steps = 1
        self.remove_callback(PrinterCallback)  # Progress writes its lines

    @property
    def step_size(self) -> int:
        """Examples in an optimizer step of this process."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps

    @abstractmethod
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The order of the rows, of known length; a `BatchOrder` for batches of tokens."""

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's, and of batches of tokens."""
        if self.batch_tokens is None:
            return super().get_train_dataloader()
        loader = DataLoader(
            cast(Any, self.train_dataset),
            batch_sampler=OrderedBatches(self._get_train_sampler()),
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    @property
    def _epoch_steps(self) -> int:
        order = self._get_train_sampler()
        if self.batch_tokens is not None:
            return math.ceil(order.count / self.args.gradient_accumulation_steps)
        return math.ceil(len(order) / (self.step_size * self.args.world_size))

    @abstractmethod
    def scores(self) -> dict[str, dict[str, float]]:
        """The metrics of the validation examples, which draw nothing from torch's generator.

        By name of the data set; "" where there is one alone.
        """

    def summary(self, scores: dict[str, dict[str, float]]) -> dict[str, float]:
        """Figures of all data sets together."""
        return {}

    @property
    def final_scores(self) -> dict[str, dict[str, float]]:
        """What `scores` gave for the weights as they are after training.

        Empty when these were not scored, or before the run was resumed.
        """
        return self.scored.get(self._final_step, {})

    @property
    def final_mistakes(self) -> dict[str, dict[str, Any]]:
        """What was wrong where these are the scores."""
        return self._mistakes.get(self._final_step, {})

    @property
    def _final_step(self) -> int:
        state = self.state
        return cast(int, state.best_global_step if self._ends_with_best else state.global_step)

    def mistakes_of(self, name: str) -> dict[str, Any]:
        """Where `scores` leaves what is wrong at present on a data set."""
        return self._mistakes[self.state.global_step].setdefault(name, {})

    @property
    def _ends_with_best(self) -> bool:
        best = self.state.best_model_checkpoint
        return self.args.load_best_model_at_end and best is not None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, but the model ends with the average where there is one."""
        with contextlib.closing(self._shown):
            result = super().train(*args, **kwargs)
        if self.average is not None and not self._ends_with_best:
            self.average.apply()
        return result

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, which says in many lines that the weights are not of this model."""
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        except RuntimeError as error:
            words = " ".join(str(error).split())
            raise OSError(f"{resume_from_checkpoint}: not of this model: {words:.300}") from error
        load_old_norms(cast(PreTrainedModel, self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """As Trainer's, which keeps the last weights when the best ones are not there."""
        best = Path(cast(str, self.state.best_model_checkpoint))
        check_best(best)
        super()._load_best_model()
        load_old_norms(cast(PreTrainedModel, self.model), best)
        if self.average is not None:
            self.average.load(best)
            self.average.apply()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As Trainer's, and the average; a checkpoint's weights are those that train."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None and self.args.should_save:
            self.average.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.average is not None and checkpoint is not None:
            self.average.load(Path(checkpoint))

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        """No batch when training is over already: Trainer takes a step before it asks."""
        if self.state.global_step >= self.state.max_steps or self.clock.over:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Trainer's, whose arguments depend on the version of transformers."""
        optimizer = super().create_optimizer(*args, **kwargs)
        model = cast(PreTrainedModel, self.model)
        for parameters, rate in (
            (head_parameters(model), self.head_learning_rate),
            (vector_parameters(model), self.bias_learning_rate),
            (update_parameters(model), self.low_rank_learning_rate),
        ):
            if parameters and rate is not None:
                own = {id(parameter) for parameter in parameters}
                optimizer.param_groups[:] = [
                    part for group in optimizer.param_groups for part in _split(group, own, rate)
                ]
        if self.ema_decay is not None:
            average = self.average = MovingAverage(cast(Any, self.model), self.ema_decay)
            optimizer.register_step_post_hook(lambda *_: average.update(self.state.global_step))
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        optimizer = optimizer or self.optimizer
        if self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
            part, form = self.decay
            steps = round(part * num_training_steps)
            self.args.lr_scheduler_kwargs = {"num_decay_steps": steps, "decay_type": form}
        if self.epoch_decay is not None:
            self.lr_scheduler = exponential_schedule(optimizer, self.epoch_decay, self._epoch_steps)
        elif self.clock.max_seconds is not None:
            self.lr_scheduler = timed_schedule(self.args, optimizer, num_training_steps, self.clock)
        else:
            return super().create_scheduler(num_training_steps, optimizer)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Score the validation examples."""
        started = time.perf_counter()
        best = self.state.best_global_step  # the one that this may fall behind
        self._mistakes = {step: own for step, own in self._mistakes.items() if step == best}
        self._mistakes[self.state.global_step] = {}
        with self.average.applied() if self.average else contextlib.nullcontext():
            scores = self.scored[self.state.global_step] = self.scores()
        figures = {
            f"{name}_{metric}" if name else metric: value
            for name, own in scores.items()
            for metric, value in own.items()
        }
        figures |= self.summary(scores)
        figures["runtime"] = time.perf_counter() - started
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the seconds of training steps to every line."""
        super().log({**logs, "train_seconds": round(self.clock.elapsed(), 3)}, start_time)


class TaskTrainer(PacedTrainer):
    """A Trainer for one task.

    Args:
        model, args: see `PacedTrainer`.
        task, tokenizer, labels: what the features were made with.
        train, validation: features.
        pace: the other arguments of `PacedTrainer`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        labels: list[str],
        train: Features,
        validation: Features | None,
        **pace: Any,
    ) -> None:
        self.task, self.labels, self.validation = task, labels, validation
        self.tokenizer = tokenizer
        by_tokens = pace.get("batch_tokens") is not None
        self.train_lengths = train.token_counts if by_tokens else train.lengths
        rows = train.model_inputs(tokenizer, task.label_columns)
        super().__init__(model, args, rows=rows, collate=task.collator(tokenizer), **pace)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        if self.batch_tokens is not None:
            return TokenOrder(self.train_lengths, self.batch_tokens, self.args.seed)
        return LengthGroupedOrder(self.train_lengths, self.step_size, self.args.seed)

    def scores(self) -> dict[str, dict[str, float]]:
        """See `PacedTrainer`."""
        assert self.validation is not None
        scores = score(
            cast(PreTrainedModel, self.model), self.task, self.validation, self.tokenizer,
            self.labels, self.args.eval_batch_size, self.args.bf16, self.progress,
            self.mistakes_of(""),
        )  # fmt: skip
        return {"": scores}


def _split(group: dict[str, Any], own: set[int], rate: float) -> list[dict[str, Any]]:
    """A group of an optimizer in two, of which the second has a learning rate of its own."""
    inside = [p for p in group["params"] if id(p) in own]
    outside = [p for p in group["params"] if id(p) not in own]
    return [{**group, "params": outside}, {**group, "params": inside, "lr": rate}]


def vector_rate(given: float | None, of_head: float) -> float:
    """The learning rate of `vector_parameters`: what was given, or the head's within bounds."""
    return given or min(of_head, MOST_FOR_BIASES)


def vector_parameters(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Biases and norms that train beside a prefix."""
    return [p for name, p in _beside_prefix(model) if LORA not in name]


def update_parameters(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Low-rank updates that train beside a prefix."""
    return [p for name, p in _beside_prefix(model) if LORA in name]


def _beside_prefix(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """What trains of the layers, by name."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.startswith(f"{ENCODER_NAME}.{VECTORS_NAME}."):
            yield name, parameter


def head_parameters(model: PreTrainedModel) -> list[torch.nn.Parameter]:
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
        and not name.startswith(("prefix_encoder.", PROMPT + "."))
        and LORA not in name
    ]
