"""The Triton end of a decode step, interpreted on the CPU; run by test_interpreted.py."""

from __future__ import annotations

import pytest
import torch

from djinn_fx.kernels.advance import Beginning
from djinn_fx.kernels.triton_advance import advance
from tests.kernels.advance_cases import check, check_beginning, check_letters, check_taking


@pytest.mark.parametrize("vocab", [2, 50, 2048, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_steps(vocab: int, dtype: torch.dtype) -> None:
    check(advance, vocab, dtype, "cpu")


class Interpreted(Beginning):
    """Launches the kernel wherever its tensors lie."""

    @property
    def by_kernel(self) -> bool:
        return True


def test_beginning() -> None:
    check_beginning(Interpreted, "cpu")


def test_taking() -> None:
    check_taking(Interpreted, "cpu")


def test_letters() -> None:
    check_letters(Interpreted, "cpu")
