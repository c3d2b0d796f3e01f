"""Every kind of frozen block: against its definition, between policies, and what it keeps."""

import pytest
import torch
from torch import Tensor

from ptv2_fast.frozen import engine
from ptv2_fast.frozen.memory import kept_bytes_per_token
from ptv2_fast.frozen.spec import POLICIES, BlockSpec, Surroundings
from ptv2_fast.training.measure import kept_bytes
from tests.models import (
    assert_close_to_model,
    one_thread,  # noqa: F401
)
from tests.tiny_blocks import HEAD_DIM, HIDDEN, LAYERS, P, TinyEncoder, made_inputs

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


def made(name: str, p: float = 0.0, dtype: torch.dtype = torch.float32):
    """An encoder, its hidden states, prefixes, mask and inputs."""
    torch.manual_seed(0)
    spec, kind, has_bias = KINDS[name]
    kind = {"key_value_heads": 4, **kind}
    encoder = TinyEncoder(spec, p, **kind).to(dtype)
    hidden = torch.randn(3, TOKENS, HIDDEN).to(dtype)
    prefixes = torch.randn(LAYERS, 2, kind["key_value_heads"], P, HEAD_DIM).to(dtype)
    mask = torch.arange(TOKENS) < torch.tensor([TOKENS, 7, 1])[:, None]
    return encoder, hidden, prefixes, mask, made_inputs(spec, TOKENS, has_bias)


def results(output: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    grad_out = torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype)
    return output.detach(), *torch.autograd.grad(output, leaves, grad_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", KINDS)
def test_blocks_equal_their_definition(name, p, dtype):
    encoder, hidden, prefixes, mask, inputs = made(name, p, dtype)
    leaves = [hidden.clone().requires_grad_(), prefixes.clone().requires_grad_()]
    torch.manual_seed(5)
    seeds = torch.randint(2**63 - 1, (LAYERS,))
    torch.manual_seed(5)
    actual = results(encoder.run(*leaves, mask, inputs), *leaves)
    # Of pads only what the blocks leave out: gradients of their inputs are zero.
    assert torch.equal(actual[1], actual[1] * mask[..., None])

    def define(encoder: TinyEncoder, *leaves: Tensor) -> tuple[Tensor, ...]:
        for leaf in leaves:
            leaf.requires_grad_()
        return results(encoder.define(*leaves, mask, inputs, seeds), *leaves)

    assert_close_to_model(actual, define, encoder, hidden, prefixes, dtype=dtype)


@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("lowest", [0, 1])
@pytest.mark.parametrize("name", KINDS)
def test_policies_give_the_same_bits(name, lowest, precision, monkeypatch):
    monkeypatch.setattr(engine, "CPU_CHUNK", 8)  # several chunks, the last one shorter
    encoder, hidden, prefixes, mask, inputs = made(name, 0.2)
    expected = None
    for policy in POLICIES:
        prefixes = prefixes.clone().requires_grad_()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            output = encoder.run(hidden, prefixes, mask, inputs, lowest, policy=policy)
        actual = results(output, prefixes)
        assert actual[1][lowest:].abs().sum(dim=(1, 2, 3, 4)).min() > 0
        expected = expected or actual
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind[0].is_causal])
def test_first_tokens_alone_are_those_of_all_rows(name):
    encoder, hidden, prefixes, mask, inputs = made(name)
    both = []
    for first_token_only in (False, True):
        prefixes = prefixes.clone().requires_grad_()
        output = encoder.run(hidden, prefixes, mask, inputs, first_token_only=first_token_only)
        both.append(results(output[:, 0], prefixes))
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other)


# A pre-norm block keeps the sum that it hands up, and torch refuses to have that changed in place.
@pytest.mark.parametrize(
    ("name", "change"), [("bert", "in place"), ("bert", "another"), ("esm", "another")]
)
@pytest.mark.parametrize("policy", POLICIES)
def test_states_that_someone_changes_between_two_layers_are_the_input_of_the_next(
    name, policy, change, monkeypatch
):
    encoder, hidden, prefixes, mask, inputs = made(name)
    original, outputs = engine.FrozenRun.run_layer, []

    def changed(run, index, *arguments):
        out = original(run, index, *arguments)
        if index == 1 and change == "another":
            return out * 2
        if index == 1:
            out.mul_(2)
        return out

    for hook in (original, changed):
        monkeypatch.setattr(engine.FrozenRun, "run_layer", hook)
        leaves = prefixes.clone().requires_grad_()
        outputs.append(results(encoder.run(hidden, leaves, mask, inputs, policy=policy), leaves))
    assert not torch.equal(outputs[0][0], outputs[1][0])

    def define(encoder: TinyEncoder, hidden: Tensor, prefixes: Tensor) -> tuple[Tensor, ...]:
        prefixes.requires_grad_()
        for i, block in enumerate(encoder):
            hidden = block(hidden, prefixes[i], mask, inputs, torch.zeros(1, dtype=torch.long))
            hidden = hidden * 2 if i == 1 else hidden
        return results(hidden * mask[..., None], prefixes)

    assert_close_to_model(outputs[1], define, encoder, hidden, prefixes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", KINDS)
def test_kept_bytes_are_the_sum_of_the_spec(name, policy, dtype):
    encoder, _, prefixes, _, inputs = made(name, 0.2, dtype)
    spec, modules = KINDS[name][0], encoder[1].modules_by_role()
    shape = modules.shape(dtype)
    prefixes.requires_grad_()

    def kept(lengths: list[int], tokens: int = 39) -> int:
        mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
        hidden = torch.randn(3, tokens, HIDDEN).to(dtype)
        given = made_inputs(spec, tokens, inputs.bias is not None)
        run = lambda: encoder.run(hidden, prefixes, mask, given, policy=policy).sum()  # noqa: E731
        return kept_bytes(run, encoder)

    around = Surroundings(has_separate_input=spec.pre_norm)
    # The first block of a pre-norm encoder starts with its input, or has no norm there.
    lowest = Surroundings(False, False, spec.pre_norm and encoder[0].first_norm is not None)
    last = Surroundings(True, True, spec.pre_norm, has_next_norm=not spec.pre_norm)
    expected = sum(kept_bytes_per_token(policy, shape, each) for each in (lowest, around, last))
    shared = 8 + 8  # once a forward: the coordinates and the places of the rows
    if spec.rotary is not None:
        shared += 4 * HEAD_DIM  # cosine and sine
    # A difference of two batches: what does not grow with the tokens is no matter here.
    assert kept([38, 20, 6]) - kept([22, 20, 6]) == 16 * (expected + shared)
