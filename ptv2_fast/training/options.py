"""What a run is: options of data, model and training, and flat tables of them."""

import dataclasses
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from ptv2_fast.tasks.hints import close_to
from ptv2_fast.tasks.option_table import (
    GIVEN,
    BelowOne,
    Count,
    CountOrZero,
    Integer,
    NotNegative,
    OptionTable,
    Positive,
    option,
)
from ptv2_fast.tasks.options import DataOptions
from ptv2_fast.training.depth import parse_depth

Method = Literal[
    "p-tuning-v2", "fine-tuning", "linear-probe", "prompt-tuning", "p-tuning-v1", "lora"
]
METHODS: tuple[str, ...] = get_args(Method)
# Options that change no result: runs may go on with others.
NEUTRAL_OPTIONS = frozenset({"progress", "feature_cache", "preprocessing_num_workers"})
Schedule = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "warmup_stable_decay", "exponential"
]

DEFAULT_BATCH_SIZE = 16
# Where a search has not said better. The authors' scripts use 5e-3 to 6e-2 for P-Tuning v2.
DEFAULT_LEARNING_RATES = {
    "p-tuning-v2": 1e-2,
    "fine-tuning": 5e-5,
    "linear-probe": 1e-3,
    "prompt-tuning": 1e-1,
    "p-tuning-v1": 1e-3,
    "lora": 2e-4,
}
MOST_FOR_BIASES = 1e-2  # where no --bias-learning-rate is given

# What trains beside a prefix, each at its least.
INSIDE: dict[str, Any] = {"train_biases": True, "train_norms": True, "low_rank": 1}


class ModelOptions(OptionTable):
    """The encoder and the method; the fields of the prefix keep PEFT's names."""

    model: str | None = option(
        None, "pretrained encoder: a folder or a name on the hub", aliases=("model_name_or_path",)
    )
    method: Method = option("p-tuning-v2", "what is trained")
    num_virtual_tokens: CountOrZero = option(
        20, "length of the prefix or prompt", aliases=("pre_seq_len",)
    )
    prefix_projection: bool = option(False, "compute the prefix by an MLP")
    encoder_hidden_size: Count | None = option(
        None,
        "width of that MLP, or of the prompt encoder (default: the model's)",
        aliases=("prefix_hidden_size",),
    )
    prefix_dropout: BelowOne = option(0.0, "dropout on the prefix")
    depth: str | None = option(
        None, "p-tuning-v2: layers that get a prefix, counted from 1, as 1-4,9 (default: all)"
    )
    prompt_encoder: Literal["lstm", "mlp"] = option(
        "lstm", "p-tuning-v1: the network that computes the prompt"
    )
    lora_rank: Count = option(8, "lora: rank of the updates of queries and values")
    lora_alpha: Positive = option(16.0, "lora: the updates are scaled by this over the rank")
    lora_dropout: BelowOne = option(0.1, "lora: dropout on what goes into the updates")
    position_offset: Literal["none", "prefix"] = option(
        "none", "'prefix': the first token stands at position P"
    )
    init: Literal["normal", "tokens"] = option(
        "normal",
        "start the prefix or prompt from N(0, 0.02) or from tokens of the training examples",
    )
    prefix_gate: bool = option(
        False, "start as the model without a prefix: a gate for each layer and head, from 0 on"
    )
    train_biases: bool = option(
        False, "p-tuning-v2: train the biases of the layers with a prefix too (BitFit)"
    )
    train_norms: bool = option(
        False, "p-tuning-v2: train the norms of the layers with a prefix too"
    )
    low_rank: Integer | None = option(
        None, "p-tuning-v2: rank of updates of the layers' matrices, which train too (LoRA)"
    )
    low_rank_alpha: float | None = option(
        None, "they are scaled by this over the rank (default: twice the rank)"
    )
    low_rank_targets: str | None = option(
        None, "names of the linear layers that get one, as query,value (default: all)"
    )
    start_from: str | None = option(
        None,
        "p-tuning-v2: folder of a run, a multi-task run or an adapter whose prefix training starts "
        "from, and whose head where task and labels are the same",
    )
    backbone: Literal["auto", "frozen", "hook"] = option(
        "auto",
        "how the encoder layers run with a prefix: as frozen blocks, as transformers runs them, or "
        "the first where possible",
    )
    recompute: Literal["none", "ffn", "ffn+qkv", "block"] = option(
        "none",
        "what frozen blocks compute twice to save memory",
    )
    memory_budget: Integer | None = option(
        None, "bytes for what frozen blocks keep and need in a step, instead of --recompute"
    )
    backbone_dtype: Literal["bf16", "fp16"] | None = option(
        None, "dtype of the frozen weights (default: the model's)"
    )
    dropout: BelowOne | None = option(
        None, "dropout inside the encoder (default: the model's)", aliases=("hidden_dropout_prob",)
    )
    attention_dropout: BelowOne | None = option(
        None, "dropout on the attention's probabilities (default: the same)"
    )
    head_dropout: BelowOne | None = option(
        None, "dropout before the classifier (default: the same)"
    )

    def check(self) -> None:
        self.require(self.model is not None, "model", "a folder or a name on the hub")
        is_ours = self.method == "p-tuning-v2"
        has_more = self.train_biases or self.train_norms or self.low_rank is not None
        self.require(
            self.num_virtual_tokens >= 1 or (has_more and is_ours),
            "num_virtual_tokens", "an integer >= 1",
        )  # fmt: skip
        if self.start_from is not None:
            self.require(is_ours, "start_from", f"None for the method {self.method}")
            self.require(self.init == "normal", "init", "'normal' with start_from")
        if is_ours:
            self.require(
                self.init == "normal" or not self.prefix_projection, "init",
                "'normal' with prefix_projection=True (an MLP cannot start at given values)",
            )  # fmt: skip
            self.require(
                self.recompute == "none" or self.memory_budget is None, "recompute",
                "'none' with a memory_budget, which chooses",
            )  # fmt: skip
        if self.depth is not None:
            parse_depth(self.depth)
            self.require(is_ours, "depth", f"None for the method {self.method}")


