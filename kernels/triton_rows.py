"""Rows of KV arenas on a GPU: one launch over a table of the runs' addresses, made once.

See :mod:`djinn_fx.kernels.rows` for what is moved. A program moves one tile of one run; nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from djinn_fx.kernels.backend import jit, tl

Mode = Literal["pack", "unpack", "copy", "clear"]

#: Bytes that a program moves at most, and its warps.
TILE, WARPS = 65536, 8

#: Columns of the table, int64: address in row 0, distance of rows, bytes of a position, bytes of a position in all
#: runs before.
COLUMNS = 4


class Launcher:
    """Launches for a model's arenas. A kernel is looked up once for each mode: the lookup costs more than the launch.

    Args:
        arenas: each ``[rows, heads, positions, dim]``, contiguous, on one device, rows at multiples of 16 bytes.
        before: for each run, the bytes of one position in the runs before it.
    """

    def __init__(self, arenas: Sequence[Tensor], before: Sequence[int]) -> None:
        entries = [
            (
                arena.data_ptr() + head * arena.stride(1) * arena.itemsize,
                arena.stride(0) * arena.itemsize,
                arena.shape[3] * arena.itemsize,
            )
            for arena in arenas
            for head in range(arena.shape[1])
        ]
        table = torch.tensor([(*entry, offset) for entry, offset in zip(entries, before, strict=False)])
        self._runs = table.to(arenas[0].device, non_blocking=True)
        self._kernels: dict[Mode, Any] = {}

    def launch(
        self,
        mode: Mode,
        buffer: Tensor | None,
        row: int,
        other: int,
        first: int,
        start: int,
        count: int,
        grid: tuple[int, int],
    ) -> None:
        """Move ``count`` positions of ``row``; on the current stream of the current device.

        Args:
            mode: to the buffer, from it, to the row ``other``, or zeros into the row.
            buffer: uint8, contiguous, at a multiple of 16 bytes; None where the mode needs none.
            row: the row.
            other: the row to copy to.
            first: the first run.
            start: the first position.
            count: how many.
            grid: how many runs, and the bytes that the longest of them moves.
        """
        near = self._runs if buffer is None else buffer
        arguments = (self._runs, near, row, other, first, start, count, mode, TILE, COLUMNS)
        size, kernel = (grid[0], -(-grid[1] // TILE), 1), self._kernels.get(mode)
        if kernel is None:
            self._kernels[mode] = _move[size](*arguments, num_warps=WARPS)
        else:
            kernel[size](*arguments)


@jit(do_not_specialize=("row", "other", "first", "start", "count"))
def _move(  # type: ignore[no-untyped-def]
    runs, buffer, row, other, first, start, count,
    MODE: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of one run; grid ``[runs, tiles of the longest]``."""
    entry = runs + (first + tl.program_id(0)) * COLUMNS
    address, distance, unit = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    begin = tl.program_id(1).to(tl.int64) * TILE
    words = tl.maximum(tl.minimum(unit * count - begin, TILE), 0) // 16 * 4
    word = tl.arange(0, TILE // 4)
    inside = word < words
    here = address + unit * start + begin
    far = tl.multiple_of((here + distance * row).to(tl.pointer_type(tl.int32)), 16) + word
    if MODE == "clear":
        tl.store(far, tl.zeros([TILE // 4], dtype=tl.int32), mask=inside)
    elif MODE == "copy":
        there = tl.multiple_of((here + distance * other).to(tl.pointer_type(tl.int32)), 16) + word
        tl.store(there, tl.load(far, mask=inside), mask=inside)
    else:
        offset = (tl.load(entry + 3) - tl.load(runs + first * COLUMNS + 3)) * count + begin
        near = tl.multiple_of((buffer + offset).to(tl.pointer_type(tl.int32)), 16) + word
        if MODE == "pack":
            tl.store(near, tl.load(far, mask=inside), mask=inside)
        else:
            tl.store(far, tl.load(near, mask=inside), mask=inside)
