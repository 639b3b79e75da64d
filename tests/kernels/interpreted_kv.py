"""The Triton cache write, interpreted on the CPU; run by test_interpreted.py."""

from __future__ import annotations

import pytest
import torch

from djinn_fx.kernels import triton_kv
from djinn_fx.kernels.triton_kv import kv_write
from tests.kernels.test_kernels_kv import check

STEPS = [
    ([(0, 1), (11, 12), (0, 0), (4, 5)], [3, 0, 5, 1], 1),
    ([(0, 4), (3, 5), (0, 0), (0, 12)], [4, 0, 2, 5], 13),
]


@pytest.mark.parametrize(("spans", "rows", "query"), STEPS)
def test_steps(spans: list[tuple[int, int]], rows: list[int], query: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(spans, rows, query, "cpu", write=kv_write)
    monkeypatch.setattr(triton_kv, "BLOCK", 16)  # several programs per token
    check(spans, rows, query, "cpu", torch.bfloat16, groups=5, dims=(7, 16), write=kv_write)


def test_positions_beyond_the_arena_are_not_written() -> None:
    arena, new = torch.zeros(2, 1, 5, 2), torch.ones(1, 1, 3, 2)
    rows, positions = torch.tensor([0]), torch.tensor([[3, 4, 5]])
    kv_write(arena, arena.clone(), new, new, rows, positions, torch.tensor([6]))
    assert arena.sum() == 2
    assert arena[0, 0, 3].eq(1).all()
