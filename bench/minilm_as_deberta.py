"""all-MiniLM-L6-v2 in DeBERTa-v2's form: trained weights behind live position terms.

No small DeBERTa is at hand. The content's weights are MiniLM's, exactly; the relative positions'
table and projections are random, so that every term of the scores is live, but none is pretrained.
"""

import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, DebertaV2Config, DebertaV2Model

SPAN = 64  # of relative positions
TABLE_STD, PROJECTION_STD = 0.5, 0.02
SEED = 0


def as_deberta_v2(state: dict[str, Tensor], span: int) -> dict[str, Tensor]:
    """A BERT's weights under DeBERTa-v2's names, [2 * span, hidden] positions, their terms zero.

    With both terms DeBERTa divides scores by sqrt(3 head_dim), not by sqrt(head_dim).
    """
    zeros = torch.zeros_like(state["encoder.layer.0.attention.self.query.weight"])
    new = {"encoder.rel_embeddings.weight": torch.randn(2 * span, len(zeros)) * TABLE_STD}
    for name, tensor in state.items():
        attention, own, kind = name.partition("attention.self.")
        if not own:
            new[name] = tensor
            continue
        projection, _, kind = kind.partition(".")
        factor = math.sqrt(3) if projection == "query" else 1
        new[f"{attention}{own}{projection}_proj.{kind}"] = tensor * factor
        for term in ("pos_key_proj", "pos_query_proj"):
            new[f"{attention}{own}{term}.{kind}"] = zeros if kind == "weight" else zeros[0]
    return new


def write_model(source: Path, folder: Path) -> None:
    """Write configuration, weights and tokenizer of the new form of the MiniLM in `source`."""
    torch.manual_seed(SEED)
    bert = AutoModel.from_pretrained(source, add_pooling_layer=False)
    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "intermediate_size", "hidden_act", "max_position_embeddings", "type_vocab_size",
        "layer_norm_eps", "pad_token_id",
    )  # fmt: skip
    config = DebertaV2Config(
        **{name: getattr(bert.config, name) for name in same},
        relative_attention=True, position_biased_input=True, pos_att_type=["c2p", "p2c"],
        share_att_key=False, position_buckets=-1, max_relative_positions=SPAN, norm_rel_ebd="none",
    )  # fmt: skip
    model = DebertaV2Model(config)
    state = as_deberta_v2(bert.state_dict(), SPAN)
    for name, tensor in state.items():
        if "pos_" in name and name.endswith("proj.weight"):
            state[name] = torch.randn_like(tensor) * PROJECTION_STD
    model.load_state_dict(state)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
