"""What only interpreted Triton can show: accesses out of bounds, fp16, the split of the batch."""

import pytest
import torch

from ptv2_fast.ops.attention import prefix_attention
from ptv2_kernels.backward_prefix import count_splits
from ptv2_kernels.configs import ARCHITECTURES, shipped_config, tile_widths
from ptv2_kernels.forward import launch_forward
from ptv2_kernels.measured import KERNELS
from tests.attention_checks import check
from tests.devices import KERNEL_DEVICE, interpreted
from tests.elementwise_cases import calls_of, make_case, operator, run_all
from tests.elementwise_checks import make_variant
from tests.inputs import Shape, make_inputs
from tests.oracle import run_backend
from tests.rotary_checks import RotaryShape, check_rotations, make_rotary
from tests.triton_interpreter import bounds_checked


@interpreted
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("shape", [Shape(2, 2, 35, 33, 7, 24), Shape(1, 1, 3, 0, 2, 8)], ids=str)
def test_kernels_stay_inside_their_tensors(shape):
    with bounds_checked():
        check(["triton"], shape, torch.float32, "random", 0.2, 0.2, gate="closed")
        check(["triton"], shape, torch.bfloat16, "none", 0.0, 0.0, strides="sliced")


@interpreted
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_kernels_stay_inside_banks_biases_and_sequences(packed):
    """Behind the lengths of the bank stands NaN, and in the packed layout behind every row."""
    shape = Shape(3, 4, 35, 35, 35, 24, group=2)
    inputs = make_inputs(
        shape, torch.float32, "random", bank=2, bias="holes", rows="both", packed=packed, lse=True,
        strides="sliced" if packed else "hf",
    )  # fmt: skip
    expected = run_backend(inputs, "reference", 0.1, 0.1)
    for row, length in enumerate(inputs.prefix_lengths.tolist()):
        inputs.prefix_key[row, :, length:] = inputs.prefix_value[row, :, length:] = float("nan")
    with bounds_checked():
        actual = run_backend(inputs, "triton", 0.1, 0.1)
    for name in actual._fields:
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), msg=name)


@interpreted
@pytest.mark.parametrize("argument", ["prefix_key", "prefix_lengths", "cu_seqlens", "bias"])
def test_bounds_check_sees_an_access_outside(argument):
    """The check itself can fail: on lengths one too large, and on tensors one row too short.

    Each tensor is copied to its own memory, at whose end an access must be noticed.
    """
    inputs = make_inputs(
        Shape(1, 1, 4, 4, 3, 16), torch.float32, bank=1, bias="shared", packed=True
    )
    query, key, value, prefix_key, prefix_value = (x.clone() for x in inputs.raw_tensors)
    options = inputs.raw_options()
    starts = torch.tensor([0, query.shape[0]], dtype=torch.int32)
    options = options._replace(
        prefix_lengths=torch.tensor([3], dtype=torch.int32), cu_seqlens=starts
    )
    if argument == "prefix_key":
        prefix_key = prefix_key[:, :, :2].clone()
    elif argument == "prefix_lengths":
        options = options._replace(prefix_lengths=options.prefix_lengths + 1)
    elif argument == "cu_seqlens":
        options = options._replace(cu_seqlens=starts + 1)
    else:
        options = options._replace(bias=options.bias[:, :, : query.shape[0] - 1].clone())
    with bounds_checked(), pytest.raises(Exception, match="outside every argument"):
        launch_forward(query, key, value, prefix_key, prefix_value, *options)


@interpreted
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("variant", ["layer-extras-dropout", "rms-bare-dropout"])
def test_elementwise_kernels_stay_inside_their_tensors(variant):
    """Also where neither rows nor columns fill a tile."""
    with bounds_checked():
        run_all("triton", make_variant((9, 300), "mixed", variant))
        run_all("triton", make_variant((3, 5), "fp32", variant))


def test_elementwise_arguments_that_do_not_fit_are_refused():
    case = make_case((9, 300), "fp32", device=KERNEL_DEVICE)
    calls = {name: arguments for name, arguments in calls_of(case) if "activation" not in name}
    gated, gated_bias = case.doubled
    calls["bias_activation"] = (case.input, case.bias, "silu")
    calls["bias_activation_backward"] = (case.total, *calls["bias_activation"])
    calls["gated_activation"] = (gated, gated_bias, "silu", True)
    calls["gated_activation_backward"] = (case.total, *calls["gated_activation"])
    for name, arguments in calls.items():
        for index, short in enumerate(arguments):
            is_free = name.startswith("dropout_backward") and index == 0
            if isinstance(short, torch.Tensor) and short.numel() > 1 and not is_free:
                wrong = (*arguments[:index], short[..., :-1], *arguments[index + 1 :])
                with pytest.raises(ValueError, match="expected"):
                    operator("triton", name)(*wrong)


