"""What a run is: model, method and training options, and how they are read from files."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ptv2_fast.files import without_word
from ptv2_fast.tasks.hints import close_to
from ptv2_fast.tasks.options import DataOptions, Options, option
from ptv2_fast.training.depth import parse_depth

METHODS = (
    "p-tuning-v2", "fine-tuning", "linear-probe", "prompt-tuning", "p-tuning-v1", "lora",
)  # fmt: skip
# Options that change no result: runs may go on with others.
NEUTRAL_OPTIONS = frozenset({"progress", "feature_cache", "preprocessing_num_workers"})
SCHEDULES = (
    "linear", "cosine", "constant", "constant_with_warmup", "warmup_stable_decay", "exponential",
)  # fmt: skip

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
# Options that only some methods read. Not here: depth and start_from, which others refuse.
_PROMPTS = ("p-tuning-v2", "prompt-tuning", "p-tuning-v1")
METHODS_OF_OPTION: dict[str, tuple[str, ...]] = {
    "num_virtual_tokens": _PROMPTS,
    "init": _PROMPTS,
    "encoder_hidden_size": ("p-tuning-v2", "p-tuning-v1"),
    "prompt_encoder": ("p-tuning-v1",),
    **dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout"), ("lora",)),
    **dict.fromkeys(
        ("prefix_projection", "prefix_dropout", "position_offset", "prefix_gate", "train_biases",
         "train_norms", "low_rank", "low_rank_alpha", "low_rank_targets",
         "low_rank_learning_rate", "bias_learning_rate", "backbone", "recompute", "memory_budget",
         "backbone_dtype"),
        ("p-tuning-v2",),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelOptions(Options):
    """The encoder and the method; the fields of the prefix keep PEFT's names."""

    model: str | None = option(
        None, "pretrained encoder: a folder or a name on the hub", aliases=("model_name_or_path",)
    )
    method: str = option("p-tuning-v2", "what is trained", choices=METHODS)
    num_virtual_tokens: int = option(20, "length of the prefix or prompt", aliases=("pre_seq_len",))
    prefix_projection: bool = option(False, "compute the prefix by an MLP")
    encoder_hidden_size: int | None = option(
        None,
        "width of that MLP, or of the prompt encoder (default: the model's)",
        aliases=("prefix_hidden_size",),
    )
    prefix_dropout: float = option(0.0, "dropout on the prefix")
    depth: str | None = option(
        None, "p-tuning-v2: layers that get a prefix, counted from 1, as 1-4,9 (default: all)"
    )
    prompt_encoder: str = option(
        "lstm", "p-tuning-v1: the network that computes the prompt", choices=("lstm", "mlp")
    )
    lora_rank: int = option(8, "lora: rank of the updates of queries and values")
    lora_alpha: float = option(16.0, "lora: the updates are scaled by this over the rank")
    lora_dropout: float = option(0.1, "lora: dropout on what goes into the updates")
    position_offset: str = option(
        "none", "'prefix': the first token stands at position P", choices=("none", "prefix")
    )
    init: str = option(
        "normal",
        "start the prefix or prompt from N(0, 0.02) or from tokens of the training examples",
        choices=("normal", "tokens"),
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
    low_rank: int | None = option(
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
    backbone: str = option(
        "auto",
        "how the encoder layers run with a prefix: as frozen blocks, as transformers runs them, or "
        "the first where possible",
        choices=("auto", "frozen", "hook"),
    )
    recompute: str = option(
        "none",
        "what frozen blocks compute twice to save memory",
        choices=("none", "ffn", "ffn+qkv", "block"),
    )
    memory_budget: int | None = option(
        None, "bytes for what frozen blocks keep and need in a step, instead of --recompute"
    )
    backbone_dtype: str | None = option(
        None, "dtype of the frozen weights (default: the model's)", choices=("bf16", "fp16")
    )
    dropout: float | None = option(
        None, "dropout inside the encoder (default: the model's)", aliases=("hidden_dropout_prob",)
    )
    attention_dropout: float | None = option(
        None, "dropout on the attention's probabilities (default: the same)"
    )
    head_dropout: float | None = option(None, "dropout before the classifier (default: the same)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.model is not None, "model", "a folder or a name on the hub")
        has_more = self.train_biases or self.train_norms or self.low_rank is not None
        least = 0 if has_more and self.method == "p-tuning-v2" else 1
        self.require(
            self.num_virtual_tokens >= least, "num_virtual_tokens", f"an integer >= {least}"
        )
        width = self.encoder_hidden_size
        self.require(width is None or width >= 1, "encoder_hidden_size", "None or an integer >= 1")
        if self.start_from is not None:
            self.require(
                self.method == "p-tuning-v2", "start_from", f"None for the method {self.method}"
            )
            self.require(self.init == "normal", "init", "'normal' with start_from")
        if self.method == "p-tuning-v2":
            self.require(
                self.init == "normal" or not self.prefix_projection, "init",
                "'normal' with prefix_projection=True (an MLP cannot start at given values)",
            )  # fmt: skip
            self.require(
                self.recompute == "none" or self.memory_budget is None, "recompute",
                "'none' with a memory_budget, which chooses",
            )  # fmt: skip
        self.require(self.lora_rank >= 1, "lora_rank", "an integer >= 1")
        self.require(self.lora_alpha > 0, "lora_alpha", "a number > 0")
        if self.depth is not None:
            parse_depth(self.depth)
            self.require(
                self.method == "p-tuning-v2", "depth", f"None for the method {self.method}"
            )
        for name in ("dropout", "attention_dropout", "head_dropout", "prefix_dropout",
                     "lora_dropout"):  # fmt: skip
            value = getattr(self, name)
            self.require(value is None or 0 <= value < 1, name, "a probability in [0, 1)")


@dataclasses.dataclass(frozen=True)
class TrainingOptions(Options):
    """How long, how fast and with which seed."""

    num_train_epochs: float | None = option(
        None, "passes over the data (default: 3, or no limit with --max-steps or --max-seconds)"
    )
    max_steps: int | None = option(None, "stop after this many optimizer steps")
    max_seconds: float | None = option(
        None,
        "stop after this many seconds of training steps, scoring and saving not counted; the "
        "learning rate decays over them (exponential: over epochs), so two such runs are not "
        "bit-equal",
    )
    batch_size: int | None = option(
        None,
        "examples in a batch on one device (default: 16, or by --batch-tokens)",
        aliases=("per_device_train_batch_size",),
    )
    batch_tokens: int | None = option(
        None,
        "instead of --batch-size: about so many tokens in a batch, of examples of similar length; "
        "pads are not counted",
    )
    eval_batch_size: int = option(32, "examples in a batch when scoring")
    gradient_accumulation_steps: int = option(1, "batches in an optimizer step")
    learning_rate: float | None = option(
        None,
        "peak learning rate (default: by method, "
        + ", ".join(f"{name} {rate:g}" for name, rate in DEFAULT_LEARNING_RATES.items())
        + ")",
    )
    head_learning_rate: float | None = option(
        None, "peak learning rate of the new head (default: the same)"
    )
    bias_learning_rate: float | None = option(
        None,
        "peak learning rate of biases and norms that train (default: that of the head, at most "
        f"{MOST_FOR_BIASES:g})",
    )
    low_rank_learning_rate: float = option(1e-3, "peak learning rate of low-rank updates")
    weight_decay: float = option(0.0, "of AdamW, not on biases and norms")
    adam_beta1: float = option(0.9, "of AdamW: decay of the average of gradients")
    adam_beta2: float = option(0.999, "of AdamW: decay of the average of their squares")
    warmup_ratio: float = option(0.0, "part of the run in which the learning rate rises")
    schedule: str = option(
        "linear",
        "the learning rate after that",
        choices=SCHEDULES,
        aliases=("lr_scheduler_type",),
    )
    schedule_decay: float = option(
        0.95, "exponential: what the learning rate is multiplied by after each epoch"
    )
    decay_ratio: float = option(
        0.2, "warmup_stable_decay: part of the run, at its end, in which the learning rate falls"
    )
    decay_type: str = option(
        "cosine", "warmup_stable_decay: how it falls", choices=("linear", "cosine", "1-sqrt")
    )
    max_grad_norm: float = option(1.0, "clip gradients to this norm; 0 = no clipping")
    label_smoothing_factor: float = option(
        0.0,
        "part of a label's weight that goes to all labels alike; not for answers in a text, "
        "numbers and label words",
    )
    ema_decay: float | None = option(
        None,
        "score and save an exponential moving average of what is trained, with this decay a step "
        "(0.99 = over about 100 steps)",
    )
    seed: int = option(42, "of initialisation, order and dropout")
    bf16: bool = option(False, "automatic mixed precision in bfloat16")
    gradient_checkpointing: bool = option(False, "recompute activations to save memory")
    logging_steps: int = option(10, "steps between two lines of metrics.jsonl")
    eval_steps: int | None = option(
        None, "steps between two scorings of the validation set (default: an epoch)"
    )
    eval_seconds: float | None = option(
        None, "score after this many seconds of training steps instead"
    )
    save_steps: int | None = option(
        None,
        "steps between two checkpoints (default: as eval_steps, and nothing else with "
        "--load-best); 0 = no checkpoints, the run ends with its last step",
    )
    load_best: bool = option(
        True, "end with the checkpoint that scores best on the validation set, not the last"
    )
    progress: bool = option(True, "show a progress bar")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_tokens is None and self.batch_size is None:
            object.__setattr__(self, "batch_size", DEFAULT_BATCH_SIZE)
        for name in ("batch_size", "batch_tokens", "eval_batch_size",
                     "gradient_accumulation_steps", "logging_steps"):  # fmt: skip
            value = getattr(self, name)
            self.require(value is None or value >= 1, name, "an integer >= 1")
        self.require(
            self.batch_tokens is None or self.batch_size is None,
            "batch_size", "None beside batch_tokens",
        )  # fmt: skip
        for name in ("num_train_epochs", "max_steps", "max_seconds", "learning_rate",
                     "head_learning_rate", "bias_learning_rate",
                     "low_rank_learning_rate", "eval_steps", "eval_seconds"):  # fmt: skip
            value = getattr(self, name)
            self.require(value is None or 0 < value < math.inf, name, "None or a number > 0")
        for name in ("weight_decay", "max_grad_norm"):
            self.require(getattr(self, name) >= 0, name, "a number >= 0")
        for name in ("adam_beta1", "adam_beta2", "warmup_ratio", "label_smoothing_factor"):
            self.require(0 <= getattr(self, name) < 1, name, "a number in [0, 1)")
        self.require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "ema_decay", "None or a number in (0, 1)",
        )  # fmt: skip
        self.require(0 <= self.decay_ratio <= 1, "decay_ratio", "a number in [0, 1]")
        self.require(
            self.schedule != "warmup_stable_decay" or self.warmup_ratio + self.decay_ratio <= 1,
            "decay_ratio", f"at most 1 - warmup_ratio = {1 - self.warmup_ratio:g}",
        )  # fmt: skip
        self.require(0 < self.schedule_decay <= 1, "schedule_decay", "a number in (0, 1]")
        self.require(
            self.warmup_ratio == 0 or self.schedule != "exponential",
            "warmup_ratio", "0 with the schedule exponential",
        )  # fmt: skip
        self.require(self.save_steps is None or self.save_steps >= 0, "save_steps",
                     "None or an integer >= 0")  # fmt: skip
        self.require(0 <= self.seed < 2**32, "seed", "an integer in 0..2**32-1")


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
        """From option values, flat or in the three tables data, model and training.

        Raises:
            ValueError: for an unknown option or a bad value.
        """
        flat = flatten(values)
        parts: dict[str, Any] = {
            name: part(**{key: flat[key] for key in part.names() if key in flat})
            for name, part in SECTIONS.items()
        }
        return cls(**parts)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The three tables, JSON-ready."""
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, Any]:
        """All options in one table, JSON-ready."""
        return {name: value for table in self.to_dict().values() for name, value in table.items()}

    def parts(self) -> dict[str, "RunConfig"]:
        """The run itself under the name "": a run of several data sets has one of each."""
        return {"": self}

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, by method when none was given."""
        return self.training.learning_rate or DEFAULT_LEARNING_RATES[self.model.method]


def check_label_smoothing(data: DataOptions, training: TrainingOptions) -> None:
    """Raise a ValueError for label smoothing where the loss is not over the logits of labels."""
    whole = data.with_benchmark_defaults()
    of_labels = data.family != "question-answering" and not whole.regression
    training.require(
        training.label_smoothing_factor == 0 or (of_labels and data.head == "linear"),
        "label_smoothing_factor", f"0 for the task {data.task} with the head {data.head!r}",
    )  # fmt: skip


_MOST_VALUES = 100_000  # in a YAML file

# Options of earlier versions, which their runs' config.json names even where nobody gave them.
_TAKEN_OUT = ("cache_frozen_layers",)

# What they did with data where their files do not name an option.
OF_EARLIER_RUNS = {"decoding": "argmax"}

SECTIONS: dict[str, type[Options]] = {
    "data": DataOptions,
    "model": ModelOptions,
    "training": TrainingOptions,
}


def defaults() -> dict[str, Any]:
    """The options of a run that sets none, flat."""
    fields = [f for part in SECTIONS.values() for f in dataclasses.fields(part)]  # type: ignore[arg-type]
    return {field.name: field.default for field in fields}


def with_changes(before: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Flat options with some of them changed; of a batch's size and its tokens the one given now
    replaces the other."""
    values = before | changes
    for name, other in (("batch_size", "batch_tokens"), ("batch_tokens", "batch_size")):
        if changes.get(name) is not None and other not in changes:
            values[other] = None
    return values


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Options in one table under their own names; those in data, model and training move up.

    Raises:
        ValueError: for a name that is no option or alias of one, or an option given twice.
    """
    given: list[tuple[str, Any]] = []
    for name, value in values.items():
        # "model" is both a table and an option.
        is_table = name in SECTIONS and isinstance(value, dict)
        given += value.items() if is_table else [(name, value)]
    given = [(name, value) for name, value in given if name not in _TAKEN_OUT or value is not None]
    known = {alias: name for part in SECTIONS.values() for alias, name in part.names().items()}
    names = [str(name).replace("-", "_") for name, _ in given]
    unknown = sorted(set(names) - set(known))
    if unknown:
        close = {name: close_to(name, known) for name in unknown}
        hints = [f"; close to {name!r} are {found}" for name, found in close.items() if found]
        raise ValueError(f"config: unknown options {unknown}{''.join(hints)}")
    names = [known[name] for name in names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"config: expected every option once, got {twice} more often")
    return {name: value for name, (_, value) in zip(names, given, strict=True)}


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Options from a .json, .toml, .yaml or .yml file, flat; a run's config.json is such a file.

    Raises:
        ValueError: for a missing or malformed file, or unknown options.
    """
    return flatten(read_table(path))


def read_table(path: str | Path) -> dict[str, Any]:
    """What a .json, .toml, .yaml or .yml file says, without what a run found.

    Raises:
        ValueError: for a missing or malformed file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config: expected an existing file, got {str(path)!r}")
    try:
        values = _parsers(path.suffix.lower())(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of json, toml, yaml and unicode
        raise ValueError(f"config: {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config: expected a table of options in {path}, got {values!r:.100}")
    # What a run's config.json keeps beside the options.
    if "found" in values:
        values = options_of_run(values)
    return without_word(values)


def options_of_run(content: dict[str, Any]) -> dict[str, Any]:
    """The options in a run's config.json, or in that of a multi-task run; an option of data that
    an earlier version did not know is what that version did."""
    values = {name: value for name, value in content.items() if name != "found"}
    if isinstance(values.get("data"), dict):
        values["data"] = OF_EARLIER_RUNS | values["data"]
    if isinstance(values.get("tasks"), list):
        tables = values["tasks"]
        values["tasks"] = [OF_EARLIER_RUNS | t if isinstance(t, dict) else t for t in tables]
    return values


def _parsers(suffix: str) -> Any:
    if suffix == ".json":
        return json.loads
    if suffix == ".toml":
        try:
            import tomllib
        except ImportError:
            raise ValueError("TOML needs Python >= 3.11; use JSON or YAML") from None
        return tomllib.loads
    if suffix in (".yaml", ".yml"):
        return _parse_yaml
    raise ValueError(f"expected .json, .toml, .yaml or .yml, got {suffix!r}")


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    # Aliases make much of little: ten lines of them would be written out as a billion values.
    left, count = [content], 0
    while left:
        value = left.pop()
        left += [*value, *value.values()] if isinstance(value, dict) else []
        left += value if isinstance(value, list) else []
        count += 1
        if count > _MOST_VALUES:
            raise ValueError(f"expected at most {_MOST_VALUES:,} values, aliases counted in full")
    return content
