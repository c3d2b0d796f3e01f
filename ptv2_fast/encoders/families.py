"""The encoders that can carry a prefix: one row per `model_type` of transformers."""

import inspect
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

# How many positions a cache takes: the newest name first.
_OFFSET_ARGUMENTS = ("cache_length", "past_key_values_length")


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
        """Longest input, in tokens, that the position table of the backbone serves.

        Raises:
            ValueError: when the configuration does not say how long the table is.
        """
        return _integer(config, "max_position_embeddings") - self.first_position(config)

    def first_position(self, config: PretrainedConfig) -> int:
        """Row of the position table at which the first token stands."""
        return _integer(config, "pad_token_id") + 1 if self.pads_keep_position else 0

    def offset_argument(self, backbone: nn.Module) -> str:
        """The argument of the embeddings' forward that shifts the positions of all tokens.

        Raises:
            ValueError: when the forward takes none of the names that versions of transformers use.
        """
        embeddings = backbone.get_submodule(self.embeddings)
        arguments = inspect.signature(embeddings.forward).parameters
        for name in _OFFSET_ARGUMENTS:
            if name in arguments:
                return name
        raise ValueError(
            "position_offset: expected 'none' for embeddings whose positions cannot be shifted, "
            f"got 'prefix' for a {type(embeddings).__name__} that takes none of "
            f"{list(_OFFSET_ARGUMENTS)}"
        )

    def layer_modules(self, backbone: nn.Module) -> list[nn.Module]:
        """The encoder layers in order."""
        return list(backbone.get_submodule(self.layers).children())


FAMILIES: dict[str, Family] = {
    "bert": Family(),
    "roberta": Family(pads_keep_position=True),
    "xlm-roberta": Family(pads_keep_position=True),
    "electra": Family(frozen=("embeddings", "embeddings_project", "encoder")),
}


# Options that change what attention computes -> the values with which it is an encoder's.
_SERVED_OPTIONS: dict[str, tuple[object, ...]] = {
    "is_decoder": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "position_embedding_type": (None, "absolute"),
}


def find_family(config: PretrainedConfig) -> Family:
    """The row of this configuration's `model_type`.

    Raises:
        ValueError: when there is none; the message lists the supported types.
    """
    model_type = getattr(config, "model_type", None)
    family = FAMILIES.get(model_type)  # type: ignore[arg-type]
    if family is None:
        raise ValueError(f"model_type: expected one of {sorted(FAMILIES)}, got {model_type!r}")
    return family


def check_backbone(backbone: nn.Module) -> None:
    """Check that a backbone is transformers' own and has no option that no family serves.

    Raises:
        ValueError: when its class comes with a checkpoint or from elsewhere, for a `model_type`
            without a family, and for an option, which it names.
    """
    kind = type(backbone)
    is_remote = kind.__module__.startswith("transformers_modules.")
    if is_remote or not any(k.__module__.startswith("transformers.models.") for k in kind.__mro__):
        raise ValueError(
            f"model: expected a backbone of transformers' own code, got {kind.__qualname__} of "
            f"{kind.__module__} (remote code): load it without trust_remote_code, if transformers "
            "has this model"
        )
    config = backbone.config
    find_family(config)  # type: ignore[arg-type]
    for name, served in _SERVED_OPTIONS.items():
        value = getattr(config, name, None)
        if value not in served:
            raise ValueError(
                f"model: expected an encoder with config.{name} {served[-1]!r}, got {value!r}"
            )


def _integer(config: PretrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise ValueError(f"model: expected an integer config.{name}, got {value!r}")
    return value
