"""The Triton end of a decode step, interpreted on the CPU; run by test_interpreted.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from djinn_fx.kernels.triton_advance import advance, begin
from tests.kernels.advance_cases import check, check_beginning, check_taking


@pytest.mark.parametrize("vocab", [2, 50, 2048, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_steps(vocab: int, dtype: torch.dtype) -> None:
    check(advance, vocab, dtype, "cpu")


def test_beginning() -> None:
    check_beginning(partial(begin, kernels={}), "cpu")


def test_taking() -> None:
    check_taking(partial(begin, kernels={}), "cpu")
