"""What every backend of the operator is held to on any device, by the numerics rule or to the bit.

A check returns the largest error over its budget, where it has one.
"""

import dataclasses
import random
import warnings

import torch
from torch import Tensor

from ptv2_fast.ops.attention import prefix_attention_with_lse
from tests.closeness import assert_close_to_oracle
from tests.devices import device_of
from tests.inputs import BIASES, GATES, MASKS, POSITIONS, ROWS, Inputs, Shape, make_inputs
from tests.oracle import (
    Results,
    attention_of,
    concatenate_and_expand,
    concatenate_and_sdpa,
    magnitudes,
    oracle,
    run_backend,
)

SMALL = Shape(2, 2, 12, 12, 6, 32)
GROUPED = Shape(5, 4, 83, 83, 9, 32, group=2)
GROUPED_FEW = Shape(3, 4, 83, 83, 9, 32, group=2)  # for the interpreter
SEVERAL_TILES = Shape(3, 2, 33, 33, 20, 32)


def check(backends, shape, dtype, mask, p, prefix_p, device=None, **made) -> float:
    """Every result of every backend against the oracle; `made`: the options of make_inputs."""
    device = device_of(backends[0]) if device is None else device
    return check_inputs(
        backends, make_inputs(shape, dtype, mask, device=device, **made), p, prefix_p
    )


def check_inputs(backends: list[str], inputs: Inputs, p: float, prefix_p: float) -> float:
    exact = oracle(inputs, p, prefix_p)
    sizes = magnitudes(inputs, p, prefix_p)
    eager = concatenate_and_expand(inputs, p, prefix_p)
    worst = 0.0
    for backend in backends:
        actual = run_backend(inputs, backend, p, prefix_p)
        plain = concatenate_and_sdpa(inputs) if backend == "split" else eager
        for name in actual._fields:
            results = (getattr(each, name) for each in (actual, exact, plain, sizes))
            worst = max(worst, assert_close_to_oracle(*results, name=f"{backend} {name}"))
    return worst


def random_case(generator: random.Random, largest: int, most: int = 3) -> dict:
    """Arguments of `check`, the backends apart.

    Sizes up to `largest`, and up to `most` sequences and heads for keys and values. Three cases of
    five are disentangled attention.
    """
    sizes = [0, 1, 2, 7, 16, 31, 33, 64, 65, 127, 200, 333]
    sizes = [size for size in sizes if size <= largest]
    group = generator.choice([1, 1, 2, 3])
    shape = Shape(
        generator.randint(1, most),
        generator.randint(1, most) * group,
        *(generator.choice(sizes) for _ in range(3)),
        8 * generator.choice([1, 2, 3, 4, 5, 8, 10, 12, 16]),
        group,
    )
    rows = generator.choice(["all", *ROWS])
    packed = generator.random() < 0.3
    if rows != "all" or packed:
        shape = dataclasses.replace(shape, queries=shape.tokens)
    case = {
        "rows": rows,
        "packed": packed,
        "bank": generator.choice([0, 0, 1, 3]),
        "bias": generator.choice(["none", *BIASES]),
        "lse": generator.random() < 0.3,
        "shape": shape,
        "dtype": generator.choice([torch.float32, torch.bfloat16]),
        "mask": generator.choice(MASKS),
        "p": generator.choice([0.0, 0.1, 0.5]),
        "prefix_p": generator.choice([0.0, 0.0, 0.25]),
        "seed": generator.randint(0, 2**20),
        "strides": generator.choice(["hf", "sliced"]),
    }
    drawn = random.Random(case["seed"])  # later options, which change no earlier case
    kind = drawn.choice(["none", "none", *POSITIONS])
    case["gate"] = drawn.choice(["none", "none", *GATES])
    if kind != "none":
        shape = dataclasses.replace(shape, heads=shape.kv_heads, group=1, queries=shape.tokens)
        case |= {"positions": kind, "rows": "all", "bias": "none", "shape": shape}
    return case


