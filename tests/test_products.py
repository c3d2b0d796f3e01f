"""Products with a frozen matrix: by whichever library a processor has."""

import pytest
import torch

from ptv2_fast.frozen import linear as products
from tests.closeness import assert_close_to_oracle


@pytest.mark.parametrize("is_intel", [True, False], ids=["intel", "others"])
@pytest.mark.parametrize("columns", [32, 384])
@pytest.mark.parametrize("transposed", [False, True])
def test_both_libraries_give_the_product(is_intel, columns, transposed, monkeypatch):
    monkeypatch.setattr(products, "_is_intel", lambda: is_intel)
    monkeypatch.setattr(products, "_OF_ONEDNN", products._dtypes_of_onednn())
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(200, 96, generator=generator)
    weight = torch.randn(96, columns, generator=generator).t()
    if not transposed:
        weight = weight.contiguous()
    bias = torch.randn(columns, generator=generator)
    for added in (None, bias):
        terms = [input, weight] if added is None else [input, weight, added]
        oracle = torch.nn.functional.linear(*(each.double() for each in terms))
        magnitude = torch.nn.functional.linear(*(each.double().abs() for each in terms))
        plain = torch.nn.functional.linear(*terms)
        assert_close_to_oracle(products.linear(*terms), oracle, plain, magnitude)


def test_float32_goes_to_onednn_where_mkl_is_slow(monkeypatch):
    if not products._dtypes_of_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for is_intel in (True, False):
        monkeypatch.setattr(products, "_is_intel", lambda found=is_intel: found)
        assert (torch.float32 in products._dtypes_of_onednn()) is not is_intel
