"""Hugging Face's Trainer for a run of one data set or of several: order, loss, rates, scoring."""

import contextlib
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import SchedulerType

from ptv2_fast.training.averaging import MovingAverage
from ptv2_fast.training.callbacks import StepClock
from ptv2_fast.training.checkpoints import check_best, load_old_norms
from ptv2_fast.training.multitask.order import CombinedRows, MultiTaskOrder
from ptv2_fast.training.multitask.shared_pass import SharedPass, call_as_forward
from ptv2_fast.training.optimization import (
    exponential_schedule,
    own_rates,
    split_groups,
    timed_schedule,
)
from ptv2_fast.training.order import Batching, BatchOrder, LengthGroupedOrder, OrderedBatches
from ptv2_fast.training.prepared_run import PreparedRun
from ptv2_fast.training.progress import Progress
from ptv2_fast.training.scoring import score

MEAN = "mean"  # of the metrics that select, where there are several data sets
_PARTS = "parts"  # of a batch: the rows of each data set in it, behind its number


class TaskTrainer(Trainer):
    """A Trainer that trains and scores the data sets of a run on their one model.

    Args:
        run: prepared.
        clock: counts the steps' seconds.
        callbacks: further callbacks.
    """

    def __init__(
        self, run: PreparedRun, clock: StepClock, callbacks: Sequence[TrainerCallback] = ()
    ) -> None:
        self.run, self.clock, self.options = run, clock, run.config.training
        self.average: MovingAverage | None = None
        # By step and data set: scores, and what was wrong.
        self._scores: dict[int, dict[str, dict[str, float]]] = {}
        self._mistakes: dict[int, dict[str, dict[str, Any]]] = {}
        self._bars = Progress(clock, self.options.progress)
        parts = list(run.parts.values())
        self._collators = [part.task.collator(run.tokenizer) for part in parts]
        rows = CombinedRows([
            part.features["train"].model_inputs(run.tokenizer, part.task.label_columns)
            for part in parts
        ])  # fmt: skip
        super().__init__(
            run.model,
            run.arguments,
            data_collator=self.collate,
            train_dataset=rows,
            # Trainer asks that there is one; `evaluate` does not look at it.
            eval_dataset=None if run.arguments.eval_strategy == "no" else rows,
            callbacks=[clock, self._bars, *callbacks],
        )
        # Encoders take such arguments and ignore them, so that Trainer would add up the losses of
        # the batches in a step where they have to be averaged.
        self.model_accepts_loss_kwargs = False
        # Trainer divides the loss by the batches in a step; some versions let accelerate, too.
        self.accelerator.gradient_accumulation_steps = 1
        self.remove_callback(PrinterCallback)  # Progress writes its lines

    @property
    def _own_model(self) -> PreTrainedModel:
        """The model without what accelerate puts around it."""
        return cast(PreTrainedModel, self.model)

    def collate(self, rows: list[tuple[int, dict[str, Any]]]) -> Any:
        """The batch of each data set, behind its number."""
        rows_of: dict[int, list[dict[str, Any]]] = {}
        for number, row in rows:
            rows_of.setdefault(number, []).append(row)
        if len(rows_of) > 1 and not self.run.mixed_batches:
            raise RuntimeError(f"a batch holds rows of the data sets {sorted(rows_of)}")
        return {_PARTS: [(n, self._collators[n](own)) for n, own in sorted(rows_of.items())]}

    @property
    def step_size(self) -> int:
        """Examples in an optimizer step of this process."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps

    def _get_train_sampler(self, train_dataset: Any = None) -> BatchOrder:
        tokens, seed = self.options.batch_tokens, self.args.seed
        lengths = self.run.train_lengths
        if len(lengths) == 1:  # lengths are alike in all batches of a step
            batching = Batching(None if tokens else self.step_size, tokens)
            return LengthGroupedOrder(lengths[0], batching, seed)
        batching = Batching(None if tokens else self.args.train_batch_size, tokens)
        return MultiTaskOrder(lengths, self.run.batches, batching, seed, self.run.mixed_batches)

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's, and of batches of tokens."""
        if self.options.batch_tokens is None:
            return super().get_train_dataloader()
        loader = DataLoader(
            cast(Any, self.train_dataset),
            batch_sampler=OrderedBatches(self._get_train_sampler()),
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        """No batch when training is over already: Trainer takes a step before it asks."""
        if self.state.global_step >= self.state.max_steps or self.clock.is_over:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args)

    @property
    def _epoch_steps(self) -> int:
        order = self._get_train_sampler()
        if self.options.batch_tokens is not None:
            return math.ceil(order.count / self.args.gradient_accumulation_steps)
        return math.ceil(len(order) / (self.step_size * self.args.world_size))

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The losses of the heads of the batch's data sets, each by its part of the rows."""
        parts = inputs[_PARTS]
        if len(parts) == 1:
            ((number, batch),) = parts
            self.run.activate(number)
            return super().compute_loss(model, batch, *args, **kwargs)
        if model is self.model:
            return self._mixed_loss(parts)
        return call_as_forward(model, self._own_model, lambda: self._mixed_loss(parts))

    def _mixed_loss(self, parts: Sequence[tuple[int, Any]]) -> Tensor:
        rows = [len(batch["input_ids"]) for _, batch in parts]
        losses: list[Tensor] = []
        pad = cast(int, self.run.tokenizer.pad_token_id)
        with SharedPass(self._own_model, [batch for _, batch in parts], pad) as shared:
            for shared.turn, (number, batch) in enumerate(parts):
                self.run.activate(number)
                losses.append(cast(Tensor, super().compute_loss(self._own_model, batch)))
        weighted = [count * loss for count, loss in zip(rows, losses, strict=True)]
        return torch.stack(weighted).sum() / sum(rows)

    def floating_point_ops(self, inputs: Any) -> int:
        """As Trainer's, of all parts of a batch."""
        of_part = super().floating_point_ops
        return sum(of_part(batch) for _, batch in inputs[_PARTS])

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Trainer's, whose arguments depend on the version of transformers."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = own_rates(self._own_model, self.options, self.args.learning_rate)
        for parameters, rate in rates.values():
            if parameters and rate is not None:
                split_groups(optimizer, parameters, rate)
        if self.options.ema_decay is not None:
            average = self.average = MovingAverage(self._own_model, self.options.ema_decay)
            optimizer.register_step_post_hook(lambda *_: average.update(self.state.global_step))
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        optimizer, options = optimizer or self.optimizer, self.options
        if self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
            steps = round(options.decay_ratio * num_training_steps)
            decay = {"num_decay_steps": steps, "decay_type": options.decay_type}
            self.args.lr_scheduler_kwargs = decay
        if options.schedule == "exponential":
            factor = options.schedule_decay
            self.lr_scheduler = exponential_schedule(optimizer, factor, self._epoch_steps)
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
        """Score the validation examples, drawing nothing from torch's generator."""
        started = time.perf_counter()
        step, best = self.state.global_step, self.state.best_global_step
        # Those of the best so far may be what the run ends with.
        self._mistakes = {known: own for known, own in self._mistakes.items() if known == best}
        self._mistakes[step], self._scores[step] = {}, {}
        with self.average.applied() if self.average else contextlib.nullcontext():
            for name, part in self.run.active_parts():
                if "validation" in part.features:
                    wrong = self._mistakes[step][name] = {}
                    self._scores[step][name] = score(
                        part, part.features["validation"], self.args.eval_batch_size,
                        self.args.bf16, self.options.progress, wrong,
                    )  # fmt: skip
        figures = {
            f"{name}_{metric}" if name else metric: value
            for name, own in self._scores[step].items()
            for metric, value in own.items()
        }
        if self.run.heads is not None:
            metrics = {name: part.task.metric for name, part in self.run.parts.items()}
            scores = self._scores[step].items()
            figures[MEAN] = statistics.fmean(own[metrics[name]] for name, own in scores)
        figures["runtime"] = time.perf_counter() - started
        logged = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(logged)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, logged
        )
        return logged

    def final_scores(self, name: str) -> tuple[dict[str, float], dict[str, Any]] | None:
        """The validation scores of a data set for the weights as they are after training, and what
        was wrong; None when these were not scored, or before the run was resumed."""
        best = self.state.best_global_step
        step = cast(int, best if self._ends_with_best else self.state.global_step)
        if name not in self._scores.get(step, {}):
            return None
        return self._scores[step][name], self._mistakes.get(step, {}).get(name, {})

    @property
    def _ends_with_best(self) -> bool:
        best = self.state.best_model_checkpoint
        return self.args.load_best_model_at_end and best is not None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the seconds of training steps to every line."""
        super().log({**logs, "train_seconds": round(self.clock.elapsed(), 3)}, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, but the model ends with the average where there is one."""
        with contextlib.closing(self._bars):
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
        load_old_norms(self._own_model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """As Trainer's, which keeps the last weights when the best ones are not there."""
        best = Path(cast(str, self.state.best_model_checkpoint))
        check_best(best)
        super()._load_best_model()
        load_old_norms(self._own_model, best)
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
