"""Packing by one kernel: how tensors are taken apart, and the kernel on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from djinn_fx.kernels.pack import pack, pack_torch, plan, unpack
from djinn_fx.kernels.triton_pack import Runs, runs_of


@pytest.mark.parametrize(
    ("shape", "strides", "runs"),
    [
        ((), (), (1, 2, 0)),
        ((5, 0), (1, 1), (1, 0, 0)),
        ((4, 6), (6, 1), (1, 48, 0)),
        ((4, 6), (1, 4), None),
        ((8, 100, 64), (1025 * 64, 64, 1), (8, 12800, 131200)),
        ((2, 8, 100, 64), (8 * 1025 * 64, 1025 * 64, 64, 1), (16, 12800, 131200)),
        ((2, 8, 100, 64), (9 * 1025 * 64, 1025 * 64, 64, 1), None),
        ((3, 1, 4), (4, 77, 1), (1, 24, 0)),
        ((2, 3), (0, 1), (2, 6, 0)),
        ((5000, 3), (4, 1), None),
    ],
)
def test_runs(shape: Sequence[int], strides: Sequence[int], runs: Runs | None) -> None:
    assert runs_of(shape, strides, 2) == runs


def kv_prefix(n: int, dtype: torch.dtype, depth: int = 128, layers: int = 5) -> list[Tensor]:
    arenas = [torch.randn(4, 8, 1025, depth, device="cuda").to(dtype) for _ in range(2 * layers)]
    return [*(arena[2, :, :n] for arena in arenas), torch.randn(1, 999, device="cuda")]


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [128, 80, 9])
@pytest.mark.parametrize("n", [1, 7, 512, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_prefix_of_a_row_equals_the_twin(dtype: torch.dtype, n: int, depth: int) -> None:
    tensors = kv_prefix(n, dtype, depth)
    layout = plan(tensors)
    found, wanted = (torch.full((layout.nbytes,), 0xFF, dtype=torch.uint8, device="cuda") for _ in range(2))
    pack(tensors, found)
    pack_torch(tensors, layout, wanted)
    assert torch.equal(found, wanted)
    others = kv_prefix(n, dtype, depth)
    around = [other._base.clone() if other._base is not None else None for other in others]
    unpack(found, others)
    for tensor, other, before in zip(tensors, others, around, strict=True):
        assert torch.equal(tensor, other)
        if before is not None and other._base is not None:
            before[2, :, :n] = tensor
            assert torch.equal(other._base, before)


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    large = torch.empty(2, 3 * 2**30, dtype=torch.uint8, device="cuda").random_()
    tensors = [large[:, : 2**30 + 5], large[1, 2**31 :], torch.ones(3, device="cuda")]
    buffer = torch.empty(plan(tensors).nbytes, dtype=torch.uint8, device="cuda")
    pack(tensors, buffer)
    assert torch.equal(buffer[: 2**30 + 5], large[0, : 2**30 + 5])
    assert torch.equal(buffer[2**30 + 5 : 2**31 + 10], large[1, : 2**30 + 5])
    targets = [torch.zeros_like(tensor) for tensor in tensors]
    unpack(buffer, targets)
    assert all(torch.equal(a, b) for a, b in zip(tensors, targets, strict=True))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_never_waits_for_the_device() -> None:
    tensors = kv_prefix(100, torch.bfloat16)
    buffer = torch.empty(plan(tensors).nbytes, dtype=torch.uint8, device="cuda")
    pack(tensors, buffer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pack(tensors, buffer)
        unpack(buffer, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
