"""What the operator makes of arguments at and beyond their limits."""

import numpy as np
import pytest
import torch

from ptv2_fast.ops.attention import prefix_attention, prefix_attention_with_lse


def make_tensors(batch: int = 2, tokens: int = 9) -> list[torch.Tensor]:
    """Query, key, value, prefix_key and prefix_value that want gradients."""
    torch.manual_seed(0)
    shapes = [(batch, 2, tokens, 16)] * 3 + [(2, 3, 16)] * 2
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def out_and_gradients(tensors, **options) -> list[torch.Tensor]:
    out = prefix_attention(*tensors, **options)
    return [out, *torch.autograd.grad(out.square().sum(), tensors)]


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**63 - 8, 2**63, 2**70])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_window_wider_than_the_tokens_hides_nothing(backend, window):
    tensors = make_tensors()
    expected = out_and_gradients(tensors, backend=backend)
    for actual, exact in zip(
        out_and_gradients(tensors, backend=backend, window=window), expected, strict=True
    ):
        torch.testing.assert_close(actual, exact)


BAD = [[0.1], "0.1", np.zeros(1), object(), True]


@pytest.mark.parametrize("name", ["scale", "dropout_p", "prefix_dropout_p"])
@pytest.mark.parametrize(
    "value",
    [*BAD, float("nan"), float("inf"), torch.tensor(0.1)],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_number_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got"):
        prefix_attention(*make_tensors(), **{name: value})


@pytest.mark.parametrize("name", ["dropout_p", "prefix_dropout_p"])
def test_no_probability_is_named(name):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got None"):
        prefix_attention(*make_tensors(), **{name: None})


@pytest.mark.parametrize("name", ["seed", "key_mask", "bias", "context_lengths", "cu_seqlens"])
@pytest.mark.parametrize("value", [*BAD, 7], ids=lambda value: type(value).__name__)
def test_what_is_no_tensor_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got"):
        prefix_attention(*make_tensors(), **{name: value})


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("value", [*BAD, None], ids=lambda value: type(value).__name__)
def test_operands_are_tensors(position, value):
    tensors = make_tensors()
    tensors[position] = value
    names = ("query", "key", "value", "prefix_key", "prefix_value")
    with pytest.raises(ValueError, match=f"^{names[position]}: expected a tensor, got"):
        prefix_attention(*tensors)


@pytest.mark.parametrize("sizes", [(0, 4), (2, 0), (0, 0)])
@pytest.mark.parametrize("backend", ["reference", "cpp", "split"])
def test_nothing_has_gradients_of_nothing(backend, sizes):
    tensors = make_tensors(*sizes)
    out, *gradients = out_and_gradients(tensors, backend=backend)
    assert out.shape == tensors[0].shape
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("backend", ["reference", "cpp", "split", "triton"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_score_of_nan_is_nan_in_its_rows_alone(backend, masked):
    tensors = [tensor.detach() for tensor in make_tensors()]
    options = {"backend": backend}
    if masked:  # one column remains
        options["key_mask"] = torch.arange(9).expand(2, 9) == 4
        tensors[1][:, :, 7] = float("nan")  # seen by nobody
    tensors[0][1, 0, 3, 5] = float("nan")
    out, lse = prefix_attention_with_lse(*tensors, **options)
    expected = torch.zeros(2, 2, 9, dtype=torch.bool)
    expected[1, 0, 3] = True
    assert torch.equal(lse.isnan(), expected)
    assert torch.equal(out.isnan(), expected[..., None].expand(out.shape))
    tensors[0].nan_to_num_()
    tensors[3][1] = float("nan")  # every score of one segment
    out, lse = prefix_attention_with_lse(*tensors, **options)
    assert out[:, 1].isnan().all() and lse[:, 1].isnan().all()
    assert not out[:, 0].isnan().any()
