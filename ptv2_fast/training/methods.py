"""The methods by name: each prepares a model of transformers in place for training."""

import dataclasses
import math
from collections.abc import Callable

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from ptv2_fast.encoders import FAMILIES, attach, max_input_tokens
from ptv2_fast.encoders.families import find_family
from ptv2_fast.encoders.vectors import find_vectors
from ptv2_fast.prefix import PTuningV2Config
from ptv2_fast.training.baselines import (
    fine_tuning,
    linear_probe,
    lora,
    p_tuning_v1,
    prompt_tuning,
)
from ptv2_fast.training.depth import check_depth, parse_depth
from ptv2_fast.training.options import INSIDE, ModelOptions

# Takes the model, the options and token ids to start from (None with init="normal").
Method = Callable[[PreTrainedModel, ModelOptions, Tensor | None], None]


def prefix_config(options: ModelOptions) -> PTuningV2Config:
    """The prefix that the options describe; most of them have the names of its fields.

    Raises:
        ValueError: naming the field that is out of range.
    """
    names = [field.name for field in dataclasses.fields(PTuningV2Config)]
    fields = {name: getattr(options, name) for name in names if hasattr(options, name)}
    if options.low_rank_targets is not None:
        fields["low_rank_targets"] = tuple(
            name.strip() for name in options.low_rank_targets.split(",")
        )
    layers = None if options.depth is None else parse_depth(options.depth)
    return PTuningV2Config(layers=layers, **fields)


def p_tuning_v2(model: PreTrainedModel, options: ModelOptions, init_ids: Tensor | None) -> None:
    """Deep prompt tuning (Liu et al. 2022): a prefix in front of every layer's attention."""
    if options.depth is not None:
        layers = find_family(model.config).layer_modules(model.base_model)
        check_depth(options.depth, len(layers))
    attach(model, prefix_config(options), init_input_ids=init_ids)


METHODS: dict[str, Method] = {
    "p-tuning-v2": p_tuning_v2,
    "fine-tuning": fine_tuning,
    "linear-probe": linear_probe,
    "prompt-tuning": prompt_tuning,
    "p-tuning-v1": p_tuning_v1,
    "lora": lora,
}


def prepare_model(
    model: PreTrainedModel, options: ModelOptions, train_table: Dataset | None = None
) -> None:
    """Make the model trainable by the method the options name, in place.

    Args:
        model: with the head of its task.
        options: method and prefix.
        train_table: features of the training examples, for init="tokens"; None starts from
            N(0, 0.02), for a caller who loads trained values next.

    Raises:
        ValueError: when the model cannot carry what the method adds.
    """
    init_ids = None
    if options.init == "tokens" and train_table is not None:
        init_ids = sample_token_ids(train_table, options.num_virtual_tokens)
    METHODS[options.method](model, options, init_ids)


def missing_inside(config: PretrainedConfig) -> list[str]:
    """The options that would train something beside the prefix which an encoder does not have."""
    if config.model_type not in FAMILIES:
        return list(INSIDE)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    missing = []
    for name, value in INSIDE.items():
        prefix = PTuningV2Config(num_virtual_tokens=1, **{name: value})
        try:
            find_vectors(model.base_model, FAMILIES[config.model_type], prefix)
        except ValueError:
            missing.append(name)
    return missing


def room_for_text(config: PretrainedConfig) -> float:
    """How many tokens an encoder takes; infinity where its family is not known."""
    family = FAMILIES.get(config.model_type)
    return math.inf if family is None else family.max_positions(config)


def longest_input(model: PreTrainedModel, options: ModelOptions) -> tuple[int, str]:
    """How many tokens an input may have beside prefix or prompt, and why, for messages.

    Asked before the model is prepared.

    Raises:
        ValueError: when the configuration does not say it.
    """
    if model.config.model_type in FAMILIES:
        limit = max_input_tokens(model)
    else:
        named = getattr(model.config, "max_position_embeddings", None)
        if not isinstance(named, int):
            raise ValueError(
                "model: expected an integer config.max_position_embeddings, which limits inputs, "
                f"got {named!r} for the model_type {model.config.model_type!r}"
            )
        limit = named
    why = f"{type(model).__name__} has {limit} positions"
    shifted = options.method == "p-tuning-v2" and options.position_offset == "prefix"
    if shifted or options.method in ("prompt-tuning", "p-tuning-v1"):
        limit -= options.num_virtual_tokens
        reason = "position_offset='prefix'" if shifted else "the prompt"
        why += f" and {limit} remain, because {reason} takes {options.num_virtual_tokens}"
    return limit, why


def sample_token_ids(train_table: Dataset, count: int) -> Tensor:
    """Token ids of randomly drawn training examples, without their first and last token, [count].

    Examples repeat when they have fewer tokens.
    """
    order = torch.randperm(len(train_table)).tolist()
    drawn = train_table.select(order[:count])["input_ids"][:]
    if drawn and isinstance(drawn[0][0], list):  # several choices in a row
        drawn = [choice for row in drawn for choice in row]
    inner = [row[1:-1] for row in drawn]
    if not any(inner):
        raise ValueError("init: expected training examples with tokens for init='tokens'")
    ids = torch.tensor([token for row in inner for token in row])
    return ids[torch.arange(count) % len(ids)]
