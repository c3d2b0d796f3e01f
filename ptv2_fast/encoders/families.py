"""The encoders that can carry a prefix: one row per `model_type` of transformers."""

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from ptv2_fast.encoders.blocks import (
    describe_albert,
    describe_deberta,
    describe_distilbert,
    describe_esm,
    describe_glm,
    describe_llama,
    describe_modernbert,
    describe_mpnet,
    describe_nomic_bert,
    describe_pre_norm_roberta,
    describe_t5,
    describe_xlm_roberta_xl,
    given_bias,
    shared_bias,
    states_and_bias,
    states_and_no_probabilities,
    states_in_tuple,
)
from ptv2_fast.encoders.family import (
    AlbertFamily,
    DebertaFamily,
    Family,
    MobileBertFamily,
    MPNetFamily,
    T5Family,
)
from ptv2_fast.encoders.glm.family import GLMFamily
from ptv2_fast.encoders.hooks import KNOWN_CODE

# Parts that lie on the backbone itself, with attention that rotates queries and keys.
_NOMIC = Family(
    frozen=("embeddings", "rotary_emb", "layers"),
    encoder="",
    layers="layers",
    attention="self_attn",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    describe_block=describe_nomic_bert,
    position_types=None,
)
_EUROBERT = replace(
    _NOMIC,
    frozen=("embed_tokens", "rotary_emb", "layers", "norm"),
    embeddings="embed_tokens",
    describe_block=describe_llama,
    exit="norm",
)
_LLAMA = replace(_EUROBERT, is_decoder=True)

_DEBERTA = DebertaFamily(describe_block=describe_deberta, layer_output=states_and_no_probabilities)

_T5 = T5Family(
    frozen=("shared", "encoder"),
    embeddings="shared",
    encoder="",
    layers="encoder.block",
    attention="layer.0.SelfAttention",
    query="q",
    key="k",
    value="v",
    describe_block=describe_t5,
    find_bias=shared_bias,
    layer_output=states_and_bias,
    exit="encoder",
)

FAMILIES: dict[str, Family] = {
    "albert": AlbertFamily(
        layers="encoder.albert_layer_groups", attention="attention", describe_block=describe_albert
    ),
    "bert": Family(),
    "camembert": Family(pads_keep_position=True),
    "data2vec-text": Family(pads_keep_position=True),
    "deberta": replace(_DEBERTA, query="in_proj", key="in_proj", value="in_proj"),
    "deberta-v2": replace(_DEBERTA, query="query_proj", key="key_proj", value="value_proj"),
    "distilbert": Family(
        frozen=("embeddings", "transformer"),
        encoder="transformer",
        layers="transformer.layer",
        attention="attention",
        query="q_lin",
        key="k_lin",
        value="v_lin",
        describe_block=describe_distilbert,
    ),
    "electra": Family(frozen=("embeddings", "embeddings_project", "encoder")),
    "ernie": Family(),
    "esm": Family(
        frozen=("embeddings", "rotary_embeddings", "encoder", "contact_head"),
        pads_keep_position=True,
        describe_block=describe_esm,
        position_types=(None, "rotary", "absolute"),
    ),
    "eurobert": _EUROBERT,
    "gemma3_text": replace(_LLAMA, key_norm="k_norm", describe_block=None),
    "glm2021": GLMFamily(
        frozen=(
            "word_embeddings",
            "transformer.position_embeddings",
            "transformer.block_position_embeddings",
            "transformer.layers",
            "transformer.final_layernorm",
        ),
        embeddings="word_embeddings",
        encoder="",
        layers="transformer.layers",
        attention="attention",
        query="query_key_value",
        key="query_key_value",
        value="query_key_value",
        describe_block=describe_glm,
        exit="transformer.final_layernorm",
        keeps_positions=True,
    ),
    "gte": _NOMIC,
    "jina_embeddings_v3": _NOMIC,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mobilebert": MobileBertFamily(describe_block=None),
    "modernbert": replace(
        _NOMIC,
        frozen=("embeddings", "rotary_emb", "layers", "final_norm"),
        attention="attn",
        query="Wqkv",
        key="Wqkv",
        value="Wqkv",
        describe_block=describe_modernbert,
        exit="final_norm",
    ),
    "mpnet": MPNetFamily(
        attention="attention.attn",
        query="q",
        key="k",
        value="v",
        pads_keep_position=True,
        describe_block=describe_mpnet,
        find_bias=given_bias,
        layer_output=states_in_tuple,
    ),
    "mt5": _T5,
    "nomic_bert": _NOMIC,
    "qwen2": _LLAMA,
    "qwen3": replace(_LLAMA, key_norm="k_norm"),
    "roberta": Family(pads_keep_position=True),
    "roberta-prelayernorm": Family(
        frozen=("embeddings", "encoder", "LayerNorm"),
        pads_keep_position=True,
        describe_block=describe_pre_norm_roberta,
        exit="LayerNorm",
    ),
    "t5": _T5,
    "umt5": replace(_T5, layer_output=None),
    "xlm-roberta": Family(pads_keep_position=True),
    "xlm-roberta-xl": Family(pads_keep_position=True, describe_block=describe_xlm_roberta_xl),
    "xmod": Family(pads_keep_position=True, describe_block=None, proof_indices=("lang_ids",)),
}


