"""Rows of KV arenas on a GPU: one launch over a table of the runs' addresses, made once.

See :mod:`djinn_fx.kernels.rows` for what is moved. A program moves one tile of one run; nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from djinn_fx.kernels.backend import jit, stream_of, tl

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
        self._place = self._runs.data_ptr()
        if self._runs.is_cuda:  # it may have been sent on a copy stream: what is launched elsewhere comes behind it too
            device = self._runs.device
            torch.cuda.default_stream(device).wait_stream(torch.cuda.current_stream(device))
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
        extra: Tensor | None = None,
        at: int = 0,
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
            extra: contiguous, at a multiple of 16 bytes; when packing it is copied to the buffer too.
            at: where in the buffer, a multiple of 16 bytes.
        """
        runs, tiles = grid[0], -(-grid[1] // TILE)
        nbytes = 0 if extra is None else extra.nbytes
        size, kernel = (runs - (-nbytes // (TILE * tiles)), tiles, 1), self._kernels.get(mode)
        numbers = (row, other, first, start, count, runs, at, nbytes, mode, TILE, COLUMNS)
        if kernel is None:
            near = self._runs if buffer is None else buffer
            # Of the buffer's type whatever its own: the kernel that is made now serves every later call.
            far = near if extra is None else extra.view(-1).view(torch.uint8)
            self._kernels[mode] = _move[size](self._runs, near, far, *numbers, num_warps=WARPS)
        else:
            # Addresses: to ask a tensor for its own, and the driver whether it is one, takes longer than all the rest.
            here = self._place if buffer is None else buffer.data_ptr()
            there = here if extra is None else extra.data_ptr()
            kernel[size](self._place, here, there, *numbers, stream=stream_of(self._runs))


@jit(do_not_specialize=("row", "other", "first", "start", "count", "moved", "at", "size"))
def _move(  # type: ignore[no-untyped-def]
    runs, buffer, extra, row, other, first, start, count, moved, at, size,
    MODE: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of one of the ``moved`` runs, or of the extra tensor; grid ``[runs and more, tiles of the longest]``."""
    number, tile = tl.program_id(0), tl.program_id(1).to(tl.int64)
    entry = runs + (first + tl.minimum(number, moved - 1)) * COLUMNS
    address, distance, unit = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    begin = tile * TILE
    nbytes = tl.maximum(tl.minimum(unit * count - begin, TILE), 0)
    word = tl.arange(0, TILE // 4)
    here = address + unit * start + begin
    source = here + distance * row
    if MODE == "clear":
        far = tl.multiple_of(source.to(tl.pointer_type(tl.int32)), 16) + word
        tl.store(far, tl.zeros([TILE // 4], dtype=tl.int32), mask=word < nbytes // 16 * 4)
    else:
        if MODE == "copy":
            target = here + distance * other
        else:
            near = buffer.to(tl.int64)
            target = near + (tl.load(entry + 3) - tl.load(runs + first * COLUMNS + 3)) * count + begin
        if MODE == "unpack":
            source, target = target, source
        if MODE == "pack":
            # Programs beyond the runs take the extra tensor, as many tiles each as a run has.
            beyond = number >= moved
            begin = ((number - moved) * tl.num_programs(1) + tile) * TILE
            source = tl.where(beyond, extra.to(tl.int64) + begin, source)
            target = tl.where(beyond, near + at + begin, target)
            nbytes = tl.where(beyond, tl.maximum(tl.minimum(size - begin, TILE), 0), nbytes)
            # Its last bytes; runs have none beside their words.
            byte, whole = tl.arange(0, 16), nbytes // 16 * 16
            last = (source + whole).to(tl.pointer_type(tl.uint8)) + byte
            there = (target + whole).to(tl.pointer_type(tl.uint8)) + byte
            tl.store(there, tl.load(last, mask=byte < nbytes % 16), mask=byte < nbytes % 16)
        inside = word < nbytes // 16 * 4
        far = tl.multiple_of(source.to(tl.pointer_type(tl.int32)), 16) + word
        there = tl.multiple_of(target.to(tl.pointer_type(tl.int32)), 16) + word
        tl.store(there, tl.load(far, mask=inside), mask=inside)
