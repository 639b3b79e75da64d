"""A value on its way into a step, on a GPU: copied and compared in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from djinn_fx.kernels.backend import jit, stream_of, tl

#: A value, where it goes, a copy of it, and whether it differs from what was there.
Taken = tuple[Tensor, Tensor, Tensor, Tensor]

#: Bytes that a program looks at, and its warps.
TILE, WARPS = 16384, 4


def take(value: Tensor, before: Tensor, own: Tensor, differs: Tensor, kernels: dict[object, Any]) -> None:
    """See :class:`djinn_fx.kernels.taking.Taking`; never waits. A pinned ``differs`` is written over the bus.

    Args:
        value: see there; contiguous, like the next two.
        before: see there.
        own: see there.
        differs: see there; 0 before.
        kernels: those found so far, by whether they move 16 bytes at a time; a new one is added.
    """
    nbytes, places = value.nbytes, (value.data_ptr(), before.data_ptr(), own.data_ptr())
    wide = not (nbytes | places[0] | places[1] | places[2]) & 15
    grid, kernel = (-(-nbytes // TILE), 1, 1), kernels.get(wide)
    if kernel is None:
        # As bytes: what is compiled now serves every dtype.
        parts = (tensor.view(-1).view(torch.uint8) for tensor in (value, before, own))
        with torch.cuda.device_of(value):
            kernels[wide] = _take[grid](*parts, differs, nbytes, wide, TILE, num_warps=WARPS)
    else:
        # Addresses, as :func:`djinn_fx.kernels.triton_advance.begin` gives them.
        kernel[grid](*places, differs.data_ptr(), nbytes, wide, TILE, stream=stream_of(value))


@jit(do_not_specialize=("nbytes",), do_not_specialize_on_alignment=("value", "before", "own", "differs"))
def _take(value, before, own, differs, nbytes, WIDE: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One tile; grid ``[tiles]``."""
    tile = tl.program_id(0).to(tl.int64)
    if WIDE:
        _, _, _, differ = taken_words(value, before, own, nbytes, tile, TILE)
    else:
        at = tile * TILE + tl.arange(0, TILE)
        inside = at < nbytes
        new = tl.load(value.to(tl.pointer_type(tl.uint8)) + at, mask=inside, other=0)
        old = tl.load(before.to(tl.pointer_type(tl.uint8)) + at, mask=inside, other=0)
        tl.store(own.to(tl.pointer_type(tl.uint8)) + at, new, mask=inside)
        differ = tl.max((new != old).to(tl.int32), 0)
    if differ != 0:
        tl.store(differs, 1)  # whoever finds it writes the same


@jit
def taken_words(value, before, own, nbytes, tile, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy a tile of 16-byte words; returns it, where it lies, what of that is inside, and whether it differs."""
    at = tile * (TILE // 4) + tl.arange(0, TILE // 4)
    inside = at < nbytes // 16 * 4
    new = tl.load(tl.multiple_of(value.to(tl.pointer_type(tl.int32)), 16) + at, mask=inside, other=0)
    old = tl.load(tl.multiple_of(before.to(tl.pointer_type(tl.int32)), 16) + at, mask=inside, other=0)
    tl.store(tl.multiple_of(own.to(tl.pointer_type(tl.int32)), 16) + at, new, mask=inside)
    return new, at, inside, tl.max((new != old).to(tl.int32), 0)
