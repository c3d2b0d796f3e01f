"""The only tolerance of the tests: a backend may err twice as much as plain torch in the same
dtype, plus four rounding units of the natural size of the result. Nothing is tuned by hand.

A rounding unit is the dtype's, with one exception: where torch may compute float32 products in
TF32 (on a GPU, by torch.set_float32_matmul_precision), it is 2^-10, and plain torch computes in
TF32 too. TF32 also rounds query and key, of which plain torch's own error tells; tensor cores cut
what others round, which errs twice as much at most. Three TF32 products are held to float32's rule.
"""

import torch
from torch import Tensor

TF32_EPSILON = 2.0**-10


def rounding_unit(tensor: Tensor) -> float:
    """The relative distance of neighbouring numbers that products of such tensors tell apart."""
    allows_tf32 = tensor.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    if tensor.dtype == torch.float32 and allows_tf32:
        return TF32_EPSILON
    return torch.finfo(tensor.dtype).eps


@torch.no_grad()
def assert_close_to_oracle(
    actual: Tensor, oracle: Tensor, same_dtype: Tensor, magnitude: Tensor, name: str = "result"
) -> float:
    """Compares the maximum and the mean error with their budgets.

    Args:
        actual: the result under test.
        oracle: float64 result on the same quantised inputs.
        same_dtype: what plain torch computes in the dtype of `actual`.
        magnitude: the oracle's expression on absolute values, float64: the size of its rounding.

    Returns:
        The larger of the two errors over their budgets, at most 1.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {actual.shape}, oracle {oracle.shape}"
    assert actual.dtype == same_dtype.dtype, f"{name}: {actual.dtype}, torch {same_dtype.dtype}"
    if actual.numel() == 0:
        return 0.0
    assert torch.isfinite(actual).all(), f"{name}: {(~torch.isfinite(actual)).sum()} not finite"
    error = (actual.double() - oracle).abs()
    torch_error = (same_dtype.double() - oracle).abs()
    epsilon = rounding_unit(actual)
    worst = 0.0
    for statistic in (torch.max, torch.mean):
        budget = 2 * statistic(torch_error) + 4 * epsilon * statistic(magnitude)
        assert statistic(error) <= budget, (
            f"{name}: {statistic.__name__} error {statistic(error):.3e} exceeds {budget:.3e} "
            f"(plain torch {statistic(torch_error):.3e}, magnitude {statistic(magnitude):.3e}), "
            f"worst at {torch.unravel_index(error.argmax(), error.shape)}"
        )
        if budget > 0:
            worst = max(worst, float(statistic(error) / budget))
    return worst