@interpreted
def test_rotation_stays_inside_its_rows():
    """NaN lies around them, and must be there afterwards; angles are not read beyond their end."""
    with bounds_checked():
        for dtype in (torch.bfloat16, torch.float16):
            check_rotations("triton", dtype)


def test_rotation_that_would_write_elsewhere_is_refused():
    case = make_rotary(RotaryShape(5, 2, 20, 7), torch.float32, KERNEL_DEVICE)
    packed, cosine, sine = case.packed, case.cosine, case.sine
    for message, arguments in (
        ("heads, head_dim: expected at most 40 columns", (packed, cosine, sine, 3, 20)),
        ("packed: expected last stride 1", (packed.T, cosine, sine, 1, 5)),
        ("packed: expected rows that lie", (packed[:1].expand(5, -1), cosine, sine, 2, 20)),
        ("cosine: expected at most 5 columns", (packed, cosine, sine, 4, 10)),
        ("cosine: expected shape", (packed, cosine[1:], sine, 2, 20)),
        ("sine: expected shape", (packed, cosine, sine[:, 1:], 2, 20)),
    ):
        with pytest.raises(ValueError, match=message):
            operator("triton", "rotate_")(*arguments, False, False)


@pytest.mark.usefixtures("nan_filled_empty")
def test_fp16_matches_oracle():
    check(["triton"], Shape(2, 2, 20, 20, 5, 64), torch.float16, "right padding", 0.1, 0.0)


@pytest.mark.parametrize("scale", [0.0, -0.25])
def test_scale_may_be_zero_or_negative(scale):
    """The kernels compare scores before scaling them where the scale is positive."""
    shape = Shape(2, 2, 20, 20, 5, 32)
    inputs = make_inputs(shape, torch.float32, "right padding", device=KERNEL_DEVICE)
    results = []
    for backend in ("reference", "triton"):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs.tensors]
        out = prefix_attention(*leaves, key_mask=inputs.key_mask, scale=scale, backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, inputs.grad_out)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("prefix_length", [1, 16, 17, 32, 33, 64, 65])
def test_prefixes_of_every_tile_size_match_oracle(prefix_length):
    shape = Shape(2, 2, 9, 9, prefix_length, 16)
    check(["triton"], shape, torch.float32, "random", 0.1, 0.1)


def test_partials_do_not_grow_with_the_batch():
    assert count_splits(batch=4096, programs=12, multiprocessors=108) == 18
    assert count_splits(batch=3, programs=12, multiprocessors=108) == 3
    assert count_splits(batch=64, programs=256, multiprocessors=108) == 1


def test_every_head_dim_has_a_config():
    for kernel in KERNELS:
        for head_dim in range(8, 257, 8):
            widths = tile_widths(head_dim)
            assert head_dim <= sum(widths) and all(width >= 16 for width in widths)
            for architecture in ARCHITECTURES:
                for element_size in (2, 4):
                    config = shipped_config(kernel, head_dim, element_size, architecture)
                    assert config.block_queries % 16 == config.block_keys % 16 == 0


def test_two_widths_leave_little_padding():
    assert [tile_widths(d) for d in (64, 80, 96, 128)] == [(64,), (64, 16), (64, 32), (128,)]
    assert [tile_widths(d) for d in (40, 160, 192)] == [(32, 16), (128, 64), (128, 64)]
    assert max(sum(tile_widths(d)) / d for d in range(160, 257, 8)) < 1.29


def test_splits_of_the_batch_cover_every_sequence():
    """Seven sequences, one head; the interpreter has sixteen programs for them: uneven splits."""
    whole = make_inputs(Shape(7, 1, 5, 5, 3, 16), torch.float32, device=KERNEL_DEVICE)
    together = run_backend(whole, "triton", 0.0, 0.0)
    exact = run_backend(whole, "reference", 0.0, 0.0)
    torch.testing.assert_close(together.grad_prefix_key, exact.grad_prefix_key)
