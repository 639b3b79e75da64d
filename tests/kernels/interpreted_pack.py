"""Packing by one kernel, interpreted on the CPU; run by test_interpreted.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from djinn_fx.kernels import pack, triton_pack
from tests.kernels.test_kernels_pack import DTYPES, check_round_trip, random_bits, strided

SHAPES: list[tuple[int, ...]] = [(3, 5), (), (0, 4), (7,), (2, 1, 3), (33, 40), (2, 3, 4, 5)]


@pytest.mark.parametrize("how", ["contiguous", "transposed", "gaps", "offset", "prefix"])
def test_round_trip(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_pack, "TILE", 64)  # several programs for a tensor of some size
    monkeypatch.setattr(triton_pack, "STEP", 32)
    monkeypatch.setattr(pack, "_by_kernel", lambda buffer: True)
    tensors = [restrided(random_bits(shape, dtype), how) for shape, dtype in zip(SHAPES * 2, DTYPES, strict=False)]
    check_round_trip(tensors)


def restrided(tensor: Tensor, how: str) -> Tensor:
    """As ``strided``; or at an address that is no multiple of 16, or as the prefix of longer rows."""
    if how == "offset":
        return torch.cat((tensor.flatten()[:1], tensor.flatten()))[1:].view(tensor.shape) if tensor.numel() else tensor
    if how == "prefix" and tensor.dim() > 1:
        return torch.cat((tensor, tensor), dim=-2)[..., : tensor.shape[-2], :]
    return strided(tensor, how)
