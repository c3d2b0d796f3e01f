"""The kinds of frozen blocks that encoders have, on any device, against their definition."""

import copy

import torch
from torch import Tensor, nn

from ptv2_fast.frozen.spec import BlockSpec
from tests.models import assert_close_to_model
from tests.tiny_blocks import HEAD_DIM, HIDDEN, LAYERS, P, TinyEncoder, made_inputs

CPU = torch.device("cpu")
TOKENS = 11
KINDS: dict[str, tuple[BlockSpec, dict, bool]] = {  # spec, sizes and form, an additive bias
    "bert": (BlockSpec(), {"has_bias": True, "is_fused": False}, False),
    "nomic": (
        BlockSpec(activation="silu", gate="first", rotary="half"),
        {"has_bias": False, "is_fused": False},
        False,
    ),
    "mpnet": (BlockSpec(activation="gelu_tanh"), {"has_bias": True, "is_fused": False}, True),
    "esm": (BlockSpec(pre_norm=True, rotary="half"), {"has_bias": True, "is_fused": False}, False),
    "glm": (
        BlockSpec(pre_norm=True, activation="gelu_tanh"),
        {"has_bias": True, "is_fused": True, "has_context": True},
        False,
    ),
    "modernbert": (
        BlockSpec(pre_norm=True, gate="first", rotary="half", window=2),
        {"has_bias": False, "is_fused": True},
        False,
    ),
    "llama": (
        BlockSpec(
            pre_norm=True, subtract_mean=False, activation="silu", gate="first", rotary="half",
            is_causal=True,
        ),
        {"has_bias": False, "is_fused": False, "key_value_heads": 2},
        False,
    ),
    "qwen3": (
        BlockSpec(
            pre_norm=True, subtract_mean=False, activation="silu", gate="first", rotary="half",
        ),
        {"has_bias": False, "is_fused": False, "key_value_heads": 2, "has_head_norms": True},
        False,
    ),
    "mistral": (
        BlockSpec(
            pre_norm=True, subtract_mean=False, activation="quick_gelu", gate="second",
            rotary="interleaved", is_causal=True, window=3,
        ),
        {"has_bias": True, "is_fused": True, "key_value_heads": 1},
        False,
    ),
    "t5": (
        BlockSpec(pre_norm=True, subtract_mean=False, activation="relu", scale=1.0),
        {"has_bias": False, "is_fused": False},
        True,
    ),
}  # fmt: skip


def made(name: str, p: float = 0.0, dtype: torch.dtype = torch.float32, device: torch.device = CPU):
    """An encoder, its hidden states, prefixes, mask and inputs."""
    torch.manual_seed(0)
    spec, kind, has_bias = KINDS[name]
    kind = {"key_value_heads": 4, **kind}
    encoder = TinyEncoder(spec, p, **kind).to(device, dtype)
    hidden = torch.randn(3, TOKENS, HIDDEN).to(device, dtype)
    prefixes = torch.randn(LAYERS, 2, kind["key_value_heads"], P, HEAD_DIM).to(device, dtype)
    mask = torch.arange(TOKENS) < torch.tensor([TOKENS, 7, 1])[:, None]
    inputs = made_inputs(spec, TOKENS, has_bias, device)
    return encoder, hidden, prefixes, mask.to(device), inputs


def results(output: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    grad_out = torch.linspace(-1, 1, output.numel()).view_as(output).to(output)
    return output.detach(), *torch.autograd.grad(output, leaves, grad_out)


def made_stand_ins(
    encoder: TinyEncoder, lowest: int = 0, rank: int | None = None
) -> tuple[dict[nn.Module, nn.Module], dict[str, nn.Parameter]]:
    """float32 copies of the biases and norms of the blocks from `lowest` on, and by their names.

    With a rank, low-rank updates of their matrices instead.
    """
    stand_ins, vectors = {}, {}
    for name, module in encoder.named_modules() if rank is not None else ():
        if isinstance(module, nn.Linear) and int(name.split(".")[0]) >= lowest:
            stand_in = stand_ins[module] = nn.Module()
            stand_in.lora_A = nn.Parameter(torch.randn(rank, module.in_features) / 8)
            stand_in.lora_B = nn.Parameter(torch.randn(module.out_features, rank) / 8)
            stand_in.scale = 1.5
            vectors |= {f"{name}.{key}": p for key, p in stand_in.named_parameters()}
    if rank is not None:
        return stand_ins, vectors
    for name, module in encoder.named_modules():
        own = [key for key, p in module.named_parameters(recurse=False) if p.dim() == 1]
        if own and int(name.split(".")[0]) >= lowest:
            stand_ins[module] = copy.deepcopy(module).float()
            vectors |= {f"{name}.{key}": stand_ins[module].get_parameter(key) for key in own}
    return stand_ins, vectors


def check_kind(
    device: torch.device, name: str, dtype: torch.dtype, p: float = 0.0, trains_more: bool = False
) -> float:
    """Outputs and gradients against the definition, with dropout from the same counters.

    `trains_more`: those of biases and norms too.
    """
    encoder, hidden, prefixes, mask, inputs = made(name, p, dtype, device)
    leaves = [hidden.clone().requires_grad_(), prefixes.clone().requires_grad_()]
    stand_ins, vectors = made_stand_ins(encoder) if trains_more else ({}, {})
    torch.manual_seed(5)
    seeds = torch.randint(2**63 - 1, (LAYERS,), device=device)
    torch.manual_seed(5)
    output = encoder.run(*leaves, mask, inputs, stand_ins=stand_ins)
    actual = results(output, *leaves, *vectors.values())
    assert all(gradient.dtype == torch.float32 for gradient in actual[3:])
    actual = tuple(each.to(dtype) for each in actual)
    # Of pads only what the blocks leave out: gradients of their inputs are zero.
    assert torch.equal(actual[1], actual[1] * mask[..., None])

    def define(encoder: TinyEncoder, *leaves: Tensor) -> tuple[Tensor, ...]:
        for leaf in leaves:
            leaf.requires_grad_()
        own = [encoder.get_parameter(name) for name in vectors]
        return results(encoder.define(*leaves, mask, inputs, seeds), *leaves, *own)

    return assert_close_to_model(actual, define, encoder, hidden, prefixes, dtype=dtype)
