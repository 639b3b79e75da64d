"""djinn::kv_write: valid tokens land at their positions, nothing else changes but spare positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import djinn_fx.kernels.ops  # noqa: F401 - registers the operators
from djinn_fx.kernels.kv import targets

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def check(
    spans: list[tuple[int, int]],
    rows: list[int],
    query: int,
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    groups: int = 2,
    dims: tuple[int, int] = (5, 3),
    write: Any = torch.ops.djinn.kv_write,
) -> None:
    """Write a step of the spans ``(first, length)`` and compare with loops."""
    batch, positions = len(spans), 12
    arenas = [torch.randn(6, groups, positions + 1, dim).to(device, dtype) for dim in dims]
    # Queries come transposed, as projections leave them; pads are NaN, to be seen wherever they went.
    news = [torch.randn(batch, query, groups, dim).to(device, dtype).transpose(1, 2) for dim in dims]
    places = torch.zeros(batch, query, dtype=torch.int64)
    expected = [arena.clone() for arena in arenas]
    for b, (first, length) in enumerate(spans):
        count = length - first
        places[b, :count] = torch.arange(first, length)
        for new, arena in zip(news, expected, strict=True):
            new[b, :, count:] = float("nan")
            for t in range(count):
                arena[rows[b], :, first + t] = new[b, :, t]
    lengths = torch.tensor([length for _, length in spans], device=device)
    write(*arenas, *news, torch.tensor(rows, device=device), places.to(device), lengths)
    for arena, wanted in zip(arenas, expected, strict=True):
        assert torch.equal(arena[:, :, :positions], wanted[:, :, :positions])
        clean = [row for row in range(6) if row not in rows]
        assert torch.equal(arena[clean], wanted[clean])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode(dtype: torch.dtype, device: str) -> None:
    check([(0, 1), (11, 12), (0, 0), (4, 5)], [3, 0, 5, 1], query=1, device=device, dtype=dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_prefill_with_pads_and_dead_rows(device: str) -> None:
    check([(0, 4), (3, 5), (0, 0), (0, 0)], [4, 0, 2, 5], query=6, device=device)


@given(st.data())
def test_any_step(data: st.DataObject) -> None:
    rows = data.draw(st.permutations(range(5)))[: data.draw(st.integers(1, 4))]
    spans = []
    for _ in rows:
        first = data.draw(st.integers(0, 11))
        spans.append(data.draw(st.sampled_from([(0, 0), (first, data.draw(st.integers(first + 1, 12)))])))
    widest = max(length - first for first, length in spans)
    check(spans, list(rows), query=max(1, widest + data.draw(st.integers(0, 2))), device="cpu")


def test_targets() -> None:
    positions = torch.tensor([[3, 4, 0], [0, 1, 2], [0, 0, 0], [7, 0, 0]])
    found = targets(positions, torch.tensor([5, 3, 0, 8]), spare=9)
    assert found.tolist() == [[3, 4, 9], [0, 1, 2], [9, 9, 9], [7, 9, 9]]


@pytest.mark.gpu
def test_never_waits_for_the_device() -> None:
    """What waits cannot be captured."""
    arena, new = torch.zeros(3, 2, 9, 4, device="cuda"), torch.ones(2, 2, 1, 4, device="cuda")
    rows, positions = torch.tensor([1, 0], device="cuda"), torch.tensor([[2], [3]], device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.djinn.kv_write(arena, arena.clone(), new, new, rows, positions, positions[:, 0] + 1)
    graph.replay()
    assert arena.sum().item() == 16
