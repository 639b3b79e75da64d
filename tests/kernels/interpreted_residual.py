"""Linear layers joined with their residuals by the kernels, interpreted on the CPU; run by test_interpreted.py."""

from __future__ import annotations

import pytest
import torch

from djinn_fx.kernels.linear import Tiles
from djinn_fx.kernels.triton_linear import launch, linear_residual, linears
from tests.bits import assert_same_bits
from tests.kernels.linear_cases import make_call
from tests.kernels.residual_cases import LEVELS, check_levels, joined, make_into

LAYOUTS = pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])


@LAYOUTS
@pytest.mark.parametrize(("rows", "depth", "width"), [(1, 768, 192), (3, 72, 40), (33, 768, 48)])
def test_every_level(rows: int, depth: int, width: int, transposed: bool) -> None:
    done = check_levels(linear_residual, linears, rows, depth, width, transposed=transposed, dtype=torch.float16)
    assert len(list(done)) == len(LEVELS)


@LAYOUTS
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rows", [1, 16])
def test_every_cut(rows: int, splits: int, transposed: bool) -> None:
    """Rows that are not there are neither read nor written."""
    x, weights, biases, _ = make_call(min(rows, 5), 96, [40], transposed=transposed, biased=True, dtype=torch.float16)
    cut = Tiles(rows, columns=16, depth=32, warps=4, stages=1, splits=splits)
    made = launch(x, weights, biases, transposed, cut)[0]
    into = make_into(len(x), 40, 3, dtype=x.dtype)
    wanted = joined(made, into)
    assert_same_bits(launch(x, weights, biases, transposed, cut, into=into)[0], wanted)
