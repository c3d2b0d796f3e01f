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
    with pytest.raises(ValueError, match=f"^{OPERANDS[position]}: expected a tensor, got"):
        prefix_attention(*tensors)


TENSOR_LIKE = {
    "csr": torch.eye(9).to_sparse_csr(),
    "coo": torch.ones(2, 2, 9, 16).to_sparse(),
    "mkldnn": torch.ones(2, 2, 9, 16).to_mkldnn(),
    "nested": torch.nested.nested_tensor([torch.ones(2, 9, 16), torch.ones(2, 5, 16)]),
}
OPERANDS = ("query", "key", "value", "prefix_key", "prefix_value")
TENSORS = (
    "key_mask", "seed", "context_lengths", "cu_seqlens", "prefix_index", "prefix_lengths", "bias",
    "prefix_gate",
)  # fmt: skip


@pytest.mark.parametrize("kind", TENSOR_LIKE)
def test_tensors_of_another_layout_are_named(kind):
    for position, name in enumerate(OPERANDS):
        tensors = make_tensors()
        tensors[position] = TENSOR_LIKE[kind]
        with pytest.raises(ValueError, match=f"^{name}: expected .* layout torch.strided, got"):
            prefix_attention(*tensors)
    for name in TENSORS:
        with pytest.raises(ValueError, match=f"^{name}: expected .* layout torch.strided, got"):
            prefix_attention(*make_tensors(), **{name: TENSOR_LIKE[kind]})


@pytest.mark.parametrize("position", range(5))
def test_a_tensor_without_dimensions_is_named(position):
    tensors = make_tensors()
    tensors[position] = torch.tensor(1.0)
    with pytest.raises(ValueError, match=f"^{OPERANDS[position]}: expected .*, got"):
        prefix_attention(*tensors)


LONG = [TENSOR_LIKE["nested"], np.zeros((9, 9)), [[1] * 9] * 99, "x" * 999]
NAMES = (
    *TENSORS, "window", "scale", "dropout_p", "prefix_dropout_p", "max_seqlen", "check", "backend",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in NAMES for value in LONG),
        *((name, torch.ones(2, 2, 9, 16)) for name in NAMES if name not in TENSORS),
        *((name, 10**5000) for name in NAMES if name != "window"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else type(value).__name__,
)
def test_a_long_value_is_not_written_out(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got") as error:
        prefix_attention(*make_tensors(), **{name: value})
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_a_generous_max_seqlen_costs_nothing(backend):
    tensors = [tensor.detach() for tensor in make_tensors()]
    packed = [tensor.transpose(1, 2).reshape(18, 2, 16) for tensor in tensors[:3]]
    starts = torch.tensor([0, 9, 18], dtype=torch.int32)
    results = [
        prefix_attention(
            *packed, *tensors[3:], cu_seqlens=starts, max_seqlen=longest, backend=backend
        )
        for longest in (18, 2**31 - 1)
    ]
    assert torch.equal(*results)
    with pytest.raises(ValueError, match=r"^max_seqlen: expected an integer in 0..2\*\*31-1, got"):
        prefix_attention(*packed, *tensors[3:], cu_seqlens=starts, max_seqlen=2**31)


@pytest.mark.parametrize("backend", ["reference", "cpp", "split", "triton"])
def test_an_infinite_score_is_nan_in_its_rows(backend):
    tensors = [tensor.detach() for tensor in make_tensors()]
    tensors[0].abs_()
    tensors[1][0, 1, 3] = float("inf")
    for result in prefix_attention_with_lse(*tensors, backend=backend):
        assert result[0, 1].isnan().all() and result.isnan().sum() == result[0, 1].numel()


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
        tensors[1][:, :, 7] = float("nan")  # visible to no row
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
