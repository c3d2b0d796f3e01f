"""The options of data: which task, and where its examples are."""

from typing import ClassVar, Literal

from ptv2_fast.tasks.benchmarks import BENCHMARKS, Benchmark
from ptv2_fast.tasks.hints import hint
from ptv2_fast.tasks.option_table import Count, Integer, OptionTable, option

FAMILIES = (
    "text-classification", "token-classification", "semantic-role-labeling", "multiple-choice",
    "question-answering",
)  # fmt: skip


class DataOptions(OptionTable):
    """Which task, where its examples are, and how long an input may be.

    What a published data set sets stands where the option was not given.
    """

    dependent: ClassVar[frozenset[str]] = frozenset(
        {"template", *(name for benchmark in BENCHMARKS.values() for name in benchmark.options)}
    )

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
    head: Literal["linear", "lm"] = option(
        "linear",
        "text-classification: a new linear layer on the first token, or the pretrained language "
        "model's head reading label words at a mask token",
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
    conll_word_column: Integer | None = option(
        None,
        "CoNLL files: number of the words' column, from 0 (default: 0, or what the "
        "published data set has)",
    )
    conll_tag_column: Integer | None = option(
        None, "CoNLL files: number of the labels' column, -1 = last (default: likewise, else -1)"
    )
    conll_comments: bool = option(
        True,
        "CoNLL files: leave out comments before a sentence, as CoNLL-U and GermEval have them "
        "(# and a text that is no word with a label)",
    )
    tag_scheme: Literal["auto", "words"] = option(
        "auto",
        "token-classification: score whole chunks where the labels are of chunks (B-X, BIOES, "
        "BMES, BILOU, X-B, bare B), else single words; or single words whatever the labels",
    )
    decoding: Literal["argmax", "viterbi"] | None = option(
        None,
        "token tasks: how labels of chunks are chosen, each word's best (argmax), or the best "
        "sequence that their scheme allows, with some weight on how often labels follow each other "
        "in the training data (viterbi; default: that, where these keep to the scheme; IOB1 does "
        "not)",
    )
    max_length: Count | None = option(
        None,
        "longest input in tokens (default: as the paper for a published data set, else what the "
        "model's positions allow)",
        aliases=("max_seq_length",),
    )
    long_input: Literal["truncate", "error"] = option(
        "truncate",
        "what to do with longer examples: cut them, and say how many, or stop",
    )
    doc_stride: Count = option(
        128, "question-answering: tokens that two windows of a long context share"
    )
    max_answer_length: Count = option(30, "question-answering: longest answer in tokens")
    n_best: Count = option(20, "question-answering: how many starts and ends are combined")
    unanswerable: bool = option(
        True, "question-answering: questions may have no answer, and the answer may be none"
    )
    null_score_threshold: float = option(
        0.0, "question-answering: no answer when its score is more than this above the best one's"
    )
    max_train_examples: Count | None = option(
        None, "train on this many examples, drawn by the seed"
    )
    max_eval_examples: Count | None = option(
        None,
        "score only this many validation examples, drawn by the seed; test examples are all scored",
    )
    feature_cache: str | None = option(
        None, "folder that keeps tokenized examples for later runs (default: memory only)"
    )
    preprocessing_num_workers: Count = option(1, "processes that tokenize")

    def check(self) -> None:
        known = (*FAMILIES, *BENCHMARKS)
        if self.task not in known:
            raise ValueError(
                f"task: expected one of {FAMILIES} or a published data set, as `ptv2-fast tasks` "
                f"lists them, got {self.task!r}" + hint(str(self.task), known)
            )
        templates = self.benchmark.templates if self.benchmark else ()
        self.require(
            self.template is None or self.template in templates,
            "template", f"one of {templates}" if templates else f"None for the task {self.task}",
        )  # fmt: skip
        if self.benchmark is not None:
            defaults = {"template": templates[0], **self.benchmark.options}
            self.set_defaults({n: v for n, v in defaults.items() if n not in self.given})
        self.require(
            self.data_dir is None or self.benchmark is not None,
            "data_dir", f"None for the task {self.task}, which takes files or dataset",
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

    @property
    def benchmark(self) -> Benchmark | None:
        """The published data set that the task names; None for a family."""
        return BENCHMARKS.get(str(self.task))

    @property
    def family(self) -> str:
        """The task family."""
        return self.benchmark.family if self.benchmark else str(self.task)
