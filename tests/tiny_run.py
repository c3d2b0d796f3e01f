"""A tiny pretrained encoder in a folder, and tiny data that it can learn."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "anna bob berlin oslo lives works in loves and sleeps . good bad film a the was it".split()
MAX_POSITIONS = 24
PEOPLE, PLACES = ("Anna", "Bob"), ("Berlin", "Oslo")


def save_tiny_model(folder: Path, positions: int = MAX_POSITIONS) -> str:
    """Two layers of two heads of width 8, and a WordPiece tokenizer; returns the folder's name."""
    vocabulary = [*SPECIAL, *WORDS, "##a", "##s", "##n", "ber", "##lin"]
    tokenizer = Tokenizer(
        models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **dict(zip(names, SPECIAL, strict=True)),
    ).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=positions,
            initializer_range=0.3,
        )
    ).save_pretrained(folder)
    return str(folder)


def tagged_sentences(count: int) -> list[list[tuple[str, str]]]:
    """Sentences of words with B-PER, B-LOC and O, of unequal length."""
    sentences = []
    for number in range(count):
        person, place = PEOPLE[number % 2], PLACES[number // 2 % 2]
        sentence = [(person, "B-PER"), ("lives", "O"), ("in", "O"), (place, "B-LOC"), (".", "O")]
        sentences.append(sentence + [("and", "O"), ("sleeps", "O")] * (number % 3))
    return sentences


def write_conll(path: Path, count: int) -> str:
    """Four columns as in CoNLL-2003, with a document line."""
    blocks = ["-DOCSTART- -X- -X- O\n"]
    for sentence in tagged_sentences(count):
        blocks.append("".join(f"{word} X Y {tag}\n" for word, tag in sentence))
    path.write_text("\n".join(blocks), encoding="utf-8")
    return str(path)


def write_reviews(path: Path, count: int) -> str:
    """A CSV file with the columns text and label (good, bad)."""
    rows = ["text,label"]
    for number in range(count):
        word = ("good", "bad")[number % 2]
        rows.append(f"the film was {word}{' and a film' * (number % 3)},{word}")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)
