"""The cache of the layers below the lowest prefix: which examples and weights it is keyed by."""

from pathlib import Path
from typing import Any

from torch import nn

from ptv2_fast.frozen.layer_cache import CachedForward, LayerCache, digest
from ptv2_fast.frozen.layout import Layout
from ptv2_fast.frozen.weights import versions_of
from ptv2_fast.prefix import PTuningV2Config

_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


class ExampleCache:
    """What `cache_frozen_layers` asks for, on one model.

    Args:
        modules: the embeddings and the layers below the lowest prefix.
        lowest: index of the lowest prefixed layer.
        config: of the prefix, with `cache_frozen_layers`.
        model_config: of the model.

    Raises:
        ValueError: when no layer lies below a prefix, or the model has dropout.
    """

    def __init__(
        self, modules: list[nn.Module], lowest: int, config: PTuningV2Config, model_config: Any
    ) -> None:
        if lowest == 0:
            raise ValueError(
                "cache_frozen_layers: expected `layers` without the lowest ones, got a prefix on "
                "layer 0"
            )
        dropouts = {name: getattr(model_config, name, 0.0) for name in _DROPOUTS}
        if any(dropouts.values()):
            raise ValueError(
                f"cache_frozen_layers: expected a model without dropout, got {dropouts}"
            )
        self.lowest = lowest
        self._modules, self._salt_parts = modules, (config.position_offset, lowest)
        place = str(config.cache_frozen_layers)
        self._cache = LayerCache(None if place == "memory" else Path(place))
        self._salt, self._versions = "", ()

    def begin(self, arguments: dict[str, Any], layout: Layout) -> CachedForward | None:
        """Look up the sequences of a forward; None for input that is not token ids alone."""
        input_ids = arguments.get("input_ids")
        if input_ids is None or arguments.get("position_ids") is not None:
            return None
        for module in self._modules:
            for part in module.modules():
                if isinstance(part, nn.Dropout) and part.training and part.p > 0:
                    raise ValueError(
                        f"cache_frozen_layers: expected layers without dropout, got p={part.p}"
                    )
        salt = self._current_salt()
        mask, types = arguments.get("attention_mask"), arguments.get("token_type_ids")
        ids, types = input_ids.cpu(), None if types is None else types.cpu()
        mask = None if mask is None else mask.bool().cpu()
        keys = []
        for row in range(len(ids)):
            attended = slice(None) if mask is None else mask[row]
            parts = [ids[row][attended]] + ([] if types is None else [types[row][attended]])
            keys.append(digest(parts, salt))
        return CachedForward(self._cache, keys, layout)

    def _current_salt(self) -> str:
        parameters = [parameter for module in self._modules for parameter in module.parameters()]
        versions = versions_of(parameters)
        if versions != self._versions:
            self._salt, self._versions = digest(parameters, repr(self._salt_parts)), versions
        return self._salt
