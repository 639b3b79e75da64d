"""Slabs of host memory: one stretch each, what of it is free, and who has the rest."""

from __future__ import annotations

import bisect
import mmap
import weakref
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

from djinn_fx.errors import CapacityError

#: Whole slabs begin and end at multiples of this.
PAGE = 4096


@dataclass(eq=False, slots=True)
class Lease:
    """A stretch of a slab that somebody has."""

    slab: Slab
    offset: int
    size: int
    until: torch.cuda.Event | None = None

    def over(self) -> bool:
        """Whether no copy touches it any more."""
        return self.until is None or self.until.query()

    def through(self) -> None:
        """Wait until no copy touches it."""
        if self.until is not None:
            self.until.synchronize()


class Watch(weakref.ref[np.ndarray]):
    """Tells when nobody refers to the memory of a lease any more. ``weakref.finalize`` takes five times as long.

    Attributes:
        lease: of the memory; None only where an interrupt came between, and the lease is lost.
    """

    lease: Lease | None = None


class Slab:
    """One stretch of host memory and what of it is free: ``(offset, size)`` in order, no two adjoining."""

    def __init__(self, nbytes: int, pinned: bool) -> None:
        self.nbytes, self.free = nbytes, [(0, nbytes)]
        self.held: dict[int, Watch] = {}  # by offset; a weak reference that nobody keeps tells nothing
        if not pinned:
            self.memory = np.empty(nbytes, dtype=np.uint8)
            return
        # Registered rather than allocated by CUDA: the size is exact, and the system has it back at once when it goes.
        self.memory = np.frombuffer(_pages(nbytes), dtype=np.uint8)
        self.memory[::PAGE] = 0  # the pages come now, not while CUDA holds up everybody else
        place = self.memory.ctypes.data
        refused = int(torch.cuda.cudart().cudaHostRegister(place, nbytes, 0))
        if refused:
            raise CapacityError(
                f"the system refuses to pin {nbytes} bytes of host memory (CUDA error {refused}). Free host memory, "
                "raise the limit of locked memory (ulimit -l), or compile with a smaller pinned_bytes."
            )
        # Every block's memory keeps this array: it stays pinned for whoever has one, whatever became of the pool.
        weakref.finalize(self.memory, _unpin, place).atexit = False

    @property
    def whole(self) -> bool:
        """Whether all of it is free."""
        return self.free == [(0, self.nbytes)]

    def take(self, size: int) -> int | None:
        """The offset of the first free stretch that is long enough, taken; None if there is none."""
        for index, (offset, length) in enumerate(self.free):
            if length >= size:
                self.free[index : index + 1] = [(offset + size, length - size)] if length > size else []
                return offset
        return None

    def give(self, offset: int, size: int) -> None:
        """Make a stretch free again, one with its neighbours."""
        index = bisect.bisect(self.free, (offset, size))
        end, first, last = offset + size, index, index
        if last < len(self.free) and self.free[last][0] == end:
            end += self.free[last][1]
            last += 1
        if first and sum(self.free[first - 1]) == offset:
            first -= 1
            offset = self.free[first][0]
        self.free[first:last] = [(offset, end - offset)]


def _pages(nbytes: int) -> mmap.mmap:
    """Memory of the system's, in large pages where it has them: there are fewer to pin."""
    memory = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _unpin(place: int) -> None:
    """Give pinned memory back to the system, after the last copy that may touch it."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(place)
