"""How the layers of a family are frozen blocks: their form, and which module has which role."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptv2_fast.encoders.disentangled import has_fused_inputs, score_scale
from ptv2_fast.encoders.own_attention import computes_itself
from ptv2_fast.frozen.modules import BiasSource, BlockModules, DropoutSource
from ptv2_fast.frozen.spec import BlockSpec
from ptv2_fast.frozen.weights import is_plain


class Heads(NamedTuple):
    """What the modules of a layer do not say: those of keys and values, and their width."""

    number: int
    dim: int


# Describes one layer; raises NotServedError.
DescribeBlock = Callable[[Any, Heads], BlockModules]
# (layer, bias that it was given, T) -> its bias for the scores of tokens, [1, H, T, T].
FindBias = Callable[[Any, Tensor | None, int], Tensor | None]
# (states, that bias) -> what transformers' layer returns.
LayerOutput = Callable[[Tensor, Tensor | None], Any]


class NotServedError(Exception):
    """Why a layer is no frozen block."""


def describe_bert(layer: Any, heads: Heads) -> BlockModules:
    """BERT, and who has its modules."""
    attention, attention_output = layer.attention.self, layer.attention.output
    return BlockModules(
        BlockSpec(activation=_activation(layer.intermediate.intermediate_act_fn)),
        *heads,
        inputs=(attention.query, attention.key, attention.value),
        attention_output=attention_output.dense,
        up=(layer.intermediate.dense,),
        down=layer.output.dense,
        first_norm=attention_output.LayerNorm,
        second_norm=layer.output.LayerNorm,
        attention_dropout=DropoutSource(attention.dropout),
        attention_output_dropout=DropoutSource(attention_output.dropout),
        output_dropout=DropoutSource(layer.output.dropout),
    )


def describe_distilbert(layer: Any, heads: Heads) -> BlockModules:
    """DistilBERT; its attention's output has no dropout."""
    attention, network = layer.attention, layer.ffn
    return BlockModules(
        BlockSpec(activation=_activation(network.activation)),
        *heads,
        inputs=(attention.q_lin, attention.k_lin, attention.v_lin),
        attention_output=attention.out_lin,
        up=(network.lin1,),
        down=network.lin2,
        first_norm=layer.sa_layer_norm,
        second_norm=layer.output_layer_norm,
        attention_dropout=DropoutSource(attention.dropout),
        output_dropout=DropoutSource(network.dropout),
    )


def describe_albert(layer: Any, heads: Heads) -> BlockModules:
    """ALBERT; its feed-forward network has no dropout."""
    attention = layer.attention
    return BlockModules(
        BlockSpec(activation=_activation(layer.activation)),
        *heads,
        inputs=(attention.query, attention.key, attention.value),
        attention_output=attention.dense,
        up=(layer.ffn,),
        down=layer.ffn_output,
        first_norm=attention.LayerNorm,
        second_norm=layer.full_layer_layer_norm,
        attention_dropout=DropoutSource(attention.attention_dropout),
        attention_output_dropout=DropoutSource(attention.output_dropout),
    )


def describe_pre_norm_roberta(layer: Any, heads: Heads) -> BlockModules:
    """RoBERTa-PreLayerNorm."""
    first_norm, second_norm = layer.attention.LayerNorm, layer.intermediate.LayerNorm
    activation = _activation(layer.intermediate.intermediate_act_fn)
    return _pre_norm_bert(layer, heads, activation, first_norm, second_norm)


def describe_xlm_roberta_xl(layer: Any, heads: Heads) -> BlockModules:
    """XLM-RoBERTa-XL."""
    first_norm, second_norm = layer.attention.self_attn_layer_norm, layer.LayerNorm
    activation = _activation(layer.intermediate.intermediate_act_fn)
    return _pre_norm_bert(layer, heads, activation, first_norm, second_norm)


def describe_esm(layer: Any, heads: Heads) -> BlockModules:
    """ESM, with a table of positions or rotary ones."""
    return _pre_norm_bert(layer, heads, "gelu", layer.attention.LayerNorm, layer.LayerNorm)


def _pre_norm_bert(
    layer: Any, heads: Heads, activation: str, first_norm: nn.Module, second_norm: nn.Module
) -> BlockModules:
    """BERT's modules with their norms in front."""
    attention, attention_output = layer.attention.self, layer.attention.output
    is_rotary = getattr(attention, "position_embedding_type", None) == "rotary"
    return BlockModules(
        BlockSpec(pre_norm=True, activation=activation, rotary="half" if is_rotary else None),
        *heads,
        inputs=(attention.query, attention.key, attention.value),
        attention_output=attention_output.dense,
        up=(layer.intermediate.dense,),
        down=layer.output.dense,
        first_norm=first_norm,
        second_norm=second_norm,
        attention_dropout=_dropout(attention, "dropout"),
        attention_output_dropout=DropoutSource(attention_output.dropout),
        output_dropout=DropoutSource(getattr(layer.output, "dropout", None)),
    )


