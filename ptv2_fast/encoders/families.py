"""The encoders that can carry a prefix: one row per `model_type` of transformers."""

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """Where the parts of a backbone are, as dotted names relative to it or to one layer.

    `frozen` lists what P-Tuning v2 leaves untouched; what lies outside is trained and saved.
    `pads_keep_position`: pad tokens stand at `pad_token_id` and the others are counted from
    `pad_token_id + 1` (fairseq's rule), instead of every column standing at its index.
    `post_layer_norm`: the layers are those of BERT in all their parts, which frozen blocks serve.
    """

    frozen: tuple[str, ...] = ("embeddings", "encoder")
    embeddings: str = "embeddings"
    encoder: str = "encoder"
    layers: str = "encoder.layer"
    attention: str = "attention.self"
    query: str = "query"
    key: str = "key"
    value: str = "value"
    pads_keep_position: bool = False
    post_layer_norm: bool = True

    def max_positions(self, config: PretrainedConfig) -> int:
        """Longest input, in tokens, that the position table of the backbone serves."""
        reserved = config.pad_token_id + 1 if self.pads_keep_position else 0
        return config.max_position_embeddings - reserved

    def layer_modules(self, backbone: nn.Module) -> list[nn.Module]:
        """The encoder layers in order."""
        return list(backbone.get_submodule(self.layers).children())


FAMILIES: dict[str, Family] = {
    "bert": Family(),
    "roberta": Family(pads_keep_position=True),
    "xlm-roberta": Family(pads_keep_position=True),
    "electra": Family(frozen=("embeddings", "embeddings_project", "encoder")),
}


def find_family(config: PretrainedConfig) -> Family:
    """The row of this configuration's `model_type`.

    Raises:
        ValueError: when there is none; the message lists the supported types.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"model_type: expected one of {sorted(FAMILIES)}, got {config.model_type!r}"
        )
    return family
