"""What a training step with a prefix needs in memory, from a model without weights.

A model on the meta device takes no memory: one that fits nowhere here can be asked.
"""

from dataclasses import dataclass, replace
from itertools import repeat
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ptv2_fast.encoders.adapter_tensors import find_saved_names
from ptv2_fast.encoders.blocks import Heads
from ptv2_fast.encoders.families import find_family
from ptv2_fast.encoders.vectors import find_vectors
from ptv2_fast.frozen.engine import CPU_CHUNK, GPU_CHUNK
from ptv2_fast.frozen.memory import kept_bytes_per_token, peak_bytes
from ptv2_fast.frozen.spec import BlockShape, Surroundings
from ptv2_fast.frozen.vectors import trains_input_norm, trains_projections
from ptv2_fast.prefix import PrefixEncoder, PTuningV2Config

_STATISTICS = 16  # bytes a row, of a layer's two norms
_OF_ADAMW = 4  # fp32 copies of what trains: itself, its gradient, two moments


@dataclass(frozen=True)
class StepMemory:
    """Bytes on each device.

    Attributes:
        weights: of what is frozen; with several devices a device's share of it.
        gathered: of the weights that are there as a whole for a while, with several devices.
        trained: prefix, head and what else trains in float32, their gradients and AdamW's moments.
        kept: by the layers, for the backward pass.
        transient: what a layer needs for a while in it, where that and what is kept are the most.
    """

    weights: int
    gathered: int
    trained: int
    kept: int
    transient: int

    @property
    def total(self) -> int:
        """Without what the device's own context takes."""
        return self.weights + self.gathered + self.trained + self.kept + self.transient


def predict_step(
    model: PreTrainedModel,
    config: PTuningV2Config,
    sequences: int,
    tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    devices: int = 1,
    device_type: str = "cuda",
) -> StepMemory:
    """The memory of a training step on each device, by formula.

    On one device the layers run as `config.backbone` says. On several they run by the hook with
    sharded weights (FSDP's full shards): each device has a share of the weights and a batch of its
    own, and gathers the weights of a layer while it runs, and those of the next one meanwhile. What
    embeddings and head keep for the backward pass is left out.

    Args:
        model: with its head, not attached; it may be on the meta device.
        config: of the prefix, with the policy that is asked about.
        sequences: in the batch of one device.
        tokens: of each sequence, padding not counted.
        dtype: of the frozen weights.
        devices: how many share the weights.
        device_type: "cuda" or "cpu".

    Raises:
        ValueError: for a model without frozen blocks; by the hook, for layers other than those with
            LayerNorms and a plain network, whose bytes are not known; for a memory_budget.
    """
    if config.memory_budget is not None:
        raise ValueError("memory_budget: expected None and a policy in recompute, got a budget")
    family = find_family(model.config)
    heads, layers = Heads(*family.key_shape(model.config)), family.layer_modules(model.base_model)
    if family.describe_block is None:
        raise ValueError(
            "model: expected one with frozen blocks, got the model_type "
            f"{model.config.model_type!r}"
        )
    with torch.device("meta"):
        encoder = PrefixEncoder(
            config, num_layers=len(layers), num_heads=heads.number, head_dim=heads.dim
        )
    saved = set(find_saved_names(model, family, config.modules_to_save))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trained = sum(size for name, size in sizes.items() if name in saved)
    trained += sum(parameter.numel() for parameter in encoder.parameters())
    vectors = find_vectors(model.base_model, family, config)
    trained += sum(each.count(config.low_rank) for each in vectors)
    frozen = sum(size for name, size in sizes.items() if name not in saved) * dtype.itemsize
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
    embeddings = cast(nn.Embedding, model.get_input_embeddings()).weight.numel()
    gathered = max(2 * largest, embeddings) * dtype.itemsize if devices > 1 else 0

    modules = family.describe_block(layers[-1], heads)
    # Of weights in this dtype, whatever the model has.
    shape = replace(modules.shape(dtype), residual_bytes=dtype.itemsize)
    rows, lowest = sequences * tokens, encoder.layers[0]
    prefixes = 2 * len(encoder.layers) * heads.number * heads.dim * config.num_virtual_tokens
    if devices > 1 or config.backbone == "hook":
        spec = modules.spec
        if not spec.subtract_mean or spec.gate is not None or spec.rotary is not None:
            raise ValueError(
                "model: expected layers with LayerNorms, plain networks and no rotation for "
                "several devices and for the hook, got those of the model_type "
                f"{model.config.model_type!r}"
            )
        kept, transient = (
            rows * (len(layers) - lowest) * _kept_by_hook(shape),
            rows * _by_hook(shape),
        )
    else:
        of_lowest = family.describe_block(layers[lowest], heads)
        training = {each.module for each in vectors}
        around = Surroundings(
            has_separate_input=modules.spec.pre_norm,
            trains_projections=trains_projections(of_lowest, training),
            trains_input_norm=trains_input_norm(of_lowest, training),
            trains_input_matrix=any(
                each.module in of_lowest.inputs and "low_rank" in each.fields for each in vectors
            ),
        )
        policies = (config.recompute,) * (len(layers) - lowest)
        places = (around.of_lowest(), *(around for _ in policies[1:]))
        kept = rows * sum(map(kept_bytes_per_token, policies, repeat(shape), places))
        chunk = CPU_CHUNK if device_type == "cpu" else GPU_CHUNK
        transient = peak_bytes(policies, rows, shape, chunk, around) - kept
    return StepMemory(
        weights=-(-frozen // devices),
        gathered=gathered,
        trained=_OF_ADAMW * torch.float32.itemsize * trained,
        kept=kept + prefixes * dtype.itemsize,
        transient=transient,
    )


def _kept_by_hook(shape: BlockShape) -> int:
    """Bytes a row that a layer of transformers keeps, without dropout."""
    names = ("residual", "residual", "query", "key_value", "attention_out", "lse", "expanded")
    return sum(map(shape.bytes_per_token, names)) + _STATISTICS


def _by_hook(shape: BlockShape) -> int:
    """Bytes a row that its backward pass needs for a while."""
    return 2 * shape.bytes_per_token("expanded") + 3 * shape.bytes_per_token("residual")
