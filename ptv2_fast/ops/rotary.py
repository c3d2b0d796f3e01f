"""Rotary positions of packed heads, in place, in plain torch.

This definition is what the kernels of `ptv2::rotate_` are held to.
"""

from torch import Tensor

from ptv2_fast.ops.layout import widened


def rotate_(
    packed: Tensor,
    cosine: Tensor,
    sine: Tensor,
    heads: int,
    head_dim: int,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Rotates the first `heads` heads of every row; what lies behind them stays as it is.

    The first rotary_dim elements of a head are rotated in pairs, the others stay:
    (x, y) -> (x cos - y sin, x sin + y cos), computed in fp32 and rounded once.

    Args:
        packed: [R, at least heads * head_dim], the elements of a row without gaps, rows at any
            stride.
        cosine, sine: fp32 [R, rotary_dim / 2], contiguous; rotary_dim <= head_dim.
        interleaved: a pair is (2i, 2i + 1), and not (i, i + rotary_dim / 2).
        inverse: with -sine, which undoes the rotation and is its gradient.
    """
    pairs = cosine.shape[1]
    rotated = packed[:, : heads * head_dim].unflatten(1, (heads, head_dim))[..., : 2 * pairs]
    if interleaved:
        first, second = rotated.unflatten(2, (pairs, 2)).unbind(3)
    else:
        first, second = rotated.unflatten(2, (2, pairs)).unbind(2)
    x, y = widened(first), widened(second)
    cosine, sine = cosine[:, None], (-sine if inverse else sine)[:, None]
    results = x * cosine - y * sine, x * sine + y * cosine
    first.copy_(results[0])
    second.copy_(results[1])
