"""The Triton cache write on a GPU."""

from __future__ import annotations

import pytest
import torch

from djinn_fx.kernels import triton_kv
from tests.kernels.test_kernels_kv import check

STEPS = [
    ([(0, 1), (11, 12), (0, 0), (4, 5)], [3, 0, 5, 1], 1),
    ([(0, 4), (3, 5), (0, 0), (0, 12)], [4, 0, 2, 5], 13),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("spans", "rows", "query"), STEPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("groups", "dims"), [(12, (64, 64)), (8, (128, 128)), (1, (256, 256)), (5, (192, 80)), (128, (7, 3))]
)
def test_every_size(
    groups: int, dims: tuple[int, int], dtype: torch.dtype, spans: list[tuple[int, int]], rows: list[int], query: int
) -> None:
    check(spans, rows, query, "cuda", dtype, groups=groups, dims=dims, write=triton_kv.kv_write)


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    arena = torch.zeros(260, 8, 8209, 128, dtype=torch.bfloat16, device="cuda")
    new = torch.ones(1, 8, 1, 128, dtype=torch.bfloat16, device="cuda")
    rows, positions = torch.tensor([258], device="cuda"), torch.tensor([[8000]], device="cuda")
    assert arena[258].data_ptr() - arena.data_ptr() > 2 * 2**31
    triton_kv.kv_write(arena, arena, new, new, rows, positions, positions[:, 0] + 1)
    assert arena[258, :, 8000].eq(1).all()
    arena[258, :, 8000] = 0
    assert not arena.any()