def packed_of(inputs: Inputs, padded: Results) -> Results:
    """What the packed call gives, from the results of the padded one."""
    return Results(*map(inputs.pack_rows, padded[:-3]), *padded[-3:])


def assert_equal_bits(actual: Results, wanted: Results, what: str = "") -> None:
    for name in actual._fields:
        assert torch.equal(getattr(actual, name), getattr(wanted, name)), f"{name}: {what}"


def check_packed_equals_padded(
    backend, dtype, device, shape=GROUPED, positions="none", **made
) -> None:
    kinds = {"rows": "context", "bias": "shared"} if positions == "none" else {}
    kinds |= {"positions": positions, "lse": True, **made}
    inputs = make_inputs(shape, dtype, device=device, packed=True, bank=3, **kinds)
    padded = run_backend(inputs.padded, backend, 0.1, 0.1)
    assert_equal_bits(run_backend(inputs, backend, 0.1, 0.1), packed_of(inputs, padded))


def check_equal_sequences_give_equal_bits(backend, dtype, device, shape=GROUPED, **made) -> None:
    """Whatever a sequence is batched with, and wherever it stands."""
    inputs = make_inputs(shape, dtype, "right padding", device=device, **made)
    whole = run_backend(inputs, backend, 0.0, 0.0)
    for sequence in range(shape.batch):
        alone = run_backend(part_of(inputs, sequence), backend, 0.0, 0.0)
        for name in Results._fields[:5]:
            actual, expected = getattr(alone, name)[0], getattr(whole, name)[sequence]
            assert torch.equal(actual, expected), f"{name} of sequence {sequence}"


def part_of(inputs: Inputs, sequence: int) -> Inputs:
    """One sequence of padded inputs with one prefix."""
    part = slice(sequence, sequence + 1)
    names = ("query", "key", "value", "grad_out", "key_mask")
    tensors = {name: getattr(inputs, name) for name in names}
    return dataclasses.replace(
        inputs, **{name: x if x is None else x[part] for name, x in tensors.items()}
    )


def check_bank_equals_separate_calls(backend, device) -> None:
    """And what lies behind prefix_lengths is never read."""
    inputs = make_inputs(Shape(5, 2, 12, 12, 7, 16), torch.float32, bank=3, device=device)
    for row, length in enumerate(inputs.prefix_lengths.tolist()):
        inputs.prefix_key[row, :, length:] = inputs.prefix_value[row, :, length:] = float("nan")
    together = run_backend(inputs, backend, 0.0, 0.0)
    expected = torch.zeros_like(together.grad_prefix_key)
    for sequence, row in enumerate(inputs.prefix_index.tolist()):
        length = inputs.prefix_lengths[row]
        prefix_key, prefix_value = (prefix[row, :, :length] for prefix in inputs.tensors[3:])
        alone = dataclasses.replace(
            part_of(inputs, sequence), prefix_key=prefix_key, prefix_value=prefix_value,
            prefix_index=None, prefix_lengths=None,
        )  # fmt: skip
        alone = run_backend(alone, backend, 0.0, 0.0)
        torch.testing.assert_close(together.out[sequence], alone.out[0])
        torch.testing.assert_close(together.grad_query[sequence], alone.grad_query[0])
        expected[row, :, :length] += alone.grad_prefix_key
    torch.testing.assert_close(together.grad_prefix_key, expected)


def raw_pair(backend: str):
    """The raw operators of a backend: forward, backward."""
    return [
        getattr(torch.ops.ptv2, f"prefix_attention_{way}_{backend}")
        for way in ("forward", "backward")
    ]


