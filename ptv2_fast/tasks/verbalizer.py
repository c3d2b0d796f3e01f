"""Text classification by a language model's head that reads label words at a mask token.

The alternative to a new linear layer on the first token in table 4 of the P-Tuning v2 paper, which
names the words ("true", "false", "neutral") but not the sentences around the mask; those are ours.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptv2_fast.tasks.features import TaskTokenizer
from ptv2_fast.tasks.options import DataOptions
from ptv2_fast.tasks.text_classification import TextClassification

_ENTAILMENT = {"entailment": "true", "not_entailment": "false"}
# By data set, label -> word.
VERBALIZERS: dict[str, dict[str, str]] = {
    "rte": _ENTAILMENT,
    "glue-rte": _ENTAILMENT,
    "cb": {"entailment": "true", "neutral": "neutral", "contradiction": "false"},
    "boolq": {"True": "true", "False": "false"},
    "sst2": {"1": "true", "0": "false"},
}
# Pairs of which the first text asks; elsewhere the second does: a hypothesis, an answer, a name.
_FIRST_ASKS = ("boolq", "qnli")


class Verbalizer(TextClassification):
    """Text classification with a cloze instead of a new head.

    A pair becomes ("<the one that asks>? <mask>", the other), of which the other is cut when both
    are too long; a single text becomes "It is <mask>. <text>". The scores of the labels are the
    logits of their words at the mask, and the loss is that of the word among the vocabulary.
    """

    model_class = "AutoModelForMaskedLM"
    head_is_new = False

    def __init__(self, options: DataOptions) -> None:
        super().__init__(options)
        self.words = read_verbalizer(options.verbalizer, options.task)

    def adapt_model(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, labels: list[str]
    ) -> None:
        MaskReader(model, mask_of(tokenizer)[1], find_word_ids(self.words, tokenizer, labels))

    def encode(self, rows: dict[str, list], tokenizer: TaskTokenizer) -> tuple[Any, list[bool]]:
        max_length, own = tokenizer.max_length, tokenizer.tokenizer
        mask, mask_id = mask_of(own)
        texts, others = rows["text"], rows.get("text_pair")
        if others is None:
            clozes = [f"It is {mask}. {text}" for text in texts]
            encoding, was_cut = tokenizer(clozes)
            shortened = [False] * len(texts)
        else:
            if self.options.task not in _FIRST_ASKS:
                texts, others = others, texts
            ending = f"? {mask}"
            # Truncation leaves at least one token of the other text.
            taken = len(own(ending, add_special_tokens=False)["input_ids"]) + 1
            longest = max(max_length - taken - own.num_special_tokens_to_add(pair=True), 2)
            questions = [text.rstrip(" .?!") for text in texts]
            # To one token less: with what follows, the last one may become two.
            kept = tokenizer.cut(questions, longest, longest - 1)
            shortened = [*map(str.__ne__, kept, questions)]
            clozes = [question + ending for question in kept]
            try:
                encoding, was_cut = tokenizer(clozes, others, truncation="only_second")
            except Exception as error:  # the tokenizers package raises nothing narrower
                raise ValueError(
                    f"max_length: expected room for a mask beside two texts, got {max_length} "
                    f"({error})"
                ) from error
        for ids, text in zip(encoding["input_ids"], clozes, strict=True):
            if ids.count(mask_id) != 1:
                raise ValueError(
                    f"head: expected one {mask} among {max_length} tokens with 'lm', got "
                    f"{ids.count(mask_id)} in {text!r}"
                )
        return encoding, [a or b for a, b in zip(was_cut, shortened, strict=True)]


class MaskReader:
    """The hooks of a model with a language model's head that make it a classifier.

    The head gets the state at the mask only, so that the product with the vocabulary has one row
    for each sequence. Labels go in as numbers [B], and logits of the label words [B, labels] come
    out.

    Args:
        model: a ...ForMaskedLM of transformers.
        mask_id: of the mask token, which stands once in every sequence.
        word_ids: of the label words, in the order of the labels.
    """

    def __init__(self, model: PreTrainedModel, mask_id: int, word_ids: list[int]) -> None:
        self.mask_id, self.word_ids = mask_id, word_ids
        self.places: Tensor | None = None
        head = next(part for part in model.children() if part is not model.base_model)
        model.register_forward_pre_hook(self.before_model, with_kwargs=True)
        head.register_forward_pre_hook(self.before_head)
        model.register_forward_hook(self.after_model)

    def before_model(
        self, model: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Find the masks, and replace the numbers of labels by ids of words [B, 1]."""
        input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.places = (input_ids == self.mask_id).int().argmax(dim=1)
        labels = kwargs.get("labels")
        if labels is not None:
            kwargs = {**kwargs, "labels": labels.new_tensor(self.word_ids)[labels][:, None]}
        return args, kwargs

    def before_head(self, head: nn.Module, args: tuple) -> tuple:
        """[B, T, hidden] -> [B, 1, hidden]."""
        hidden, *rest = args
        rows = torch.arange(len(hidden), device=hidden.device)
        return (hidden[rows, self.places][:, None], *rest)

    def after_model(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """Logits [B, 1, vocabulary] -> [B, labels]."""
        output.logits = output.logits[:, 0, self.word_ids]
        return output


def read_verbalizer(text: str | None, task: str | None) -> dict[str, str]:
    """The word of each label, from the option or the data set.

    Raises:
        ValueError: for other text than "label=word,label=word", a label or a word twice, or no
            text where the data set has no words.
    """
    if text is None:
        if task not in VERBALIZERS:
            raise ValueError(
                f"verbalizer: expected the word of each label as 'good=great,bad=terrible' for the "
                f"task {task!r} with the head 'lm', got None"
            )
        return VERBALIZERS[task]
    pairs = [tuple(part.strip() for part in pair.rpartition("=")[::2]) for pair in text.split(",")]
    labels, words = zip(*pairs, strict=True)
    whole = all(labels) and all(words)
    if not whole or len(set(labels)) < len(labels) or len(set(words)) < len(words):
        raise ValueError(
            "verbalizer: expected labels and words, each once, as 'good=great,bad=terrible', got "
            f"{text!r}"
        )
    return dict(zip(labels, words, strict=True))


def find_word_ids(
    words: dict[str, str], tokenizer: PreTrainedTokenizerBase, labels: list[str]
) -> list[int]:
    """The token of each label's word, in the order of `labels`.

    Raises:
        ValueError: when the labels are others than those of the words, or a word is not one known
            token.
    """
    if set(words) != set(labels):
        raise ValueError(
            f"verbalizer: expected words for the labels {labels}, got them for {sorted(words)}"
        )
    ids = []
    for label in labels:
        pieces = tokenizer(words[label], add_special_tokens=False)["input_ids"]
        if len(pieces) != 1 or pieces[0] == tokenizer.unk_token_id:
            tokens = tokenizer.convert_ids_to_tokens(pieces)
            raise ValueError(
                f"verbalizer: expected the word {words[label]!r} of the label {label!r} to be one "
                f"token of the model, got {tokens}"
            )
        ids.append(pieces[0])
    return ids


def mask_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """The mask token and its id.

    Raises:
        ValueError: when the tokenizer has none.
    """
    if tokenizer.mask_token is None:
        raise ValueError("head: expected a tokenizer with a mask token with 'lm', got one without")
    return str(tokenizer.mask_token), int(tokenizer.mask_token_id)  # type: ignore[arg-type]