def describe_glm(layer: Any, heads: Heads) -> BlockModules:
    """GLM (2021)."""
    attention, network = layer.attention, layer.mlp
    return BlockModules(
        BlockSpec(pre_norm=True, activation=_activation(network.activation)),
        *heads,
        inputs=(attention.query_key_value,),
        attention_output=attention.dense,
        up=(network.dense_h_to_4h,),
        down=network.dense_4h_to_h,
        first_norm=layer.input_layernorm,
        second_norm=layer.post_attention_layernorm,
        attention_dropout=DropoutSource(attention.attention_dropout),
        attention_output_dropout=DropoutSource(attention.output_dropout),
        output_dropout=DropoutSource(network.dropout),
    )


def describe_modernbert(layer: Any, heads: Heads) -> BlockModules:
    """ModernBERT: fused products, gated, rotary, windows; no norm in front of the first layer."""
    attention, network = layer.attn, layer.mlp
    # Its window is that of flash attention, one more than the distance at which a token is visible.
    window = attention.sliding_window
    spec = BlockSpec(
        pre_norm=True,
        activation=_activation(network.act),
        gate="first",
        rotary="half",
        window=None if window is None else window - 1,
    )
    return BlockModules(
        spec,
        *heads,
        inputs=(attention.Wqkv,),
        attention_output=attention.Wo,
        up=(network.Wi,),
        down=network.Wo,
        first_norm=None if isinstance(layer.attn_norm, nn.Identity) else layer.attn_norm,
        second_norm=layer.mlp_norm,
        attention_dropout=DropoutSource(attention, "attention_dropout"),
        attention_output_dropout=_of_dropout_module(attention.out_drop),
        activation_dropout=DropoutSource(network.drop),
    )


def describe_nomic_bert(layer: Any, heads: Heads) -> BlockModules:
    """NomicBERT and GTE (gated), Jina embeddings v3 (plain): post-norm, rotary."""
    attention, network = layer.self_attn, layer.mlp
    is_gated = hasattr(network, "gate_proj")
    act = network.act_fn if is_gated else network.activation_fn
    return BlockModules(
        BlockSpec(activation=_activation(act), gate="first" if is_gated else None, rotary="half"),
        *heads,
        inputs=(attention.q_proj, attention.k_proj, attention.v_proj),
        attention_output=attention.o_proj,
        up=(network.gate_proj, network.up_proj) if is_gated else (network.fc1,),
        down=network.down_proj if is_gated else network.fc2,
        first_norm=layer.post_attention_layernorm,
        second_norm=layer.post_mlp_layernorm,
        attention_dropout=DropoutSource(attention, "attention_dropout"),
        attention_output_dropout=DropoutSource(layer.post_attention_dropout),
        activation_dropout=DropoutSource(getattr(network, "dropout", None)),
        output_dropout=DropoutSource(layer.post_mlp_dropout),
    )


