"""The rules that every backend of the rotation of packed heads is held to."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from tests.closeness import assert_close_to_oracle
from tests.devices import CPU
from tests.elementwise_cases import operator

FLAGS = list(itertools.product((False, True), repeat=2))  # interleaved, inverse


class RotaryShape(NamedTuple):
    rows: int
    heads: int
    head_dim: int
    pairs: int  # half of rotary_dim
    behind: int = 0  # columns behind the rotated heads
    gap: int = 0  # between rows


SHAPES = [
    RotaryShape(0, 2, 16, 8),
    RotaryShape(1, 1, 8, 4),
    RotaryShape(5, 3, 20, 7, behind=13, gap=5),  # a vector that is not whole, a rest of each head
    RotaryShape(9, 2, 24, 12, behind=24),
    RotaryShape(7, 4, 64, 32, behind=64, gap=3),
    RotaryShape(3, 2, 128, 48),
]


class RotaryCase(NamedTuple):
    memory: Tensor  # NaN around, between and behind what is rotated
    packed: Tensor  # [R, heads * head_dim + behind], a view into it
    cosine: Tensor
    sine: Tensor
    shape: RotaryShape

    def rotate(self, backend: str, interleaved: bool, inverse: bool) -> None:
        arguments = (self.cosine, self.sine, self.shape.heads, self.shape.head_dim)
        operator(backend, "rotate_")(self.packed, *arguments, interleaved, inverse)

    def pairs(self, interleaved: bool) -> tuple[Tensor, Tensor]:
        """Views [R, heads, pairs] of what is rotated."""
        _, heads, head_dim, pairs, *_ = self.shape
        rotated = self.packed[:, : heads * head_dim].unflatten(1, (heads, head_dim))
        rotated = rotated[..., : 2 * pairs]
        if interleaved:
            return rotated[..., 0::2], rotated[..., 1::2]
        return rotated[..., :pairs], rotated[..., pairs:]


def make_rotary(shape: RotaryShape, dtype: torch.dtype, device: torch.device = CPU) -> RotaryCase:
    """Values beside rotated ones are NaN; the memory begins and ends with more of it."""
    rows, heads, head_dim, pairs, behind, gap = shape
    margin, width = 3, heads * head_dim  # odd: nothing is aligned to more than its elements
    stride = width + behind + gap
    generator = torch.Generator().manual_seed(rows + width)
    memory = torch.full((2 * margin + rows * stride,), float("nan"), dtype=dtype, device=device)
    packed = memory[margin : margin + rows * stride].view(rows, stride)[:, : width + behind]
    values = torch.randn(rows, width, generator=generator)
    values[1::3] *= 60.0
    packed[:, :width] = values.to(device)
    angle = 20 * torch.rand(rows, pairs, generator=generator)
    case = RotaryCase(memory, packed, angle.cos().to(device), angle.sin().to(device), shape)
    return case


def rotated_pair(
    x: Tensor, y: Tensor, cosine: Tensor, sine: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """By plain torch, in the dtype of x; cosine and sine are [R, pairs]."""
    cosine, sine = cosine.to(x.dtype)[:, None], sine.to(x.dtype)[:, None]
    sine = -sine if inverse else sine
    return x * cosine - y * sine, x * sine + y * cosine


def check_rotation(backend: str, case: RotaryCase) -> float:
    """Against float64; what is not rotated stays to the bit, and the inverse leads back."""
    worst = 0.0
    bits = case.memory.view(torch.uint8)
    before = case.memory.clone()
    for interleaved, inverse in FLAGS:
        case.memory.copy_(before)
        x, y = case.pairs(interleaved)
        first = (x.clone(), y.clone())
        magnitude = x.double().abs() + y.double().abs()
        exact, plain = (
            rotated_pair(*each, case.cosine, case.sine, inverse)
            for each in ((x.double(), y.double()), first)
        )
        case.rotate(backend, interleaved, inverse)
        for results in zip((x, y), exact, plain, strict=True):
            worst = max(worst, assert_close_to_oracle(*results, magnitude, "rotated"))
        plain = rotated_pair(*plain, case.cosine, case.sine, not inverse)
        case.rotate(backend, interleaved, not inverse)
        for actual, there, back in zip((x, y), first, plain, strict=True):
            results = (actual, there.double(), back, magnitude)
            worst = max(worst, assert_close_to_oracle(*results, "rotated there and back"))
        x.copy_(first[0])
        y.copy_(first[1])
        assert torch.equal(bits, before.view(torch.uint8)), "what is not rotated has changed"
    return worst


def check_rotations(backend: str, dtype: torch.dtype, device: torch.device = CPU) -> float:
    return max(check_rotation(backend, make_rotary(shape, dtype, device)) for shape in SHAPES)