# Options that change what attention computes -> the values with which it is an encoder's.
_SERVED_OPTIONS: dict[str, tuple[object, ...]] = {
    "is_decoder": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "attn_logit_softcapping": (None,),
}
# Rotations whose frequencies follow the longest text of a batch, and of batches before it: neither
# a text's logits nor its loss would be those it has alone.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def supported_types() -> str:
    """The supported model types in one line, for messages."""
    return ", ".join(
        name if family.describe_block else f"{name} (hook)"
        for name, family in sorted(FAMILIES.items())
    )


def find_family(config: PretrainedConfig) -> Family:
    """The row of this configuration's `model_type`.

    Raises:
        ValueError: when there is none; the message lists the supported types.
    """
    model_type = getattr(config, "model_type", None)
    family = FAMILIES.get(model_type)  # type: ignore[arg-type]
    if family is None:
        raise ValueError(f"model_type: expected one of {supported_types()}; got {model_type!r}")
    return family


def check_backbone(backbone: nn.Module) -> None:
    """Check that a backbone is transformers' own and has no option that no family serves.

    Raises:
        ValueError: when its class comes with a checkpoint or from elsewhere, for a `model_type`
            without a family, and for an option, which it names.
    """
    kind = type(backbone)
    is_remote = kind.__module__.startswith("transformers_modules.")
    if is_remote or not any(k.__module__.startswith(KNOWN_CODE) for k in kind.__mro__):
        raise ValueError(
            f"model: expected a backbone of transformers' own code, got {kind.__qualname__} of "
            f"{kind.__module__} (remote code): load it without trust_remote_code, if transformers "
            "has this model"
        )
    family = find_family(backbone.config)  # type: ignore[arg-type]
    if isinstance(getattr(backbone, "decoder", None), nn.Module):
        raise ValueError(f"model: expected an encoder, got a {kind.__name__}, which has a decoder")
    config, options = family.encoder_config(backbone), _SERVED_OPTIONS
    if family.position_types is not None:
        options = {**options, "position_embedding_type": family.position_types}
    for name, served in options.items():
        value = getattr(config, name, None)
        if value not in served:
            raise ValueError(
                f"model: expected an encoder with config.{name} {served[-1]!r}, got {value!r}"
            )
    unserved = family.unserved_option(backbone)
    if unserved is not None:
        raise ValueError(f"model: expected {unserved}")
    for rope_type in _rope_types(config):
        if rope_type in _LENGTH_DEPENDENT_ROPE:
            raise ValueError(
                "model: expected rotations that do not depend on the length of a batch, got "
                f"config.rope_parameters with the rope_type {rope_type!r}"
            )


def _rope_types(config: Any) -> list[object]:
    """The kinds of rotation that a configuration names, for all layers or by kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [
        found.get("rope_type")
        for found in (parameters, *parameters.values())
        if isinstance(found, dict)
    ]
