"""The oracle itself: equal to torch's SDPA over concatenated columns, exactly differentiable."""

import numpy as np
import torch
import torch.nn.functional as F

from ptv2_fast.ops.dropout import dropout_multiplier, philox_4x32
from ptv2_fast.ops.reference import reference_attention
from tests.inputs import Shape, make_inputs


def test_reference_equals_sdpa_over_concatenated_columns():
    inputs = make_inputs(Shape(2, 3, 7, 9, 4, 16), torch.float64, "random")
    query, key, value, prefix_key, prefix_value = inputs.tensors
    out, lse = reference_attention(*inputs.raw_tensors, inputs.raw_options())
    keys = torch.cat((prefix_key.expand(2, -1, -1, -1), key), dim=2)
    values = torch.cat((prefix_value.expand(2, -1, -1, -1), value), dim=2)
    visible = torch.cat((torch.ones(2, 4, dtype=torch.bool), inputs.key_mask), dim=1)
    visible = visible[:, None, None]
    expected = F.scaled_dot_product_attention(query, keys, values, visible, scale=0.25)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    scores = (0.25 * query @ keys.mT).masked_fill(~visible, float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)


def test_reference_passes_gradcheck_with_dropout_and_empty_rows():
    inputs = make_inputs(Shape(2, 1, 3, 4, 0, 8), torch.float64, "empty rows")
    with_prefix = make_inputs(Shape(2, 2, 3, 4, 3, 8), torch.float64, "random")
    for case in (inputs, with_prefix):
        leaves = [(tensor / 4).requires_grad_() for tensor in case.raw_tensors]

        def attention(*tensors, case=case):
            return reference_attention(*tensors, case.raw_options(0.3, 0.2))

        assert torch.autograd.gradcheck(lambda *x: attention(*x)[0], leaves)


def philox_in_python_integers(counter, key):
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(7):
        product_0, product_1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product_1 >> 32) ^ c1 ^ k0,
            product_1 & 0xFFFFFFFF,
            (product_0 >> 32) ^ c3 ^ k1,
            product_0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def test_philox_matches_random123_known_answers():
    """The three vectors of Random123's kat_vectors for philox4x32-7."""
    ones = 0xFFFFFFFF
    digits_of_pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    known = [
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((ones,) * 4, (ones,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (digits_of_pi, (0xA4093822, 0x299F31D0), (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    ]
    for counter, key, expected in known:
        seed = torch.tensor([np.uint64(key[1] << 32 | key[0]).astype(np.int64).item()])
        words = philox_4x32(tuple(torch.tensor([word]) for word in counter), seed)
        assert [word.item() for word in words] == list(expected)
        assert philox_in_python_integers(counter, key) == list(expected)


def test_dropout_multiplier_follows_its_contract():
    """Column j of a group of eight reads word j // 2, the low half first."""
    seed = torch.tensor([(5 << 33) + 77])
    multiplier = dropout_multiplier((2, 3, 4, 21), 0.3, seed, 1, torch.float64)
    key = (seed.item() & 0xFFFFFFFF, seed.item() >> 32)
    for sequence, head, row, column in [(0, 0, 0, 0), (1, 2, 3, 20), (1, 0, 2, 13), (0, 2, 1, 7)]:
        words = philox_in_python_integers((column // 8, row, sequence * 3 + head, 1), key)
        half = words[column % 8 // 2] >> (16 * (column % 2)) & 0xFFFF
        expected = 1 / 0.7 if half >= round(65536 * 0.3) else 0.0
        assert multiplier[sequence, head, row, column].item() == expected
    large = dropout_multiplier((4, 4, 64, 64), 0.3, seed, 0, torch.float64)
    assert abs((large > 0).double().mean() - 0.7) < 4 * (0.3 * 0.7 / large.numel()) ** 0.5
