"""Rows of arenas by the kernel, interpreted on the CPU; run by test_interpreted.py."""

from __future__ import annotations

import pytest
import torch

from djinn_fx.kernels import triton_rows
from djinn_fx.kernels.rows import Rows
from tests.kernels.rows_cases import arenas, check_all


@pytest.mark.parametrize("kind", ["alike", "mixed"])
@pytest.mark.parametrize(("positions", "count"), [(1, 1), (9, 7), (9, 9)])
@pytest.mark.parametrize("limit", [1 << 20, 900, 48])
def test_the_kernel(kind: str, positions: int, count: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "TILE", 128)  # several tiles for a run
    monkeypatch.setattr(Rows, "_by_kernel", lambda rows: True)
    check_all(Rows(arenas(kind, positions, dtype=torch.float64)), count, limit)
