"""The configuration of P-Tuning v2 and the module that holds its trainable prefix (torch only)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_INIT_STD = 0.02
_POSITION_OFFSETS = ("none", "prefix")
_INITS = ("normal", "tokens")
_BACKBONES = ("auto", "frozen", "hook")
_RECOMPUTE_POLICIES = ("none", "ffn", "ffn+qkv", "block")
# How a model runs, not what its adapter is: adapters do not keep these.
EXECUTION_FIELDS = (
    "backbone",
    "recompute",
    "memory_budget",
    "backbone_dtype",
    "strict",
)
_BACKBONE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _expect(condition: bool, name: str, expected: str, actual: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {actual!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_str_list(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


@dataclasses.dataclass(frozen=True)
class PTuningV2Config:
    """What to attach to an encoder; fields that PEFT has too keep PEFT's name and meaning.

    Args:
        num_virtual_tokens: length P of the prefix, at least 1; or 0 where something else trains
            inside the layers (`train_biases`, `train_norms`, `low_rank`).
        prefix_projection: compute the prefix by Embedding -> Linear -> Tanh -> Linear instead of
            storing it as a table.
        encoder_hidden_size: width of that MLP; None = the encoder's hidden size.
        task_type: PEFT's name of the task ("SEQ_CLS", "TOKEN_CLS", ...); recorded, not interpreted.
        modules_to_save: names of backbone modules that are trained and saved too. What lies outside
            the embeddings and the encoder layers (head, pooler) always is.
        inference_mode: nothing is trainable.
        prefix_dropout: element-wise dropout on the prefix in training, one mask per sequence.
        layers: indices of the layers that get a prefix; None = all of them.
        position_offset: "none", or "prefix" = the first token stands at position P, as in the
            authors' code and in PEFT.
        init: "normal" = N(0, 0.02), or "tokens" = keys and values of real tokens.
        prefix_gate: train a gate beside the prefix, one number for each layer and head of keys, by
            which the weights of all prefix columns are multiplied in the softmax: the logit offset
            log(gate). It starts at 0, so that before the first step the model is the one without a
            prefix (a prefix of zeros is not: it takes its share of the softmax). Like the zero-init
            attention of LLaMA-Adapter (Zhang et al. 2023), but inside of one softmax.
        train_biases: train the biases of the linear layers inside the prefixed encoder layers too
            (BitFit, Ben Zaken et al. 2022; not part of P-Tuning v2). The backbone keeps its own:
            the trained ones are float32 copies that lie with the prefix and stand in for them.
            DeBERTa's queries, keys and values keep theirs, which its tables of positions hold too.
        train_norms: likewise the weights and biases of the norms inside these layers.
        low_rank: rank of an update of the matrices of the linear layers in these layers, which
            trains too (LoRA, Hu et al. 2022, without its dropout); None = none. It starts at zero.
        low_rank_alpha: the update is scaled by this over the rank; None = twice the rank.
        low_rank_targets: the layers that get one, by their names or ends of these; None = all.
        backbone: how the encoder layers run. "frozen": as frozen blocks, without padding, keeping
            only what the prefix's gradient needs; a model that cannot is an error. "hook": as
            transformers runs them, with the prefix in their attention. "auto": frozen where the
            model allows it, else hook, with a warning that says why.
        recompute: what a frozen block computes again in the backward pass rather than keep: "none",
            "ffn", "ffn+qkv" or "block", each less memory and more time than the one before.
        memory_budget: bytes that the blocks may keep and need in a step, instead of `recompute`:
            each layer gets a policy so that the batch at hand fits.
        backbone_dtype: "bf16" or "fp16" converts the frozen weights; prefix and head stay as they
            are. `detach` converts back, to rounded weights.
        strict: raise a ValueError wherever "auto" and "frozen" would fall back to "hook".

    Raises:
        ValueError: naming the field, what was expected and what was given.
    """

    num_virtual_tokens: int = 20
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    task_type: str | None = None
    modules_to_save: tuple[str, ...] | None = None
    inference_mode: bool = False
    prefix_dropout: float = 0.0
    layers: tuple[int, ...] | None = None
    position_offset: str = "none"
    init: str = "normal"
    prefix_gate: bool = False
    train_biases: bool = False
    train_norms: bool = False
    low_rank: int | None = None
    low_rank_alpha: float | None = None
    low_rank_targets: tuple[str, ...] | None = None
    backbone: str = "auto"
    recompute: str = "none"
    memory_budget: int | None = None
    backbone_dtype: str | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        length, width, dropout = (
            self.num_virtual_tokens,
            self.encoder_hidden_size,
            self.prefix_dropout,
        )
        has_more = self.train_biases or self.train_norms or self.low_rank is not None
        least = "an integer >= 1" if not has_more else "an integer >= 0"
        _expect(_is_int(length) and length >= (not has_more), "num_virtual_tokens", least, length)
        for name in ("prefix_projection", "inference_mode", "prefix_gate", "train_biases",
                     "train_norms", "strict"):  # fmt: skip
            value = getattr(self, name)
            _expect(isinstance(value, bool), name, "True or False", value)
        _expect(width is None or (_is_int(width) and width >= 1), "encoder_hidden_size",
                "None or an integer >= 1", width)  # fmt: skip
        _expect(self.task_type is None or isinstance(self.task_type, str), "task_type",
                "None or a string", self.task_type)  # fmt: skip
        _expect(isinstance(dropout, int | float) and 0 <= dropout < 1, "prefix_dropout",
                "a probability in [0, 1)", dropout)  # fmt: skip
        _expect(self.position_offset in _POSITION_OFFSETS, "position_offset",
                f"one of {_POSITION_OFFSETS}", self.position_offset)  # fmt: skip
        _expect(self.init in _INITS, "init", f"one of {_INITS}", self.init)
        _expect(self.init != "tokens" or length > 0, "init", "'normal' without a prefix", self.init)
        _expect(not self.prefix_gate or length > 0, "prefix_gate", "False without a prefix", True)
        _expect(self.init != "tokens" or not self.prefix_projection, "init",
                "'normal' with prefix_projection=True (an MLP cannot start at given values)",
                self.init)  # fmt: skip
        _expect(self.backbone in _BACKBONES, "backbone", f"one of {_BACKBONES}", self.backbone)
        _expect(self.recompute in _RECOMPUTE_POLICIES, "recompute",
                f"one of {_RECOMPUTE_POLICIES}", self.recompute)  # fmt: skip
        budget = self.memory_budget
        _expect(budget is None or (_is_int(budget) and budget > 0), "memory_budget",
                "None or a number of bytes > 0", budget)  # fmt: skip
        _expect(budget is None or self.recompute == "none", "recompute",
                "'none' with a memory_budget, which chooses", self.recompute)  # fmt: skip
        _expect(self.backbone_dtype is None or self.backbone_dtype in _BACKBONE_DTYPES,
                "backbone_dtype", f"None or one of {tuple(_BACKBONE_DTYPES)}",
                self.backbone_dtype)  # fmt: skip
        rank, alpha, targets = self.low_rank, self.low_rank_alpha, self.low_rank_targets
        _expect(rank is None or (_is_int(rank) and rank >= 1), "low_rank",
                "None or an integer >= 1", rank)  # fmt: skip
        has_rank = rank is not None
        _expect(alpha is None
                or (has_rank and isinstance(alpha, int | float) and 0 < alpha < math.inf),
                "low_rank_alpha", "None, or a number > 0 with low_rank", alpha)  # fmt: skip
        _expect(targets is None or (has_rank and _is_str_list(targets) and len(targets) > 0),
                "low_rank_targets", "None, or a list of names of linear layers with low_rank",
                targets)  # fmt: skip
        names, layers = self.modules_to_save, self.layers
        _expect(names is None or _is_str_list(names), "modules_to_save",
                "None or a list of module names", names)  # fmt: skip
        _expect(layers is None or (isinstance(layers, list | tuple) and len(layers) > 0
                and all(_is_int(layer) and layer >= 0 for layer in layers)
                and len(set(layers)) == len(layers)), "layers",
                "None or a non-empty list of distinct layer indices >= 0", layers)  # fmt: skip
        object.__setattr__(self, "modules_to_save", None if names is None else tuple(names))
        object.__setattr__(self, "low_rank_targets", None if targets is None else tuple(targets))
        object.__setattr__(self, "layers", None if layers is None else tuple(sorted(layers)))

    @property
    def torch_backbone_dtype(self) -> torch.dtype | None:
        """`backbone_dtype` as torch names it."""
        return None if self.backbone_dtype is None else _BACKBONE_DTYPES[self.backbone_dtype]

    @property
    def alpha(self) -> float | None:
        """By what over the rank the updates are scaled; None without."""
        if self.low_rank_alpha is not None or self.low_rank is None:
            return self.low_rank_alpha
        return 2 * self.low_rank

    def resolve_layers(self, num_layers: int) -> tuple[int, ...]:
        """Ascending indices of the prefixed layers of an encoder with `num_layers` layers.

        Raises:
            ValueError: when an index is out of range; the message names the range.
        """
        layers = tuple(range(num_layers)) if self.layers is None else self.layers
        served = f"indices in the range 0..{num_layers - 1} of this encoder"
        _expect(layers[-1] < num_layers, "layers", served, list(layers))
        return layers

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    def tensor_shapes(
        self, *, num_layers: int, num_heads: int, head_dim: int
    ) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the weights of this prefix's `PrefixEncoder`, without making one.

        Raises:
            ValueError: when `layers` is out of range.
        """
        hidden = num_heads * head_dim
        num_prefixed = len(self.resolve_layers(num_layers))
        table_width = 2 * num_prefixed * hidden
        gate = {"gate": (num_prefixed, num_heads)} if self.prefix_gate else {}
        if not self.prefix_projection:
            return {**gate, "embedding.weight": (self.num_virtual_tokens, table_width)}
        width = self.encoder_hidden_size or hidden
        return {
            **gate,
            "embedding.weight": (self.num_virtual_tokens, hidden),
            "projection.0.weight": (width, hidden),
            "projection.0.bias": (width,),
            "projection.2.weight": (table_width, width),
            "projection.2.bias": (table_width,),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PTuningV2Config":
        """The inverse of `to_dict`; missing fields take their defaults.

        Raises:
            ValueError: naming the keys that are no fields, or the field with a bad value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"PTuningV2Config: unknown keys {unknown}; the known ones are {known}")
        return cls(**values)


class LayerPrefix(NamedTuple):
    """The prefix of one layer."""

    key: Tensor  # [H, P, D]
    value: Tensor  # [H, P, D]
    gate: Tensor | None = None  # [H], at least 0

    def query_gate(self, heads: int) -> Tensor | None:
        """The gate of each of `heads` query heads, which share those of keys: [heads]."""
        return _of_query_heads(self.gate, heads)

    @property
    def prefix_index(self) -> None:
        """Every sequence reads this prefix."""
        return None

    @property
    def prefix_lengths(self) -> None:
        """All of its columns exist."""
        return None


class BankPrefix(NamedTuple):
    """The prefixes of one layer of which each sequence of a batch reads one."""

    key: Tensor  # [R, H, P, D]
    value: Tensor  # [R, H, P, D]
    gate: Tensor | None  # [R, H], at least 0
    prefix_index: Tensor  # int32 [B], the row that each sequence reads
    prefix_lengths: Tensor  # int32 [R], the columns that exist

    def query_gate(self, heads: int) -> Tensor | None:
        """The gate of each of `heads` query heads, which share those of keys: [R, heads]."""
        return _of_query_heads(self.gate, heads)


def _of_query_heads(gate: Tensor | None, heads: int) -> Tensor | None:
    if gate is None or gate.shape[-1] == heads:
        return gate
    return gate.repeat_interleave(heads // gate.shape[-1], dim=-1)


class PrefixEncoder(nn.Module):
    """The trainable prefix of L' layers: a table, or an embedding and an MLP that compute it.

    Row p of the table [P, 2 * L' * H * D] reshapes to (L', 2, H, D), key then value: the layout of
    the authors' code and of PEFT. Only the prefixed layers are stored. Weights are drawn from
    N(0, 0.02), biases are 0, all in float32; conversions to a narrower dtype move the module but
    leave it in its dtype, so that a float32 master survives `model.to(torch.bfloat16)`.

    With `config.prefix_gate` there is also the parameter `gate` [L', H], which starts at 0. Its
    absolute value multiplies the prefix's weights in the softmax.

    - The parameter is the factor and not its logarithm. The gradient of a logarithm vanishes with
      the factor: 1e-13 at -30, far below Adam's epsilon of 1e-8. The factor's own gradient at 0 is
      of ordinary size, so that tens of steps with a learning rate of 0.01 open the gate.
    - The gradient of the prefix is that of an open one times the gate, which Adam's scaling takes
      out again.
    - A gate that a step pushes below 0 opens on the other side: none stays shut, where its prefix
      would get no gradient.

    Args:
        config: see `PTuningV2Config`.
        num_layers: layers of the encoder, prefixed or not.
        num_heads, head_dim: H and D of its attention.

    Raises:
        ValueError: when `config.layers` is out of range.
    """

    def __init__(
        self, config: PTuningV2Config, *, num_layers: int, num_heads: int, head_dim: int
    ) -> None:
        super().__init__()
        self.config = config
        self.num_layers, self.num_heads, self.head_dim = num_layers, num_heads, head_dim
        self.layers = config.resolve_layers(num_layers)
        hidden = num_heads * head_dim
        table_width = 2 * len(self.layers) * hidden
        self.projection: nn.Sequential | None = None
        embedding_width = table_width
        if config.prefix_projection:
            embedding_width, width = hidden, config.encoder_hidden_size or hidden
            self.projection = nn.Sequential(
                nn.Linear(hidden, width), nn.Tanh(), nn.Linear(width, table_width)
            )
        self.embedding = nn.Embedding(config.num_virtual_tokens, embedding_width)
        self.gate: nn.Parameter | None = None
        if config.prefix_gate:
            self.gate = nn.Parameter(torch.empty(len(self.layers), num_heads))
        self.to(torch.float32)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the prefix anew: weights from N(0, 0.02), biases of the MLP and the gate 0.

        What else an attached encoder trains stays: it belongs to the backbone's layers.
        """
        for name, parameter in self.named_parameters():
            if not name.startswith(("projection.", "embedding.", "gate")):
                continue
            if name.endswith(("bias", "gate")):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=_INIT_STD)

    def table(self) -> Tensor:
        """The prefix as a table [P, 2 * L' * H * D]."""
        rows = self.embedding.weight
        return rows if self.projection is None else self.projection(rows)

    def forward(self) -> Tensor:
        """The prefix [L', 2, H, P, D]; the key or value of one layer is a contiguous view."""
        return self._rows().permute(1, 2, 3, 0, 4).contiguous()

    def layer_prefixes(self) -> dict[int, LayerPrefix]:
        """Layer index -> its prefix; computed once for all."""
        return self._by_layer(self())

    def layer_views(self) -> dict[int, LayerPrefix]:
        """The same as views of the table, whose columns lie apart: nothing is copied."""
        return self._by_layer(self._rows().permute(1, 2, 3, 0, 4))

    def _rows(self) -> Tensor:
        """The table as [P, L', 2, H, D]."""
        length, layers = self.config.num_virtual_tokens, len(self.layers)
        return self.table().view(length, layers, 2, self.num_heads, self.head_dim)

    def _by_layer(self, prefix: Tensor) -> dict[int, LayerPrefix]:
        """Of the prefix [L', 2, H, P, D]."""
        # One unbind has one stack as its backward; indexing would add up 2 L' zero-filled tensors.
        parts = prefix.flatten(0, 1).unbind(0)
        gates: tuple[Tensor | None, ...] = (None,) * len(self.layers)
        if self.gate is not None:
            # Not abs(), whose gradient at 0 is 0.
            gates = torch.where(self.gate < 0, -self.gate, self.gate).unbind(0)
        return {
            layer: LayerPrefix(parts[2 * i], parts[2 * i + 1], gates[i])
            for i, layer in enumerate(self.layers)
        }

    @torch.no_grad()
    def set_layers(self, prefix: Tensor) -> None:
        """Overwrite the table by `prefix` [L', 2, H, P, D], the layout `forward` returns.

        Raises:
            ValueError: with `prefix_projection`, or when the shape differs.
        """
        _expect(self.projection is None, "prefix_projection", "False to set the table",
                True)  # fmt: skip
        expected = (len(self.layers), 2, self.num_heads, self.config.num_virtual_tokens,
                    self.head_dim)  # fmt: skip
        _expect(tuple(prefix.shape) == expected, "prefix", f"shape {list(expected)}",
                list(prefix.shape))  # fmt: skip
        rows = prefix.permute(3, 0, 1, 2, 4)
        self.embedding.weight.copy_(rows.reshape(self.embedding.weight.shape))

    def fold(self) -> "PrefixEncoder":
        """A new encoder that stores the same prefix as a plain table, without an MLP."""
        config = dataclasses.replace(self.config, prefix_projection=False)
        folded = PrefixEncoder(config, num_layers=self.num_layers, num_heads=self.num_heads,
                               head_dim=self.head_dim)  # fmt: skip
        table = self.table().detach()
        folded.to(device=table.device)
        with torch.no_grad():
            folded.embedding.weight.copy_(table)
            if self.gate is not None and folded.gate is not None:
                folded.gate.copy_(self.gate)
        folded.requires_grad_(self.embedding.weight.requires_grad)
        return folded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PrefixEncoder":
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrower = moved.is_floating_point() and moved.element_size() < tensor.element_size()
            return tensor.to(moved.device) if narrower else moved

        return super()._apply(keep_dtype, recurse)
