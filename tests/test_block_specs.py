"""Every kind of frozen block: against its definition, between policies, and what it keeps."""

import pytest
import torch
from torch import Tensor

from ptv2_fast.frozen import engine
from ptv2_fast.frozen.memory import kept_bytes_per_token
from ptv2_fast.frozen.spec import POLICIES, Surroundings
from ptv2_fast.frozen.vectors import trains_input_norm, trains_projections
from ptv2_fast.training.measure import kept_bytes
from tests.block_kinds import CPU, KINDS, check_kind, made, made_stand_ins, results
from tests.gpu_cases import BLOCK_KINDS
from tests.models import (
    assert_close_to_model,
    one_thread,  # noqa: F401
)
from tests.tiny_blocks import HEAD_DIM, HIDDEN, TinyEncoder, made_inputs


def test_a_gpu_checks_every_kind():
    assert tuple(KINDS) == BLOCK_KINDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", KINDS)
def test_blocks_equal_their_definition(name, p, dtype):
    check_kind(CPU, name, dtype, p)


# What trains beside the inputs -> stand-ins of the blocks' modules, and what of them trains.
TRAINED = {
    "prefix": lambda encoder, lowest: ({}, {}),
    "biases and norms": made_stand_ins,
    "updates": lambda encoder, lowest: made_stand_ins(encoder, lowest, rank=2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_biases_and_norms_equal_the_definition(name, dtype, monkeypatch):
    monkeypatch.setattr(engine, "CPU_CHUNK", 8)
    check_kind(CPU, name, dtype, p=0.3, trains_more=True)


@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("lowest", [0, 1])
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", KINDS)
def test_policies_give_the_same_bits(name, trained, lowest, precision, monkeypatch):
    monkeypatch.setattr(engine, "CPU_CHUNK", 8)  # several chunks, the last one shorter
    encoder, hidden, prefixes, mask, inputs = made(name, 0.2)
    stand_ins, vectors = TRAINED[trained](encoder, lowest)
    expected = None
    for policy in POLICIES:
        prefixes = prefixes.clone().requires_grad_()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            output = encoder.run(
                hidden, prefixes, mask, inputs, lowest, policy=policy, stand_ins=stand_ins
            )
        actual = results(output, prefixes, *vectors.values())
        assert actual[1][lowest:].abs().sum(dim=(1, 2, 3, 4)).min() > 0
        assert all(gradient.abs().max() > 0 for gradient in actual[2:])
        expected = expected or actual
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("trained", ["biases and norms", "updates"])
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind[0].is_causal])
def test_first_tokens_alone_are_those_of_all_rows(name, trained):
    # Products of other shapes here and there, which not always the same library computes.
    encoder, hidden, prefixes, mask, inputs = made(name, 0.0, torch.float64)
    (stand_ins, vectors), both = TRAINED[trained](encoder, 0), []
    for first_token_only in (False, True):
        prefixes = prefixes.clone().requires_grad_()
        output = encoder.run(
            hidden, prefixes, mask, inputs, first_token_only=first_token_only, stand_ins=stand_ins
        )
        both.append(results(output[:, 0], prefixes, *vectors.values()))
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


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("dtype", "trained", "lowest"),
    [
        (torch.float32, "prefix", 0),
        (torch.bfloat16, "prefix", 0),
        (torch.float32, "biases and norms", 0),
        (torch.bfloat16, "biases and norms", 1),
        (torch.float32, "updates", 0),
        (torch.bfloat16, "updates", 1),
    ],
)
@pytest.mark.parametrize("name", KINDS)
def test_kept_bytes_are_the_sum_of_the_spec(name, dtype, trained, lowest, policy):
    encoder, _, prefixes, _, inputs = made(name, 0.2, dtype)
    stand_ins, _ = TRAINED[trained](encoder, lowest)
    spec, modules = KINDS[name][0], encoder[1].modules_by_role()
    shape = modules.shape(dtype)
    prefixes.requires_grad_()

    def kept(lengths: list[int], tokens: int = 39) -> int:
        mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
        hidden = torch.randn(3, tokens, HIDDEN).to(dtype)
        given = made_inputs(spec, tokens, inputs.bias is not None)

        def run() -> Tensor:
            options = {"policy": policy, "stand_ins": stand_ins}
            return encoder.run(hidden, prefixes, mask, given, lowest, **options).sum()

        return kept_bytes(run, encoder)

    around = Surroundings(has_separate_input=spec.pre_norm)
    roles = encoder[lowest].modules_by_role()
    # The first block of a pre-norm encoder starts with its input, or has no norm there.
    of_lowest = Surroundings(
        has_separate_input=spec.pre_norm and roles.first_norm is not None,
        trains_projections=trains_projections(roles, stand_ins),
        trains_input_norm=trains_input_norm(roles, stand_ins),
        trains_input_matrix=trained == "updates",
    ).of_lowest()
    last = Surroundings(True, True, spec.pre_norm, has_next_norm=not spec.pre_norm)
    places = (of_lowest, *(around,) * (1 - lowest), last)
    expected = sum(kept_bytes_per_token(policy, shape, each) for each in places)
    shared = 8 + 8  # once a forward: the coordinates and the places of the rows
    if spec.rotary is not None:
        shared += 4 * HEAD_DIM  # cosine and sine
    # A difference of two batches: what does not grow with the tokens is no matter here.
    assert kept([38, 20, 6]) - kept([22, 20, 6]) == 16 * (expected + shared)
