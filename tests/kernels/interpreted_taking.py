"""The Triton kernel that takes values over, interpreted on the CPU; run by test_interpreted.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from djinn_fx.kernels.triton_taking import take
from tests.kernels.taking_cases import DTYPES, SIZES, check, check_longer, check_strided


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_or_not(dtype: torch.dtype, size: int) -> None:
    check(_take, dtype, size, "cpu")


def test_another_order_of_elements() -> None:
    check_strided(lambda value, before, own, differs: _take(value.contiguous(), before, own, differs), "cpu")


def test_what_goes_on_behind_the_value() -> None:
    check_longer(_take, "cpu")


def _take(value: Tensor, before: Tensor, own: Tensor, differs: Tensor) -> None:
    if value.is_complex():
        value, before = torch.view_as_real(value), torch.view_as_real(before)
    own = torch.view_as_real(own) if own.is_complex() else own
    take(value, before, own, differs, {})
