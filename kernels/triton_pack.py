"""Packing on a GPU: every tensor in one launch over a table of addresses, and back the same way.

The layout is :mod:`djinn_fx.kernels.pack`'s. A tensor is taken as equally long runs of contiguous
bytes at equal distances, which the prefix ``[heads, n, dim]`` of an arena row is; others, which no
checkpoint has, go through a contiguous copy of their own. The table goes to the device in one
asynchronous copy; nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from djinn_fx.kernels.backend import jit, tl

#: Bytes that a program moves at most, and its warps.
TILE, WARPS = 65536, 8

#: Bytes up to which the driver takes a copy from the host into its command stream: done in 1.5 us
#: on an H200, where one that a copy engine fetches from pinned memory holds the stream up for 10.
INLINE = 65536

#: Bytes that it moves at a time where they are not aligned.
STEP = 2048

#: Columns of the table, int64: address, offset in the buffer, bytes of a run, distance of runs,
#: number of runs, first tile, tiles of a run, whether 16 bytes can be moved at a time.
COLUMNS = 8

#: Runs shorter than this are worth a copy of their own if there are more than as many of them.
SHORT = 1024

#: A tensor's runs: how many, their bytes, their distance in bytes.
Runs = tuple[int, int, int]


def move(tensors: Sequence[Tensor], offsets: Sequence[int], buffer: Tensor, *, to_buffer: bool) -> None:
    """Copy ``tensors`` into ``buffer`` at their ``offsets``, gaps zeroed, or back out of it.

    Args:
        tensors: any shapes, strides and dtypes, on the device of ``buffer``.
        offsets: byte offset of each, a multiple of 16.
        buffer: uint8, one-dimensional, contiguous, at a multiple of 16 bytes, long enough.
        to_buffer: the direction.
    """
    known: dict[object, Runs | None] = {}
    copies: list[tuple[Tensor, Tensor]] = []  # contiguous stand-ins
    entries: list[int] = []
    counts: list[int] = []  # tiles of each entry
    tiles = 0
    for tensor, offset in zip(tensors, offsets, strict=True):
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        shape, strides, itemsize = tensor.shape, tensor.stride(), tensor.itemsize
        key = (shape, strides, itemsize)
        if key not in known:
            known[key] = runs_of(shape, strides, itemsize)
        runs = known[key]
        if runs is None:
            stand_in = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
            copies.append((tensor, stand_in))
            tensor, runs = stand_in, (1, stand_in.nbytes, 0)
        count, length, distance = runs
        if not length:
            continue
        address, per_run = tensor.data_ptr(), -(-length // TILE)
        wide = not (address % 16 or (count > 1 and (distance % 16 or length % 16)))
        entries += (address, offset, length, distance, count, tiles, per_run, wide)
        counts.append(count * per_run)
        tiles += count * per_run
    if to_buffer:
        for tensor, stand_in in copies:
            stand_in.copy_(tensor)
    if tiles:
        table = _on_device(entries, counts, buffer)
        with torch.cuda.device_of(buffer):
            _move[(tiles,)](
                table, len(entries), buffer, TO_BUFFER=to_buffer, TILE=TILE, STEP=STEP, COLUMNS=COLUMNS, num_warps=WARPS
            )
    if not to_buffer:
        for tensor, stand_in in copies:
            tensor.copy_(stand_in)


def runs_of(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> Runs | None:
    """A tensor as equally distant contiguous runs, or None if it is not, or if they are too short."""
    length, axis = itemsize, len(shape) - 1
    while axis >= 0 and (shape[axis] == 1 or strides[axis] * itemsize == length):
        length *= shape[axis]
        axis -= 1
    if 0 in shape:
        return 1, 0, 0
    if axis < 0:
        return 1, length, 0
    count, distance = shape[axis], strides[axis]
    for size, stride in zip(reversed(shape[:axis]), reversed(strides[:axis]), strict=True):
        if size != 1 and stride != count * distance:
            return None
        count *= size
    if length < SHORT < count:
        return None
    return count, length, distance * itemsize


def _on_device(entries: list[int], counts: list[int], buffer: Tensor) -> Tensor:
    """The table, behind it the entry of each tile: int64, on the device of ``buffer``."""
    # numpy: torch takes three times as long to make a tensor of a list, and may wake its threads.
    owners = np.repeat(np.arange(len(counts)), counts)
    table = torch.from_numpy(np.concatenate((np.array(entries, dtype=np.int64), owners)))
    if buffer.is_cuda and table.nbytes > INLINE:
        table = table.pin_memory()
    return table.to(buffer.device, non_blocking=True)


@jit(do_not_specialize=("owners",))
def _move(  # type: ignore[no-untyped-def]
    table, owners, buffer,
    TO_BUFFER: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of one run of one tensor: a grid of as many tiles as all tensors have."""
    tile = tl.program_id(0)
    entry = table + tl.load(table + owners + tile) * COLUMNS
    length, count, per_run = tl.load(entry + 2), tl.load(entry + 4), tl.load(entry + 6)
    local = tile - tl.load(entry + 5)
    run, start = local // per_run, local % per_run * TILE
    there = tl.load(entry) + run * tl.load(entry + 3) + start
    here = buffer + tl.load(entry + 1) + run * length + start
    size = tl.minimum(length - start, TILE)
    # What the end of the tensor leaves of its last 16 bytes, zeroed in the buffer.
    gap = tl.where((run == count - 1) & (start + size == length), -(count * length) & 15, 0)
    if tl.load(entry + 7) != 0:
        words = size // 16 * 4
        word = tl.arange(0, TILE // 4)
        near = tl.multiple_of(here.to(tl.pointer_type(tl.int32)), 16)
        far = tl.multiple_of(there.to(tl.pointer_type(tl.int32)), 16)
        _copy(far + word, near + word, word < words, word < words, TO_BUFFER)
        if size % 16 != 0:
            byte = size // 16 * 16 + tl.arange(0, 16)
            _copy(there.to(tl.pointer_type(tl.uint8)) + byte, here + byte, byte < size, byte < size + gap, TO_BUFFER)
    else:
        for step in range(0, TILE, STEP):
            i = step + tl.arange(0, STEP)
            _copy(there.to(tl.pointer_type(tl.uint8)) + i, here + i, i < size, i < size + gap, TO_BUFFER)


@jit
def _copy(far, near, inside, near_inside, TO_BUFFER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Between a tensor (``far``) and the buffer (``near``), where there may be more room."""
    if TO_BUFFER:
        tl.store(near, tl.load(far, mask=inside, other=0), mask=near_inside)
    else:
        tl.store(far, tl.load(near, mask=inside, other=0), mask=inside)
