"""What only interpreted Triton can show: accesses out of bounds, fp16, the split of the batch."""

import pytest
import torch

from ptv2_kernels.backward_prefix import count_splits
from ptv2_kernels.configs import KERNELS, shipped_config
from tests.inputs import Shape, make_inputs
from tests.oracle import run_backend
from tests.test_prefix_attention import check
from tests.triton_interpreter import bounds_checked

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the kernels are compiled, not interpreted"
)


@interpreted
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("shape", [Shape(2, 2, 35, 33, 7, 24), Shape(1, 1, 3, 0, 2, 8)], ids=str)
def test_kernels_stay_inside_their_tensors(shape):
    with bounds_checked():
        check(["triton"], shape, torch.float32, "random", 0.2, 0.2)
        check(["triton"], shape, torch.bfloat16, "none", 0.0, 0.0, strides="sliced")


@interpreted
def test_bounds_check_sees_an_access_outside():
    """The check itself can fail: a prefix that claims one row more than it has."""
    inputs = make_inputs(Shape(1, 1, 4, 4, 3, 16), torch.float32)
    longer = torch.as_strided(inputs.prefix_key, (1, 3, 16), (48, 16, 1))
    with bounds_checked(), pytest.raises(Exception, match="outside every argument"):
        from ptv2_kernels.forward import launch_forward

        class Liar(torch.Tensor):
            @property
            def shape(self):
                return torch.Size((1, 4, 16))

        launch_forward(
            *inputs.tensors[:3], longer.as_subclass(Liar), inputs.prefix_value,
            None, None, 0.25, 0.0, 0.0,
        )  # fmt: skip


@pytest.mark.usefixtures("nan_filled_empty")
def test_fp16_matches_oracle():
    check(["triton"], Shape(2, 2, 20, 20, 5, 64), torch.float16, "right padding", 0.1, 0.0)


def test_partials_do_not_grow_with_the_batch():
    assert count_splits(batch=4096, heads=12, prefix_tiles=1, multiprocessors=108) == 18
    assert count_splits(batch=3, heads=12, prefix_tiles=1, multiprocessors=108) == 3
    assert count_splits(batch=64, heads=16, prefix_tiles=16, multiprocessors=108) == 1


def test_every_head_dim_has_a_config():
    for kernel in KERNELS:
        for head_dim in range(8, 257, 8):
            for amd in (False, True):
                for element_size in (2, 4):
                    config = shipped_config(kernel, head_dim, element_size, amd)
                    assert config.block_queries % 16 == config.block_keys % 16 == 0


def test_splits_of_the_batch_cover_every_sequence():
    """Seven sequences over the interpreter's sixteen programs, one head: uneven splits."""
    whole = make_inputs(Shape(7, 1, 5, 5, 3, 16), torch.float32)
    together = run_backend(whole, "triton", 0.0, 0.0)
    exact = run_backend(whole, "reference", 0.0, 0.0)
    torch.testing.assert_close(together.grad_prefix_key, exact.grad_prefix_key)