def describe_llama(layer: Any, heads: Heads) -> BlockModules:
    """Llama and who has its modules: RMSNorm, gated, rotary, grouped heads.

    EuroBERT's attention sees both sides, Qwen3's normalises queries and keys.
    """
    attention, network = layer.self_attn, layer.mlp
    holder = attention if hasattr(attention, "sliding_window") else attention.config
    window = getattr(holder, "sliding_window", None)
    spec = BlockSpec(
        pre_norm=True,
        subtract_mean=False,
        activation=_activation(network.act_fn),
        gate="first",
        rotary="half",
        is_causal=attention.is_causal,
        window=None if window is None else window - 1,
    )
    return BlockModules(
        spec,
        *heads,
        inputs=(attention.q_proj, attention.k_proj, attention.v_proj),
        attention_output=attention.o_proj,
        up=(network.gate_proj, network.up_proj),
        down=network.down_proj,
        first_norm=layer.input_layernorm,
        second_norm=layer.post_attention_layernorm,
        attention_dropout=DropoutSource(attention, "attention_dropout"),
        head_norms=(attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else (),
    )


def describe_mpnet(layer: Any, heads: Heads) -> BlockModules:
    """MPNet: BERT with a bias for the scores."""
    attention = layer.attention.attn
    return BlockModules(
        BlockSpec(activation=_activation(layer.intermediate.intermediate_act_fn)),
        *heads,
        inputs=(attention.q, attention.k, attention.v),
        attention_output=attention.o,
        up=(layer.intermediate.dense,),
        down=layer.output.dense,
        first_norm=layer.attention.LayerNorm,
        second_norm=layer.output.LayerNorm,
        attention_dropout=DropoutSource(attention.dropout),
        attention_output_dropout=DropoutSource(layer.attention.dropout),
        output_dropout=DropoutSource(layer.output.dropout),
    )


def describe_deberta(layer: Any, heads: Heads) -> BlockModules:
    """DeBERTa v1, v2 and v3: BERT with disentangled attention, v1's with one fused product."""
    attention, attention_output = layer.attention.self, layer.attention.output
    is_fused, biases = has_fused_inputs(attention), None
    inputs: tuple[nn.Linear, ...]
    if is_fused:
        if not is_plain(attention.in_proj):
            kind = type(attention.in_proj).__qualname__
            raise NotServedError(f"the product of query, key and value is a {kind}, not a Linear")
        inputs, biases = (attention.in_proj,), BiasSource(attention, ("q_bias", None, "v_bias"))
    else:
        inputs = (attention.query_proj, attention.key_proj, attention.value_proj)
    return BlockModules(
        BlockSpec(
            activation=_activation(layer.intermediate.intermediate_act_fn),
            scale=score_scale(attention),
            by_head=is_fused,
        ),
        *heads,
        inputs=inputs,
        attention_output=attention_output.dense,
        up=(layer.intermediate.dense,),
        down=layer.output.dense,
        first_norm=attention_output.LayerNorm,
        second_norm=layer.output.LayerNorm,
        attention_dropout=DropoutSource(attention.dropout),
        attention_output_dropout=DropoutSource(attention_output.dropout),
        output_dropout=DropoutSource(layer.output.dropout),
        input_biases=biases,
    )


def describe_t5(layer: Any, heads: Heads) -> BlockModules:
    """The encoders of T5, mT5 and UMT5: RMSNorm, a bias for the scores, which are not scaled."""
    (first, second), network = layer.layer, layer.layer[1].DenseReluDense
    attention = first.SelfAttention
    if computes_itself(attention):  # whose layers also return and checkpoint in other ways
        raise NotServedError("this version of transformers computes T5's attention itself")
    if attention.q.weight.dtype == torch.float16:
        raise NotServedError("its states are clamped in float16")
    is_gated = hasattr(network, "wi_0")
    spec = BlockSpec(
        pre_norm=True,
        subtract_mean=False,
        activation=_activation(network.act),
        gate="first" if is_gated else None,
        scale=1.0,
    )
    return BlockModules(
        spec,
        *heads,
        inputs=(attention.q, attention.k, attention.v),
        attention_output=attention.o,
        up=(network.wi_0, network.wi_1) if is_gated else (network.wi,),
        down=network.wo,
        first_norm=first.layer_norm,
        second_norm=second.layer_norm,
        attention_dropout=DropoutSource(attention, "dropout"),
        attention_output_dropout=DropoutSource(first.dropout),
        activation_dropout=DropoutSource(network.dropout),
        output_dropout=DropoutSource(second.dropout),
    )


def given_bias(layer: Any, given: Tensor | None, tokens: int) -> Tensor | None:
    """MPNet's bias, [1, H, T, T], which transformers has copied for each sequence."""
    return None if given is None else given[:1]


def shared_bias(layer: Any, given: Tensor | None, tokens: int) -> Tensor | None:
    """T5's, of the first layer, which the others are given; UMT5's, of each layer."""
    attention = layer.layer[0].SelfAttention
    if given is not None or not attention.has_relative_attention_bias:
        return given
    device = attention.relative_attention_bias.weight.device
    return attention.compute_bias(tokens, tokens, device=device)


def states_in_tuple(states: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """What a layer of MPNet returns."""
    return (states,)


def states_and_no_probabilities(states: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
    """What a layer of DeBERTa returns."""
    return states, None


def states_and_bias(states: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a layer of T5 returns: states, its bias, that of another attention."""
    return states, bias, None


def _dropout(module: nn.Module, name: str) -> DropoutSource:
    """Of a module's attribute, a module itself or a number."""
    dropout = getattr(module, name)
    is_module = isinstance(dropout, nn.Module)
    return DropoutSource(dropout) if is_module else DropoutSource(module, name)


def _of_dropout_module(module: nn.Module) -> DropoutSource:
    return DropoutSource(None if isinstance(module, nn.Identity) else module)


_ACTIVATIONS = {  # classes of torch and transformers -> the name in ops/activations.py
    "FastGELUActivation": "gelu_tanh",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}


def _activation(module: object) -> str:
    kind = type(module)
    name = _ACTIVATIONS.get(kind.__name__)
    if not kind.__module__.startswith(("torch.nn.", "transformers.")) or name is None:
        served = ", ".join(sorted(set(_ACTIVATIONS.values())))
        raise NotServedError(f"expected an activation among {served}, got {module}")
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return "gelu_tanh"
    return name
