"""Tensors of more than 2^31 elements: addresses in int64, by comparison with calls on a few rows.

What a sequence or row gives does not depend on what it is batched with, so bits must be equal.
"""

import dataclasses

import torch
from torch import Tensor

from ptv2_fast.ops.options import AttentionOptions
from tests.attention_checks import raw_pair
from tests.devices import needs_memory
from tests.elementwise_cases import Case, make_case, operator

GIGABYTES = 40
BEYOND_INT32 = 2**31


def few(count: int) -> list[int]:
    return [0, count // 2, count - 1]


def check_large_attention(device: torch.device, packed: bool) -> None:
    """Thousands of sequences of 512 tokens in bf16: out, lse and the gradients of tokens."""
    needs_memory(device, GIGABYTES)
    tokens, heads, width, count = 512, 16, 64, BEYOND_INT32 // (512 * 16 * 64) + 2
    if device.type == "cpu":
        tokens, heads, width, count = 8, 2, 16, 3
    generator = torch.Generator(device).manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(generator=generator)

    query, key, value = (values(count * tokens, heads, width) for _ in range(3))
    prefixes = [values(1, heads, 20, width) for _ in range(2)]

    def view(tensor: Tensor) -> Tensor:
        return tensor if packed else tensor.unflatten(0, (-1, tokens)).transpose(1, 2)

    def results(*of_tokens: Tensor) -> list[Tensor]:
        """[N, H, ...] each; the gradient of out is the query again."""
        starts = torch.arange(0, len(of_tokens[0]) + 1, tokens, dtype=torch.int32, device=device)
        layout = {"cu_seqlens": starts, "max_seqlen": tokens} if packed else {}
        options = AttentionOptions(None, None, width**-0.5, 0.0, 0.0, **layout)
        tensors = (*map(view, of_tokens), *prefixes)
        forward, backward = raw_pair("triton")
        out, lse = forward(*tensors, *options)
        needs = (True, True, False, False)
        gradients = backward(tensors[0], *tensors, out, lse, None, *needs, *options)[:3]
        found = [out, lse, *gradients]
        return found if packed else [each.transpose(1, 2).flatten(0, 1) for each in found]

    whole = results(query, key, value)
    for sequence in few(count):
        rows = slice(sequence * tokens, (sequence + 1) * tokens)
        alone = results(*(tensor[rows] for tensor in (query, key, value)))
        for name, all_rows, expected in zip(
            ("out", "lse", "grad_query", "grad_key", "grad_value"), whole, alone, strict=True
        ):
            assert torch.equal(all_rows[rows], expected), f"{name} of sequence {sequence}"


def check_large_rows(device: torch.device, names: tuple[str, ...]) -> None:
    """Millions of rows of 1024 columns in bf16, by the operators of these names."""
    needs_memory(device, GIGABYTES)
    count, columns = (BEYOND_INT32 // 1024 + 8, 1024) if device.type == "cuda" else (5, 32)
    small = make_case((64, columns), "bf16", extras=False, device=device)
    order = torch.arange(count, device=device)
    row = order % 64
    case = dataclasses.replace(
        small,
        coordinates=torch.stack((order, row), dim=1).int(),
        statistics=small.statistics[row],
        **{name: getattr(small, name)[row] for name in needed_rows(names)},
    )
    for name in names:
        whole = called(name, case)
        for part in (slice(0, 4), slice(count // 2, count // 2 + 1), slice(count - 3, count)):
            alone = called(name, rows_of(case, part, needed_rows(names)))
            for index, (all_rows, expected) in enumerate(zip(whole, alone, strict=True)):
                assert torch.equal(all_rows[part], expected), f"{name} {index} at {part}"
        del whole


def needed_rows(names: tuple[str, ...]) -> set[str]:
    """The large tensors of a case that these operators read."""
    read = {
        "bias_activation": {"input"},
        "bias_activation_backward": {"input", "grad_out"},
        "gated_activation": {"input"},
        "gated_activation_backward": {"input", "grad_out"},
        "dropout_add_norm": {"input", "residual"},
        "dropout_add_norm_backward": {"grad_out", "total"},
        "norm_from_stats": {"total"},
        "dropout_add": {"input", "residual"},
        "dropout_backward": {"total"},
    }
    return set().union(*(read[name] for name in names))


def rows_of(case: Case, part: slice, large: set[str]) -> Case:
    of_rows = {*large, "coordinates", "statistics"}
    return dataclasses.replace(case, **{name: getattr(case, name)[part] for name in of_rows})


def called(name: str, case: Case) -> list[Tensor]:
    arguments = {
        "bias_activation": lambda: (case.input, None, "gelu"),
        "bias_activation_backward": lambda: (case.grad_out, case.input, None, "gelu"),
        "gated_activation": lambda: (case.input, None, "silu", True),
        "gated_activation_backward": lambda: (
            case.grad_out[:, ::2].contiguous(), case.input, None, "silu", True
        ),
        "dropout_add_norm": lambda: case.forward,
        "dropout_add_norm_backward": lambda: case.backward,
        "norm_from_stats": lambda: case.again,
        "dropout_add": lambda: case.addition,
        "dropout_backward": lambda: case.addition_backward,
    }[name]()  # fmt: skip
    results = operator("triton", name)(*arguments)
    return [results] if isinstance(results, Tensor) else list(results)


def check_large_rotation(device: torch.device) -> None:
    """Packed query, key and value of a million tokens: rows at both ends and in the middle."""
    needs_memory(device, GIGABYTES)
    heads, head_dim, count = 12, 64, BEYOND_INT32 // (3 * 12 * 64) + 8
    if device.type == "cpu":
        heads, head_dim, count = 2, 16, 50
    generator = torch.Generator(device).manual_seed(0)
    packed = torch.empty(count, 3 * heads * head_dim, dtype=torch.bfloat16, device=device)
    packed.normal_(generator=generator)
    angle = torch.rand(count, head_dim // 2, device=device, generator=generator)
    cosine, sine, rows = angle.cos(), angle.sin(), few(count)
    alone, rotate = packed[rows], operator("triton", "rotate_")
    rotate(alone, cosine[rows], sine[rows], 2 * heads, head_dim, False, False)
    rotate(packed, cosine, sine, 2 * heads, head_dim, False, False)
    assert torch.equal(packed[rows], alone)


CHECKS = {
    "packed": lambda device: check_large_attention(device, True),
    "padded": lambda device: check_large_attention(device, False),
    "activation": lambda device: check_large_rows(
        device, ("bias_activation", "bias_activation_backward")
    ),
    "gated activation": lambda device: check_large_rows(
        device, ("gated_activation", "gated_activation_backward")
    ),
    "norm": lambda device: check_large_rows(device, ("dropout_add_norm",)),
    "norm backward": lambda device: check_large_rows(
        device, ("dropout_add_norm_backward", "norm_from_stats")
    ),
    "addition": lambda device: check_large_rows(device, ("dropout_add", "dropout_backward")),
    "rotation": check_large_rotation,
}
