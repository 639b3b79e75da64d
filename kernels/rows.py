"""Moving rows of KV arenas: into one buffer and back, from row to row, or to zeros; one launch each on a GPU.

A row of an arena ``[rows, heads, positions, dim]`` is one run of positions per head, and what is moved is the same
stretch of positions of every run of every arena. Packed they lie one after another without gaps: for each arena
``[heads, count, dim]``, row-major, so that a host can look at them without unpacking.

:mod:`djinn_fx.kernels.pack` moves any tensors; here the addresses are known once and for all, so a call costs the
host a launch and nothing else.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from djinn_fx.kernels import triton_rows
from djinn_fx.kernels.backend import uses_triton

#: Bytes: what the kernel loads and stores at a time.
WORD = 16


class Piece(NamedTuple):
    """A part of a packed row that is moved at a time.

    Attributes:
        first: its first run; ``last`` is the one after its last.
        last: see ``first``.
        start: its first position; ``stop`` is the one after its last. All of them but where one run alone is too long.
        stop: see ``start``.
        offset: where it begins in the packed row, in bytes.
        nbytes: how long it is.
    """

    first: int
    last: int
    start: int
    stop: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class RowLayout:
    """Where a packed row holds what: heads and dim of each arena, and their dtype."""

    shapes: tuple[tuple[int, int], ...]
    dtype: torch.dtype

    def views(self, packed: Tensor, count: int) -> list[Tensor]:
        """What each arena gave to a packed row: views ``[heads, count, dim]``.

        Args:
            packed: uint8, one-dimensional, as long as ``count`` positions or longer.
            count: positions of the row.
        """
        found, offset = [], 0
        for heads, dim in self.shapes:
            size = heads * count * dim * self.dtype.itemsize
            found.append(packed[offset : offset + size].view(self.dtype).view(heads, count, dim))
            offset += size
        return found


class Rows:
    """The rows of a model's arenas.

    Args:
        arenas: each ``[rows, heads, positions, dim]``, contiguous; heads and dim may differ, nothing else.
    """

    def __init__(self, arenas: Sequence[Tensor]) -> None:
        self.arenas = tuple(arenas)
        dtype = arenas[0].dtype if arenas else torch.uint8
        self.layout = RowLayout(tuple((arena.shape[1], arena.shape[3]) for arena in arenas), dtype)
        self._units = [arena.shape[3] * arena.itemsize for arena in arenas]
        before, self._before = 0, [0]  # bytes of a position in the runs before each run
        for arena, unit in zip(arenas, self._units, strict=True):
            for _ in range(arena.shape[1]):
                before += unit
                self._before.append(before)
        self._launcher: triton_rows.Launcher | None = None
        self._widest = max(self._units, default=0)
        self._kernel = bool(arenas) and arenas[0].is_cuda and uses_triton()
        for arena, unit in zip(arenas, self._units, strict=True):
            self._kernel = self._kernel and unit % WORD == 0 and arena.data_ptr() % WORD == 0

    @property
    def width(self) -> int:
        """Bytes of one position of one row, over all arenas."""
        return self._before[-1]

    def pieces(self, count: int, limit: int, first: int | None = None) -> list[Piece]:
        """How ``count`` positions of a row are cut so that no piece is longer than ``limit`` bytes.

        Args:
            count: how many positions.
            limit: bytes; one position of one run may be longer.
            first: the limit of the first piece, if it shall be shorter.
        """
        runs, limit_now = len(self._before) - 1, limit if first is None else first
        if runs and 0 < count * self.width <= limit_now:
            return [Piece(0, runs, 0, count, 0, count * self.width)]
        found: list[Piece] = []
        low = 0
        while low < runs and count:
            # The last run whose end is near enough, at least one.
            high = max(low + 1, bisect.bisect(self._before, self._before[low] + limit_now // count) - 1)
            unit, offset = self._before[high] - self._before[low], self._before[low] * count
            step = count if unit * count <= limit_now else max(1, limit_now // unit)
            for start in range(0, count, step):
                stop = min(start + step, count)
                found.append(Piece(low, high, start, stop, offset + start * unit, (stop - start) * unit))
            low, limit_now = high, limit
        return found

    def pack(self, row: int, piece: Piece, out: Tensor, extra: Tensor | None = None, at: int = 0) -> None:
        """Write a piece of ``row`` to the beginning of ``out``; never waits for the device, which is the current one.

        Args:
            row: whose positions.
            piece: of :meth:`pieces`.
            out: uint8, one-dimensional, contiguous, on the arenas' device, ``piece.nbytes`` or longer.
            extra: written to ``out`` in the same launch: contiguous, there, at a multiple of :data:`WORD` bytes.
            at: where in ``out``, behind the piece; a multiple of :data:`WORD` from where ``out`` begins.
        """
        if self._by_kernel():
            self._launch("pack", row, piece, out, extra=extra, at=at)
            return
        for part, there in self._parts(row, piece, out):
            there.copy_(part)
        if extra is not None:
            out[at : at + extra.nbytes].copy_(extra.view(-1).view(torch.uint8))

    def unpack(self, buffer: Tensor, row: int, piece: Piece) -> None:
        """Fill a piece of ``row`` from the beginning of ``buffer``; the inverse of :meth:`pack`."""
        if self._by_kernel():
            self._launch("unpack", row, piece, buffer)
        else:
            for part, there in self._parts(row, piece, buffer):
                part.copy_(there)

    def copy(self, source: int, targets: Sequence[int], count: int) -> None:
        """Copy the first ``count`` positions of one row to others."""
        if not count:
            return
        whole = Piece(0, len(self._before) - 1, 0, count, 0, count * self.width)
        for target in targets:
            if self._by_kernel():
                with torch.cuda.device_of(self.arenas[0]):
                    self._launch("copy", source, whole, None, target)
            else:
                for arena in self.arenas:
                    arena[target, :, :count].copy_(arena[source, :, :count])

    def clear(self, row: int) -> None:
        """Fill every position of a row with zeros."""
        if self._by_kernel():
            count = self.arenas[0].shape[2]
            with torch.cuda.device_of(self.arenas[0]):
                self._launch("clear", row, Piece(0, len(self._before) - 1, 0, count, 0, count * self.width), None)
        else:
            for arena in self.arenas:
                arena[row].zero_()

    def _by_kernel(self) -> bool:
        return self._kernel

    def _launch(
        self,
        mode: triton_rows.Mode,
        row: int,
        piece: Piece,
        buffer: Tensor | None,
        other: int = 0,
        extra: Tensor | None = None,
        at: int = 0,
    ) -> None:
        if self._launcher is None:
            self._launcher = triton_rows.Launcher(self.arenas, self._before)
        count = piece.stop - piece.start
        grid = piece.last - piece.first, count * self._widest
        self._launcher.launch(mode, buffer, row, other, piece.first, piece.start, count, grid, extra, at)

    def _parts(self, row: int, piece: Piece, buffer: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each arena that a piece touches: its part of the row, and the part's place in the buffer."""
        run, offset, count = 0, 0, piece.stop - piece.start
        for arena, unit in zip(self.arenas, self._units, strict=True):
            _, heads, _, dim = arena.shape
            low, high = max(piece.first - run, 0), min(piece.last - run, heads)
            run += heads
            if low < high:
                size = (high - low) * count * unit
                place = buffer[offset : offset + size].view(arena.dtype).view(high - low, count, dim)
                yield arena[row, low:high, piece.start : piece.stop], place
                offset += size