def check_joint_gradients(backend, device, shape=GROUPED, **made) -> None:
    packed = backend != "split"
    made |= {"packed": packed, "device": device}
    inputs = make_inputs(shape, torch.float32, "right padding", **made)
    forward, backward = raw_pair(backend)
    options = inputs.raw_options()
    results = forward(*inputs.raw_tensors, *options)
    arguments = (inputs.grad_out, *inputs.raw_tensors, *results, None, True, True, True)
    separate = backward(*arguments, False, *options)
    joint, *others = backward(*arguments, True, *options)
    assert torch.equal(joint, torch.cat(separate[:3], dim=1))
    tokens = joint if packed else joint.transpose(1, 2)
    assert tokens.is_contiguous() and [other.numel() for other in others[:2]] == [0, 0]
    for gradient, expected in zip(others[2:], separate[3:], strict=True):
        assert torch.equal(gradient, expected)


def check_merging_by_lse(backend, device, shape=SMALL) -> None:
    """Two results over disjoint columns are one over all."""
    inputs = make_inputs(shape, torch.float32, device=device)
    query, key, value, prefix_key, prefix_value = inputs.tensors
    whole, whole_lse = prefix_attention_with_lse(*inputs.tensors, backend=backend)
    nothing = prefix_key[:, :0]
    parts = [
        prefix_attention_with_lse(query, key, value, nothing, nothing, backend=backend),
        prefix_attention_with_lse(
            query, key[:, :, :0], value[:, :, :0], prefix_key, prefix_value, backend=backend
        ),
    ]
    weights = torch.stack([lse for _, lse in parts]).softmax(dim=0)
    merged = sum(weight[..., None] * out for weight, (out, _) in zip(weights, parts, strict=True))
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(torch.logaddexp(parts[0][1], parts[1][1]), whole_lse)


def check_prefix_gradient_is_no_worse_than_concatenation(backend, device) -> None:
    """In bf16."""
    shape = Shape(8, 2, 33, 33, 9, 64)
    inputs = make_inputs(shape, torch.bfloat16, "right padding", device=device)
    actual, exact = run_backend(inputs, backend, 0.0, 0.0), oracle(inputs, 0.0, 0.0)
    plain = concatenate_and_expand(inputs, 0.0, 0.0)
    for name in ("grad_prefix_key", "grad_prefix_value"):

        def error(results: Results, name: str = name) -> Tensor:
            return (getattr(results, name).double() - getattr(exact, name)).square().mean().sqrt()

        assert error(actual) <= error(plain), name


def check_runs_are_bit_equal(backend, dtype, device, runs=2, shape=SEVERAL_TILES, **made) -> None:
    inputs = make_inputs(shape, dtype, "random", device=device, **made)
    first = run_backend(inputs, backend, 0.1, 0.1)
    for run in range(1, runs):
        assert_equal_bits(run_backend(inputs, backend, 0.1, 0.1), first, f"run {run}")


def check_closed_gates_are_no_prefix(backend, device, shape) -> None:
    """To the bit where the gate is 0, however large the prefix is; its gate has a gradient."""
    inputs = make_inputs(shape, torch.float32, "right padding", gate="open", device=device)
    inputs.prefix_key[0] *= 50  # scores that would be most of every softmax, and of some all
    inputs.prefix_gate[::2] = 0
    closed = inputs.prefix_gate == 0
    prefix_key, prefix_value = (prefix[:, :0] for prefix in inputs.tensors[3:])
    without = dataclasses.replace(
        inputs, prefix_key=prefix_key, prefix_value=prefix_value, prefix_gate=None
    )
    actual, expected = (run_backend(each, backend, 0.1, 0.0) for each in (inputs, without))
    for name in ("out", "lse"):
        same = (getattr(actual, name) == getattr(expected, name)).flatten(2).all(dim=2)
        assert torch.equal(same, closed.expand(same.shape)), name
    assert all(torch.isfinite(result).all() for result in actual)
    assert (actual.grad_prefix_gate[closed] != 0).all()
    if shape.group == 1:
        assert (
            not actual.grad_prefix_key[closed].any() and not actual.grad_prefix_value[closed].any()
        )


