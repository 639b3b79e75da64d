"""Values taken over: the torch twin here, the Triton kernel on a GPU."""

from __future__ import annotations

import pytest
import torch

from djinn_fx.kernels.taking import Taking
from tests.kernels.taking_cases import DTYPES, SIZES, check, check_longer, check_strided


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_or_not(dtype: torch.dtype, size: int) -> None:
    check(Taking(), dtype, size, "cpu")


def test_another_order_of_elements() -> None:
    check_strided(Taking(), "cpu")


def test_what_goes_on_behind_the_value() -> None:
    check_longer(Taking(), "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_or_not_on_a_gpu(dtype: torch.dtype) -> None:
    take = Taking()  # the kernels that one size finds serve the next
    for size in (*SIZES, 1_000_000):
        check(take, dtype, size, "cuda")
    check_strided(take, "cuda")
    check_longer(take, "cuda")
