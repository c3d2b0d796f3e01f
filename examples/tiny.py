"""What the examples run on without --model: a tiny random BERT and a tokenizer of a few words."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, BertConfig, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = "a and anna bad berlin bob film good in it lives oslo sleeps the was works .".split()


def open_model(
    name: str | None, auto_class: Any, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A pretrained model and its tokenizer, or the tiny ones where `name` is None.

    Args:
        name: a folder, or a name on the hub.
        auto_class: of transformers, as AutoModelForSequenceClassification.
        options: of its configuration, as num_labels.
    """
    if name is not None:
        model = auto_class.from_pretrained(name, **options)
        return model, AutoTokenizer.from_pretrained(name)
    torch.manual_seed(0)  # the same weights every time, as a name gives them
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=64, **options,
    )  # fmt: skip
    return auto_class.from_config(config), tiny_tokenizer()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words in small letters; [CLS] in front and [SEP] behind."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
