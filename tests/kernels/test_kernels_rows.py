"""Rows of arenas: packed, unpacked, copied and cleared, bit for bit, whatever the pieces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from djinn_fx.kernels.rows import Rows
from tests.kernels.rows_cases import SHAPES, arenas, check_all


@given(
    kind=st.sampled_from(sorted(SHAPES)),
    positions=st.integers(1, 9),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_on_the_cpu(kind: str, positions: int, data: st.DataObject, dtype: torch.dtype) -> None:
    count = data.draw(st.integers(0, positions))
    limit = data.draw(st.integers(1, 4000))
    rows = Rows(arenas(kind, positions, dtype=dtype))
    check_all(rows, count, limit)
    widest = max(arena.shape[3] * arena.itemsize for arena in rows.arenas)
    assert all(piece.nbytes <= max(limit, widest) for piece in rows.pieces(count, limit))


def test_no_arenas() -> None:
    rows = Rows([])
    assert rows.width == 0 and rows.pieces(5, 10) == []
    rows.copy(0, [1], 3)
    rows.clear(0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", sorted(SHAPES))
@pytest.mark.parametrize(("positions", "count"), [(9, 1), (9, 9), (1300, 1024), (5000, 4999)])
@pytest.mark.parametrize("limit", [1 << 30, 70000, 4096])
def test_on_a_gpu(kind: str, positions: int, count: int, limit: int, dtype: torch.dtype) -> None:
    check_all(Rows(arenas(kind, positions, "cuda", dtype)), count, limit)


@pytest.mark.gpu
def test_far_into_an_arena_beyond_two_to_the_31() -> None:
    arena = torch.zeros(40, 8, 4096, 2048, dtype=torch.bfloat16, device="cuda")  # 134 MB a row
    arena[-1].normal_()
    rows = Rows([arena])
    rows.copy(39, [1, 38], 4096)
    assert torch.equal(arena[38], arena[39]) and torch.equal(arena[1], arena[39])
    rows.clear(39)
    assert not arena[39].any() and arena[38].any()
