"""The only tolerance of the tests: a backend may err twice as much as plain torch in the same
dtype, plus four rounding units of the natural size of the result. Nothing is tuned by hand.
"""

import torch
from torch import Tensor


def assert_close_to_oracle(
    actual: Tensor, oracle: Tensor, same_dtype: Tensor, magnitude: Tensor, name: str = "result"
) -> None:
    """Compares the maximum and the mean error with their budgets.

    Args:
        actual: the result under test.
        oracle: float64 result on the same quantised inputs.
        same_dtype: what plain torch computes in the dtype of `actual`.
        magnitude: the oracle's expression on absolute values, float64: the size of its rounding.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {actual.shape}, oracle {oracle.shape}"
    assert actual.dtype == same_dtype.dtype, f"{name}: {actual.dtype}, torch {same_dtype.dtype}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: {(~torch.isfinite(actual)).sum()} not finite"
    error = (actual.double() - oracle).abs()
    torch_error = (same_dtype.double() - oracle).abs()
    epsilon = torch.finfo(actual.dtype).eps
    for statistic in (torch.max, torch.mean):
        budget = 2 * statistic(torch_error) + 4 * epsilon * statistic(magnitude)
        assert statistic(error) <= budget, (
            f"{name}: {statistic.__name__} error {statistic(error):.3e} exceeds {budget:.3e} "
            f"(plain torch {statistic(torch_error):.3e}, magnitude {statistic(magnitude):.3e}), "
            f"worst at {torch.unravel_index(error.argmax(), error.shape)}"
        )
