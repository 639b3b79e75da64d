"""The Triton attention kernels, interpreted on the CPU, against the definition; run by test_interpreted.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from djinn_fx.kernels import triton_attention, triton_prefill
from djinn_fx.kernels.triton_attention import decode
from djinn_fx.kernels.triton_prefill import prefill
from tests.kernels.attention_cases import NAN, Case, make_case, on_poison, reference, same_bits

DECODE = [(4, 5), (0, 1), (0, 0), (69, 70), (16, 17)]
PREFILL = [(0, 9), (5, 42), (0, 0), (30, 31), (3, 14)]

#: Small, so that short rows have several runs and blocks.
RUNS = triton_attention.Tiles(splits=4, run=16, keys=8, warps=4, stages=1)
BLOCKS = triton_prefill.Tiles(queries=16, keys=8, warps=4, stages=1)

SIZES: dict[str, dict[str, Any]] = {"even": {}, "odd": {"heads": 6, "groups": 3, "depth": 7, "value_depth": 20}}

EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 6},
    "window of one": {"window": 1},
    "all": {"window": 50, "softcap": 2.0, "sinks": True},
}


def close(found: torch.Tensor, case: Case) -> None:
    slack = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-5}[found.dtype]
    torch.testing.assert_close(found.double(), reference(case), rtol=slack, atol=slack / 10, equal_nan=True)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("sizes", SIZES)
def test_decode(sizes: str, extra: str) -> None:
    case = make_case(DECODE, **SIZES[sizes], **EXTRAS[extra])
    close(on_poison(decode, case, cut=RUNS), case)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("sizes", SIZES)
def test_prefill(sizes: str, extra: str) -> None:
    case = make_case(PREFILL, query=45, **SIZES[sizes], **EXTRAS[extra])
    close(on_poison(prefill, case, cut=BLOCKS), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype: torch.dtype) -> None:
    for kernel, spans in ((decode, DECODE), (prefill, PREFILL)):
        case = make_case(spans, dtype=dtype)
        close(on_poison(kernel, case), case)


def test_positions_beyond_the_arena_are_not_read() -> None:
    """They would be an error of ours; the kernels must not leave the arena for it."""
    case = make_case([(4, 5)], arena_positions=5)
    assert on_poison(decode, replace(case, positions=case.positions + 90, lengths=case.lengths + 90)).isfinite().all()
    case = make_case([(0, 5)], arena_positions=5)
    out = on_poison(prefill, replace(case, lengths=case.lengths + 90))
    close(out, case)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of Inf minus Inf
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("wild", [float("inf"), float("-inf"), NAN])
def test_wild_values_reach_only_the_queries_that_see_them(wild: float, window: int | None) -> None:
    case = make_case([(2, 12), (0, 8)], window=window)
    calm = on_poison(prefill, case, cut=BLOCKS)
    spoil(case, wild)
    out = on_poison(prefill, case, cut=BLOCKS)
    close(out, case)
    assert same_bits(out[0, :4], calm[0, :4])  # positions 2 to 5
    assert same_bits(out[1], calm[1])
    assert not out[0, 4].isfinite().all()


def spoil(case: Case, wild: float) -> None:
    row = int(case.rows[0])
    case.v_arena[row, 1, 6, 2] = wild
    case.v_arena[row, 0, 9, 3] = -wild
    case.k_arena[row, 1, 10, 0] = wild