class TrainingOptions(OptionTable):
    """How long, how fast and with which seed."""

    num_train_epochs: Positive | None = option(
        None, "passes over the data (default: 3, or no limit with --max-steps or --max-seconds)"
    )
    max_steps: Count | None = option(None, "stop after this many optimizer steps")
    max_seconds: Positive | None = option(
        None,
        "stop after this many seconds of training steps, scoring and saving not counted; the "
        "learning rate decays over them (exponential: over epochs), so two such runs are not "
        "bit-equal",
    )
    batch_size: Count | None = option(
        None,
        "examples in a batch on one device (default: 16, or by --batch-tokens)",
        aliases=("per_device_train_batch_size",),
    )
    batch_tokens: Count | None = option(
        None,
        "instead of --batch-size: about so many tokens in a batch, of examples of similar length; "
        "pads are not counted",
    )
    eval_batch_size: Count = option(32, "examples in a batch when scoring")
    gradient_accumulation_steps: Count = option(1, "batches in an optimizer step")
    learning_rate: Positive | None = option(
        None,
        "peak learning rate (default: by method, "
        + ", ".join(f"{name} {rate:g}" for name, rate in DEFAULT_LEARNING_RATES.items())
        + ")",
    )
    head_learning_rate: Positive | None = option(
        None, "peak learning rate of the new head (default: the same)"
    )
    bias_learning_rate: Positive | None = option(
        None,
        "peak learning rate of biases and norms that train (default: that of the head, at most "
        f"{MOST_FOR_BIASES:g})",
    )
    low_rank_learning_rate: Positive = option(1e-3, "peak learning rate of low-rank updates")
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False), "a number >= 0"] = option(
        0.0, "of AdamW, not on biases and norms"
    )
    adam_beta1: BelowOne = option(0.9, "of AdamW: decay of the average of gradients")
    adam_beta2: BelowOne = option(0.999, "of AdamW: decay of the average of their squares")
    warmup_ratio: BelowOne = option(0.0, "part of the run in which the learning rate rises")
    schedule: Schedule = option(
        "linear",
        "the learning rate after that",
        aliases=("lr_scheduler_type",),
    )
    schedule_decay: Annotated[float, Field(gt=0, le=1), "a number in (0, 1]"] = option(
        0.95, "exponential: what the learning rate is multiplied by after each epoch"
    )
    decay_ratio: Annotated[float, Field(ge=0, le=1), "a number in [0, 1]"] = option(
        0.2, "warmup_stable_decay: part of the run, at its end, in which the learning rate falls"
    )
    decay_type: Literal["linear", "cosine", "1-sqrt"] = option(
        "cosine", "warmup_stable_decay: how it falls"
    )
    max_grad_norm: NotNegative = option(1.0, "clip gradients to this norm; 0 = no clipping")
    label_smoothing_factor: BelowOne = option(
        0.0,
        "part of a label's weight that goes to all labels alike; not for answers in a text, "
        "numbers and label words",
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1), "a number in (0, 1)"] | None = option(
        None,
        "score and save an exponential moving average of what is trained, with this decay a step "
        "(0.99 = over about 100 steps)",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32), "an integer in 0..2**32-1"] = option(
        42, "of initialisation, order and dropout"
    )
    bf16: bool = option(False, "automatic mixed precision in bfloat16")
    gradient_checkpointing: bool = option(False, "recompute activations to save memory")
    logging_steps: Count = option(10, "steps between two lines of metrics.jsonl")
    eval_steps: Count | None = option(
        None, "steps between two scorings of the validation set (default: an epoch)"
    )
    eval_seconds: Positive | None = option(
        None, "score after this many seconds of training steps instead"
    )
    save_steps: CountOrZero | None = option(
        None,
        "steps between two checkpoints (default: as eval_steps, and nothing else with "
        "--load-best); 0 = no checkpoints, the run ends with its last step",
    )
    load_best: bool = option(
        True, "end with the checkpoint that scores best on the validation set, not the last"
    )
    progress: bool = option(True, "show a progress bar")

    def check(self) -> None:
        if self.batch_tokens is None and self.batch_size is None:
            self.set_defaults({"batch_size": DEFAULT_BATCH_SIZE})
        self.require(
            self.batch_tokens is None or self.batch_size is None,
            "batch_size", "None beside batch_tokens",
        )  # fmt: skip
        self.require(
            self.schedule != "warmup_stable_decay" or self.warmup_ratio + self.decay_ratio <= 1,
            "decay_ratio", f"at most 1 - warmup_ratio = {1 - self.warmup_ratio:g}",
        )  # fmt: skip
        self.require(
            self.warmup_ratio == 0 or self.schedule != "exponential",
            "warmup_ratio", "0 with the schedule exponential",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All options of a run: what config.json in its folder says."""

    data: DataOptions
    model: ModelOptions
    training: TrainingOptions

    def __post_init__(self) -> None:
        check_label_smoothing(self.data, self.training)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """From option values, flat or in the three tables data, model and training; a list under
        GIVEN names those that were given, where others are listed too.

        Raises:
            ValueError: for an unknown option or a bad value.
        """
        flat = flatten(values)
        return cls(*(table.of(flat) for table in TABLES.values()))  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """The three tables, and the names of the options that were given; JSON-ready."""
        tables = {name: getattr(self, name) for name in TABLES}
        given = [name for table in tables.values() for name in table.given]
        return {**{name: table.model_dump() for name, table in tables.items()}, GIVEN: given}

    def options(self) -> dict[str, Any]:
        """The same in one table."""
        return flatten(self.to_dict())

    def flat(self) -> dict[str, Any]:
        """The values alone."""
        return {**self.data.model_dump(), **self.model.model_dump(), **self.training.model_dump()}

    def changed(self, changes: dict[str, Any]) -> "RunConfig":
        """The run with some options given anew, flat, as `with_changes` does it.

        Raises:
            ValueError: for an unknown option or a bad value.
        """
        return RunConfig.from_dict(with_changes(self.options(), changes))

    def parts(self) -> dict[str, "RunConfig"]:
        """The run itself under the name "": a run of several data sets has one of each."""
        return {"": self}

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, by method when none was given."""
        return self.training.learning_rate or DEFAULT_LEARNING_RATES[self.model.method]


def check_label_smoothing(data: DataOptions, training: TrainingOptions) -> None:
    """Raise a ValueError for label smoothing where the loss is not over the logits of labels."""
    of_labels = data.family != "question-answering" and not data.regression
    training.require(
        training.label_smoothing_factor == 0 or (of_labels and data.head == "linear"),
        "label_smoothing_factor", f"0 for the task {data.task} with the head {data.head!r}",
    )  # fmt: skip


# Options of earlier versions, which their runs' config.json names even where nobody gave them.
_TAKEN_OUT = ("cache_frozen_layers",)

TABLES: dict[str, type[OptionTable]] = {
    "data": DataOptions,
    "model": ModelOptions,
    "training": TrainingOptions,
}


def defaults() -> dict[str, Any]:
    """The options of a run that sets none, flat."""
    fields = {n: f for table in TABLES.values() for n, f in table.model_fields.items()}
    return {name: field.default for name, field in fields.items()}


def with_changes(before: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Flat options with some of them changed; of a batch's size and its tokens the one given now
    replaces the other. Under GIVEN stand those that were given, where one of the two has it."""
    values = before | changes
    for name, other in (("batch_size", "batch_tokens"), ("batch_tokens", "batch_size")):
        if changes.get(name) is not None and other not in changes:
            values[other] = None
    if GIVEN in values:
        kept = [name for name in before.get(GIVEN, before) if name not in changes]
        values[GIVEN] = [*kept, *changes.get(GIVEN, changes)]
    return values


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Options in one table under their own names; those in data, model and training move up.

    Raises:
        ValueError: for a name that is no option or alias of one, or an option given twice.
    """
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        # "model" is both a table and an option.
        is_table = name in TABLES and isinstance(value, dict)
        pairs += value.items() if is_table else [(name, value)]
    pairs = [(name, value) for name, value in pairs if name not in _TAKEN_OUT or value is not None]
    known = {alias: name for table in TABLES.values() for alias, name in table.names().items()}
    words = [str(name).replace("-", "_") for name, _ in pairs]
    given: Any = next((value for name, value in pairs if name == GIVEN), [])
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"{GIVEN}: expected a list of names, got {given!r:.100}")
    unknown = sorted(set(words) - {*known, GIVEN})
    if unknown:
        close = {name: close_to(name, known) for name in unknown}
        hints = [f"; close to {name!r} are {found}" for name, found in close.items() if found]
        raise ValueError(f"config: unknown options {unknown}{''.join(hints)}")
    names = [known.get(word, word) for word in words]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"config: expected every option once, got {twice} more often")
    return {name: value for name, (_, value) in zip(names, pairs, strict=True)}
