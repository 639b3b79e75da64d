"""What it means to take a value over, whoever does it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Take = Callable[[Tensor, Tensor, Tensor, Tensor], None]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64)

#: Elements: one, an odd number, one tile, several and a piece.
SIZES = (1, 7, 4096, 20_001)


def check(take: Take, dtype: torch.dtype, size: int, device: str) -> None:
    """Equal values, one bit that differs first, in the middle and last, and the copy's bits each time."""
    pinned, generator = device == "cuda", torch.Generator().manual_seed(size)
    itemsize = torch.empty(0, dtype=dtype).itemsize
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (size * itemsize,), generator=generator, dtype=torch.uint8)
    for place in (None, 0, raw.numel() // 2, raw.numel() - 1):
        changed = raw.clone()
        if place is not None:
            changed[place] ^= 1
        for shift in (0, 1):  # the second lies where nothing wide can be loaded from
            value, before = (_placed(each, dtype, shift, device) for each in (changed, raw))
            for own in (torch.empty_like(value), torch.empty(value.nbytes, dtype=torch.uint8, pin_memory=pinned)):
                differs = torch.zeros(1, dtype=torch.int32, pin_memory=pinned)
                take(value, before, own, differs)
                if pinned:
                    torch.cuda.synchronize()
                assert differs.item() == (place is not None)
                assert torch.equal(own.view(torch.uint8).cpu(), changed)


def check_strided(take: Take, device: str) -> None:
    """A value whose elements do not lie in their order."""
    before = torch.arange(12.0, device=device).view(3, 4)
    value = torch.arange(12.0, device=device).view(4, 3).t()
    own, differs = torch.empty(3, 4, device=device), torch.zeros(1, dtype=torch.int32, pin_memory=device == "cuda")
    take(value, before, own, differs)
    if device == "cuda":
        torch.cuda.synchronize()
    assert differs.item() == 1
    assert torch.equal(own, value)


def check_longer(take: Take, device: str) -> None:
    """What the value is compared with may go on behind it."""
    before = torch.arange(48.0, device=device).view(1, 12, 4)
    for change in (False, True):
        value = before[0, :5].clone()
        value[4, 3] += change
        own, differs = torch.empty_like(value), torch.zeros(1, dtype=torch.int32, pin_memory=device == "cuda")
        take(value, before, own, differs)
        if device == "cuda":
            torch.cuda.synchronize()
        assert differs.item() == change
        assert torch.equal(own, value)


def _placed(raw: Tensor, dtype: torch.dtype, shift: int, device: str) -> Tensor:
    """These bytes as a tensor, so many elements behind where an allocation begins."""
    itemsize = torch.empty(0, dtype=dtype).itemsize
    whole = torch.zeros(raw.numel() + shift * itemsize, dtype=torch.uint8, device=device)
    part = whole[shift * itemsize :]
    part.copy_(raw)
    return part.view(dtype)
