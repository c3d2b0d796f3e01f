"""Options as dataclasses that check themselves and from which the command line is built."""

import dataclasses
import types
import typing
from typing import Any

from ptv2_fast.tasks.benchmarks import BENCHMARKS, Benchmark
from ptv2_fast.tasks.hints import hint

FAMILIES = (
    "text-classification", "token-classification", "semantic-role-labeling", "multiple-choice",
    "question-answering",
)  # fmt: skip


DECODINGS = ("argmax", "viterbi")


def option(default: Any, help: str, *, choices: tuple = (), aliases: tuple[str, ...] = ()) -> Any:
    """A dataclass field with its help text, allowed values and further command line names."""
    metadata = {"help": help, "choices": choices, "aliases": aliases}
    return dataclasses.field(default=default, metadata=metadata)


def value_type(annotation: Any) -> tuple[type, bool]:
    """(int | float | bool | str, whether None is allowed) of a field's annotation."""
    optional = isinstance(annotation, types.UnionType)
    if optional:
        annotation = next(a for a in typing.get_args(annotation) if a is not types.NoneType)
    return annotation, optional


class Options:
    """Base of the option dataclasses: checks types, choices and signs of the fields.

    Raises:
        ValueError: naming the field, what was expected and what was given.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, choices = getattr(self, field.name), field.metadata["choices"]
            kind, optional = value_type(hints[field.name])
            if value is None and optional:
                continue
            if kind is float and type(value) is int and abs(value) < 2**1000:
                value = float(value)
                object.__setattr__(self, field.name, value)
            if type(value) is not kind:
                expected = {str: "text", bool: "true or false"}
                name = expected.get(kind, f"a number ({kind.__name__})")
                raise ValueError(f"{field.name}: expected {name}, got {value!r:.100}")
            if type(value) is int and not -(2**63) <= value < 2**63:
                raise ValueError(f"{field.name}: expected an integer of 64 bits, got a larger one")
            if choices and value not in choices:
                raise ValueError(f"{field.name}: expected one of {choices}, got {value!r:.100}")

    @classmethod
    def names(cls) -> dict[str, str]:
        """The option that each name and alias stands for."""
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        return {name: f.name for f in fields for name in (f.name, *f.metadata["aliases"])}

    def require(self, condition: bool, name: str, expected: str) -> None:
        """Raise a ValueError that names the field unless the condition holds."""
        if not condition:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r:.100}")


@dataclasses.dataclass(frozen=True)
class DataOptions(Options):
    """Which task, where its examples are, and how long an input may be."""

    task: str | None = option(
        None,
        "what to learn: a published data set (`ptv2-fast tasks` lists them) or, for your own "
        "data, one of " + ", ".join(FAMILIES),
    )
    data_dir: str | None = option(
        None,
        "folder with the official files of a published data set (default: the Hugging Face hub)",
    )
    template: str | None = option(
        None, "how a published data set phrases its examples, where there is a choice"
    )
    train_file: str | None = option(
        None,
        "training examples: .csv, .tsv, .json or .jsonl (one object a line), .parquet; for "
        "token-classification any other suffix, and .tsv with empty lines between sentences, is "
        "read as CoNLL columns, for "
        "semantic-role-labeling as lines 'index words ||| labels'; for question-answering .json "
        "and .json.gz also in SQuAD's form",
    )
    validation_file: str | None = option(None, "examples to score during and after training")
    test_file: str | None = option(None, "examples to score once, at the end")
    dataset: str | None = option(
        None, "instead of train_file: a data set of the Hugging Face hub, or a folder of that form"
    )
    dataset_config: str | None = option(None, "which configuration of --dataset")
    train_split: str = option("train", "split of --dataset to train on")
    validation_split: str | None = option("validation", "split of --dataset to validate on")
    test_split: str | None = option(None, "split of --dataset to test on")
    text_column: str = option("text", "text tasks: column of the text")
    text_pair_column: str | None = option(None, "text-classification: column of a second text")
    choices_column: str = option(
        "choices",
        "multiple-choice: column of the list of choices (or one column each: choice1, choice2, …)",
    )
    label_column: str = option(
        "label", "text tasks: column of the label; multiple-choice: of the right one's index from 0"
    )
    regression: bool = option(False, "text-classification: labels are numbers to be predicted")
    head: str = option(
        "linear",
        "text-classification: a new linear layer on the first token, or the pretrained language "
        "model's head reading label words at a mask token",
        choices=("linear", "lm"),
    )
    verbalizer: str | None = option(
        None, "with --head lm: the word of each label, as good=great,bad=terrible"
    )
    words_column: str | None = option(
        None, "token tasks: column of the words (default: tokens; semantic-role-labeling: words)"
    )
    tags_column: str | None = option(
        None,
        "token tasks: column of their labels (default: ner_tags; semantic-role-labeling: tags)",
    )
    sentence_column: str | None = option(
        None,
        "token-classification, tables with one word a row: column that tells the sentences apart "
        "(default: the one called sentence, sentence_id, Sentence #, ... if any)",
    )
    predicate_column: str | None = option(
        None, "semantic-role-labeling: column of the verb's index, from 0 (default: pred)"
    )
    conll_word_column: int | None = option(
        None,
        "CoNLL files: number of the words' column, from 0 (default: 0, or what the "
        "published data set has)",
    )
    conll_tag_column: int | None = option(
        None, "CoNLL files: number of the labels' column, -1 = last (default: likewise, else -1)"
    )
    conll_comments: bool = option(
        True,
        "CoNLL files: leave out comments before a sentence, as CoNLL-U and GermEval have them "
        "(# and a text that is no word with a label)",
    )
    tag_scheme: str = option(
        "auto",
        "token-classification: score whole chunks where the labels are of chunks (B-X, BIOES, "
        "BMES, BILOU, X-B, bare B), else single words; or single words whatever the labels",
        choices=("auto", "words"),
    )
    decoding: str | None = option(
        None,
        "token tasks: how labels of chunks are chosen, each word's best (argmax), or the best "
        "sequence that their scheme allows, with some weight on how often labels follow each other "
        "in the training data (viterbi; default: that, where these keep to the scheme; IOB1 does "
        "not)",
        choices=DECODINGS,
    )
    max_length: int | None = option(
        None,
        "longest input in tokens (default: as the paper for a published data set, else what the "
        "model's positions allow)",
        aliases=("max_seq_length",),
    )
    long_input: str = option(
        "truncate",
        "what to do with longer examples: cut them, and say how many, or stop",
        choices=("truncate", "error"),
    )
    doc_stride: int = option(
        128, "question-answering: tokens that two windows of a long context share"
    )
    max_answer_length: int = option(30, "question-answering: longest answer in tokens")
    n_best: int = option(20, "question-answering: how many starts and ends are combined")
    unanswerable: bool = option(
        True, "question-answering: questions may have no answer, and the answer may be none"
    )
    null_score_threshold: float = option(
        0.0, "question-answering: no answer when its score is more than this above the best one's"
    )
    max_train_examples: int | None = option(None, "train on this many examples, drawn by the seed")
    max_eval_examples: int | None = option(
        None,
        "score only this many validation examples, drawn by the seed; test examples are all scored",
    )
    feature_cache: str | None = option(
        None, "folder that keeps tokenized examples for later runs (default: memory only)"
    )
    preprocessing_num_workers: int = option(1, "processes that tokenize")

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (*FAMILIES, *BENCHMARKS)
        if self.task not in known:
            raise ValueError(
                f"task: expected one of {FAMILIES} or a published data set, as `ptv2-fast tasks` "
                f"lists them, got {self.task!r}" + hint(str(self.task), known)
            )
        self.require(
            self.data_dir is None or self.benchmark is not None,
            "data_dir", f"None for the task {self.task}, which takes files or dataset",
        )  # fmt: skip
        templates = self.benchmark.templates if self.benchmark else ()
        self.require(
            self.template is None or self.template in templates,
            "template", f"one of {templates}" if templates else f"None for the task {self.task}",
        )  # fmt: skip
        has_numbers = self.benchmark is not None and "regression" in self.benchmark.options
        self.require(
            not self.regression or self.task == FAMILIES[0] or has_numbers,
            "regression", f"False for the task {self.task}",
        )  # fmt: skip
        self.require(
            self.head == "linear" or (self.family == FAMILIES[0] and not self.regression),
            "head", "'linear' for all but text-classification with labels",
        )  # fmt: skip
        self.require(
            self.verbalizer is None or self.head == "lm", "verbalizer", "None without head='lm'"
        )
        self.require(
            self.dataset is None or self.train_file is None, "dataset", "None beside train_file"
        )
        self.require(
            self.data_dir is None or self.dataset is None, "data_dir", "None beside dataset"
        )
        for name in ("max_length", "max_train_examples", "max_eval_examples", "doc_stride",
                     "max_answer_length", "n_best", "preprocessing_num_workers"):  # fmt: skip
            value = getattr(self, name)
            self.require(value is None or value >= 1, name, "None or an integer >= 1")

    @property
    def benchmark(self) -> Benchmark | None:
        """The published data set that the task names; None for a family."""
        return BENCHMARKS.get(str(self.task))

    @property
    def family(self) -> str:
        """The task family."""
        return self.benchmark.family if self.benchmark else str(self.task)

    def with_benchmark_defaults(self) -> "DataOptions":
        """These options with what the published data set sets where they have the default."""
        changes: dict[str, Any] = {}
        if self.benchmark is not None:
            defaults = {f.name: f.default for f in dataclasses.fields(self)}
            given = {name: getattr(self, name) for name in self.benchmark.options}
            changes = {
                name: value
                for name, value in self.benchmark.options.items()
                if given[name] == defaults[name]
            }
            if self.template is None:
                changes["template"] = self.benchmark.templates[0]
        return dataclasses.replace(self, **changes)
