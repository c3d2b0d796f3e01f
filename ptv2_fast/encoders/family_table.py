"""What each family is served with: the data of `ptv2-fast models`, and of docs/support.md.

Read off the table of families and what the installed transformers has for a `model_type`.
"""

import copy
from dataclasses import astuple, dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from ptv2_fast.encoders.blocks import Heads
from ptv2_fast.encoders.families import FAMILIES
from ptv2_fast.encoders.family import Family
from ptv2_fast.encoders.frozen_backbone import static_fallback_reason

# Head -> the mappings of transformers that have its classes. An encoder with a decoder stands in
# the last one too, as a whole.
_CLASSES = {
    "sequence": (transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,),
    "token": (transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,),
    "question": (transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING,),
    "choice": (transformers.MODEL_FOR_MULTIPLE_CHOICE_MAPPING,),
    "bare": (transformers.MODEL_FOR_TEXT_ENCODING_MAPPING, transformers.MODEL_MAPPING),
}
_UNKNOWN = "not in this version of transformers"
COLUMNS = ("model_type", "layers", "heads", "position_offset", "attention")


@dataclass(frozen=True)
class FamilyRow:
    """What one family is served with, in words.

    Attributes:
        model_type: of transformers.
        layers: "frozen, hook", or "hook" for a family without frozen blocks.
        heads: sequence and token classification, question answering, multiple choice, bare.
        position_offset: the served values.
        attention: what differs from every token seeing every other with a key of its own.
    """

    model_type: str
    layers: str
    heads: str
    position_offset: str
    attention: str


def family_rows() -> list[FamilyRow]:
    """One row for each supported `model_type`, sorted."""
    return [_row(name, family) for name, family in sorted(FAMILIES.items())]


def as_text(rows: list[FamilyRow]) -> str:
    """One line for each row, in columns."""
    table = [COLUMNS, *map(astuple, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(map(str.ljust, line, widths)) for line in table)
    return "\n".join(map(str.rstrip, lines))


def as_markdown(rows: list[FamilyRow]) -> str:
    """A table with one line for all families that are served alike."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        name, *cells = astuple(row)
        alike.setdefault(tuple(cells), []).append(name)
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [(", ".join(names), *cells) for cells, names in alike.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(model_type: str, family: Family) -> FamilyRow:
    config = CONFIG_MAPPING[model_type]() if model_type in CONFIG_MAPPING else None
    return FamilyRow(
        model_type,
        "frozen, hook" if _has_frozen_blocks(family, config) else "hook",
        _UNKNOWN if config is None else ", ".join(heads_of(config)),
        _offsets(family),
        ", ".join(_attention(family, config)),
    )


def heads_of(config: PretrainedConfig) -> list[str]:
    """The heads that transformers has for a kind of configuration, on an encoder alone."""
    kind = type(config)
    return [
        head
        for head, mappings in _CLASSES.items()
        if any(kind in mapping and is_encoder(mapping[kind], config) for mapping in mappings)
    ]


def is_encoder(model_class: Any, config: PretrainedConfig) -> bool:
    """Whether a class of transformers makes an encoder of a configuration, without a decoder."""
    if not config.is_encoder_decoder:
        return True
    with torch.device("meta"):  # a copy, into which some classes write
        return not hasattr(model_class(copy.deepcopy(config)).base_model, "decoder")


def _has_frozen_blocks(family: Family, config: Any) -> bool:
    """As attach finds it in a model of the installed transformers, where that has one."""
    if config is None or family.describe_block is None:
        return family.describe_block is not None
    heads, config = Heads(*family.key_shape(config)), copy.deepcopy(config)
    config.num_hidden_layers = 1
    config.vocab_size = config.vocab_size or 8  # ESM's names none
    mappings: Any = _CLASSES["bare"]
    mapping = next(mapping for mapping in mappings if type(config) in mapping)
    with torch.device("meta"):
        layers = family.layer_modules(mapping[type(config)](config).base_model)
    return static_fallback_reason(layers, family, heads) is None


def _offsets(family: Family) -> str:
    if family.keeps_positions or not family.has_position_table(PretrainedConfig()):
        return "none"
    others = set(family.position_types or ()) - {None, "absolute"}
    relative_only: dict[str, Any] = {"position_biased_input": False}
    if not family.has_position_table(PretrainedConfig(**relative_only)):
        others = {"position_biased_input=False"}
    return "none, prefix" + (f" (not with {', '.join(sorted(map(str, others)))})" if others else "")


def _attention(family: Family, config: Any) -> list[str]:
    words = ["causal"] if family.is_decoder else []
    if hasattr(config, "use_bidirectional_attention"):
        words = ["causal or bidirectional"]
    if hasattr(config, "num_key_value_heads"):
        words.append("grouped heads")
    if hasattr(config, "sliding_window") or hasattr(config, "local_attention"):
        words.append("windows")
    return words
