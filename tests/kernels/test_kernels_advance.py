"""The end of a decode step: the torch twin here, the Triton kernels on a GPU."""

from __future__ import annotations

import pytest
import torch

from djinn_fx.kernels.advance import Beginning, advance
from tests.kernels.advance_cases import check, check_beginning, check_letters, check_taking

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("vocab", [2, 50, 5003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps(vocab: int, dtype: torch.dtype) -> None:
    check(advance, vocab, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [2, 50, 2048, 50257, 128256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_on_a_gpu(vocab: int, dtype: torch.dtype) -> None:
    check(advance, vocab, dtype, "cuda")


def test_beginning() -> None:
    check_beginning(Beginning, "cpu")


@pytest.mark.gpu
def test_beginning_on_a_gpu() -> None:
    check_beginning(Beginning, "cuda")


def test_taking() -> None:
    check_taking(Beginning, "cpu")


@pytest.mark.gpu
def test_taking_on_a_gpu() -> None:
    check_taking(Beginning, "cuda")


def test_letters() -> None:
    check_letters(Beginning, "cpu")


@pytest.mark.gpu
def test_letters_on_a_gpu() -> None:
    check_letters(Beginning, "cuda")