def check_rows_without_a_visible_column(backend, device) -> None:
    """They and their gradients are 0, and lse is -inf."""
    inputs = make_inputs(Shape(2, 2, 6, 11, 0, 16), torch.float32, "empty rows", device=device)
    results = run_backend(inputs, backend, 0.0, 0.0)
    for name in ("out", "grad_query", "grad_key", "grad_value"):
        assert torch.equal(getattr(results, name)[0], torch.zeros_like(getattr(results, name)[0]))
        assert torch.isfinite(getattr(results, name)).all()
        assert getattr(results, name)[1].abs().max() > 0
    _, lse = raw_pair(backend)[0](*inputs.raw_tensors, *inputs.raw_options())
    assert (lse[0] == float("-inf")).all() and torch.isfinite(lse[1]).all()


def check_only_needed_gradients(backend, device, shape=SMALL, **made) -> None:
    """They equal those of a call that needs all."""
    inputs = make_inputs(shape, torch.float32, "right padding", device=device, **made)
    full = run_backend(inputs, backend, 0.0, 0.0)[2:]
    gate = () if inputs.prefix_gate is None else (inputs.prefix_gate,)
    for wanted in ([3, 4], [0], [1, 2], [2], [0, 3], [4], *([5], [0, 5])[: 2 * len(gate)]):
        leaves = [tensor.detach().clone() for tensor in (*inputs.tensors, *gate)]
        for index in wanted:
            leaves[index].requires_grad_()
        out, _ = attention_of(inputs, backend, 0.0, 0.0, *leaves)
        gradients = torch.autograd.grad(out, [leaves[index] for index in wanted], inputs.grad_out)
        for index, gradient in zip(wanted, gradients, strict=True):
            assert torch.equal(gradient, full[index])


def check_prefix_only_backward_never_reads_the_tokens(backend, device, **made) -> None:
    inputs = make_inputs(Shape(2, 2, 12, 12, 6, 32), torch.float32, device=device, **made)
    forward, backward = raw_pair(backend)
    options = inputs.raw_options()
    out, lse = forward(*inputs.raw_tensors, *options)
    rest = (out, lse, None, False, False, True, False, *options)
    whole = backward(inputs.grad_out, *inputs.raw_tensors, *rest)
    poisoned = [*inputs.raw_tensors]
    poisoned[1], poisoned[2] = (torch.full_like(tensor, float("nan")) for tensor in poisoned[1:3])
    again = backward(inputs.grad_out, *poisoned, *rest)
    assert [gradient.numel() for gradient in again[:3]] == [0, 0, 0]
    for gradient, expected in zip(again[3:], whole[3:], strict=True):
        assert torch.equal(gradient, expected)


def check_dispatch(backend, dtype, device, shape=GROUPED) -> None:
    """The public function, as the dispatcher serves it, gives a backend's bits without a warning.

    On a CPU other kernels serve it, by the numerics rule.
    """
    inputs = make_inputs(shape, dtype, "right padding", device=device, lse=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of a kernel that does not compile
        actual = run_backend(inputs, None, 0.1, 0.1)
    if device.type == "cpu":
        check_inputs([None], inputs, 0.1, 0.1)
    else:
        assert_equal_bits(actual, run_backend(inputs, backend, 0.1, 0.1))


def check_strides_are_those_of_the_cpu(backend, device) -> None:
    """The inputs on a device are views of the same kind, so that strides are checked there."""
    for packed in (False, True):
        made = {"strides": "sliced", "packed": packed}
        there = make_inputs(SMALL, torch.float32, device=device, **made)
        for actual, expected in zip(
            (*there.tensors, there.grad_out),
            (*(here := make_inputs(SMALL, torch.float32, **made)).tensors, here.grad_out),
            strict=True,
        ):
            assert actual.stride() == expected.stride() and torch.equal(actual.cpu(), expected)
