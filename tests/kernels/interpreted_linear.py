"""Linear layers by the kernels, interpreted on the CPU; run by test_interpreted.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from djinn_fx.kernels.linear import Tiles
from djinn_fx.kernels.triton_linear import launch, linears
from tests.bits import assert_same_bits
from tests.kernels.linear_cases import check_close, make_call

DTYPES = [torch.bfloat16, torch.float16]
#: The interpreter cuts fp32 off where it makes bf16 of it.
CUT = 1.0
LAYOUTS = pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 33])
def test_rows(rows: int, dtype: torch.dtype, transposed: bool) -> None:
    call = make_call(rows, 72, [40, 16, 24], transposed=transposed, biased=[True, False, True], dtype=dtype)
    check_close(call, linears(*call), units=CUT)


@LAYOUTS
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("depth", [96, 136])
def test_every_cut(depth: int, turned: bool, splits: int, transposed: bool) -> None:
    x, weights, biases, _ = call = make_call(5, depth, [48, 16, 32, 64], transposed=transposed, biased=True)
    cut = Tiles(16, columns=16, depth=32, warps=4, stages=1, splits=splits, turned=turned)
    check_close(call, launch(x, weights, biases, transposed, cut), units=CUT)
    one = (x[:1], weights, biases, call[3])
    for alone in (cut, replace(cut, rows=1)):
        check_close(one, launch(one[0], weights, biases, transposed, alone), units=CUT)


@LAYOUTS
def test_rows_do_not_see_each_other(transposed: bool) -> None:
    x, weights, biases, layouts = make_call(9, 64, [32, 48], transposed=transposed, biased=True)
    wanted = linears(x, weights, biases, layouts)
    order = torch.randperm(9)
    others = x[order].repeat(2, 1, 1)[:16]
    others[9:] = float("nan")
    for part, found in zip(wanted, linears(others, weights, biases, layouts), strict=True):
        assert_same_bits(found[:9], part[order])
    for index, part in enumerate(wanted):
        alone = linears(x[:2], weights[index:][:1], biases[index:][:1], layouts[:1])[0]
        assert_same_bits(alone, part[:2])


def test_layouts_and_strides_may_be_mixed() -> None:
    call = make_call(3, 64, [32, 48, 16], transposed=[True, False, True], biased=[False, True, False])
    check_close(call, linears(*call), units=CUT)
    x, weights, biases, layouts = call
    shifted = torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape)
    spread = torch.stack((x, x), -1)[..., 0]
    for other in (shifted, spread):
        for found, wanted in zip(linears(other, weights, biases, layouts), linears(*call), strict=True):
            assert_same_bits(found, wanted)


@LAYOUTS
@pytest.mark.parametrize(
    ("rows", "depth", "widths"), [(1, 768, [192]), (9, 768, [192]), (64, 1600, [48, 80]), (3, 4352, [80])]
)
def test_the_tables_own_cuts(depth: int, widths: list[int], rows: int, transposed: bool) -> None:
    """Split or not, and where ``K`` is no multiple of what is looked at together."""
    call = make_call(rows, depth, widths, transposed=transposed, biased=True)
    check_close(call, linears(*call), units=CUT)
