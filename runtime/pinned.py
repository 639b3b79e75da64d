"""Host memory for checkpoints and offloaded sessions: slabs of our own, with a hard bound.

torch's allocator of pinned memory rounds sizes up to powers of two and keeps what it once had. Here slabs are made when
needed, blocks are cut from them first-fit, and a block goes back when nobody refers to its tensor any more *and* the
last copy that touches it is through.

To pin memory takes tens of milliseconds a slab, and whoever needs the slab waits for it. A pool that looks ahead has a
thread pin the next one while there is still room in the last. What was dropped and is still being copied is room:
who needs it waits for the copy, not for a slab.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress

import torch

from djinn_fx.errors import CapacityError
from djinn_fx.runtime.modes import outside_inference
from djinn_fx.runtime.slab import PAGE, Lease, Slab, Watch

#: Bytes of a slab; a longer block gets one of its own.
SLAB = 64 << 20

#: By what part of its size a slab for one long block is longer, where there is room: what a session leaves behind fits
#: it again when it has grown. Pinning takes more than half a second a GiB, and whoever moves waits for it.
SLACK = 8

#: Blocks begin and end at multiples of this.
ALIGNMENT = 256


class Block:
    """Host memory that belongs to whoever holds :attr:`tensor` or a view of it.

    Attributes:
        tensor: uint8 ``[nbytes]``, at a multiple of :data:`ALIGNMENT`.
    """

    def __init__(self, tensor: torch.Tensor, lease: Lease) -> None:
        self.tensor, self._lease = tensor, lease

    @property
    def busy(self) -> torch.cuda.Event | None:
        """Passes when the last copy that touches it is through; None: none was begun."""
        return self._lease.until

    def busy_until(self, event: torch.cuda.Event) -> None:
        """Nobody else may have this memory before ``event`` has passed, even if it is dropped.

        It takes the place of :attr:`busy`, so it must not pass before that.
        """
        self._lease.until = event


class HostPool:
    """Slabs of host memory and the blocks cut from them; any thread may take and drop.

    Args:
        limit: bytes that all slabs together may take.
        pinned: whether the memory is pinned for a GPU, else it is ordinary memory.
        slab: bytes of a slab.
        growing: whether a slab for one longer block has room for it to grow.
        ahead: whether the next slab is made by a thread before it is needed.
    """

    def __init__(
        self, limit: int, *, pinned: bool, slab: int = SLAB, growing: bool = True, ahead: bool = False
    ) -> None:
        self.limit, self._pinned, self._slab, self._growing, self._ahead = limit, pinned, slab, growing, ahead
        self._slabs: list[Slab] = []
        self._coming: threading.Thread | None = None
        self._promised = 0  # bytes of the slab that is coming
        self._lock = threading.Lock()
        # Dropped blocks. Only appended to where a block goes, which may be anywhere, inside our own lock too.
        self._dropped: deque[Watch] = deque()

    @property
    def capacity(self) -> int:
        """Bytes of all slabs, one in the making included."""
        return sum(slab.nbytes for slab in self._slabs) + self._promised

    @property
    def used(self) -> int:
        """Bytes of all blocks that are held, or whose last copy is still under way."""
        with self._lock:
            self._reap()
            return self._taken()

    def _taken(self) -> int:
        return sum(slab.nbytes - sum(size for _, size in slab.free) for slab in self._slabs)

    def take(self, nbytes: int) -> Block:
        """A block of ``nbytes``, its contents undefined.

        It waits where no slab has room: for copies of dropped blocks, if those make room (a copy takes less time
        than to pin a slab, and whoever makes blocks faster than the bus carries them would fill all memory); else for
        the slab that is being made, or that it makes.

        Raises:
            CapacityError: the bound would be passed, or the system has no more memory to pin.
        """
        size = max(ALIGNMENT, _up(nbytes, ALIGNMENT))
        lease = None
        while lease is None:
            with self._lock:
                if not self._pinned:
                    self._reap()  # memory that was in use is in the caches; where it is pinned, that does not count
                lease = self._find(size)
                if lease is not None and (not self._ahead or self._has(size)):
                    break  # almost always; what was dropped is looked at when room is short, which saves a call a block
                self._reap()
                lease = lease or self._find(size)
                coming, leaving = self._coming, self._waiting()
                covered = lease is None and self._places(size, leaving) > 0
                if lease is None and coming is None and not covered:
                    lease = self._made_room(size, nbytes)
                self._look_ahead(size, leaving)
            # Outside the lock: others take and drop meanwhile.
            if covered:
                leaving[0].through()
            elif lease is None and coming is not None:
                coming.join()
        memory = lease.slab.memory[lease.offset : lease.offset + nbytes]
        watch = Watch(memory, self._dropped.append)
        watch.lease = lease
        lease.slab.held[lease.offset] = watch
        if torch.is_inference_mode_enabled():
            with outside_inference():
                return Block(torch.from_numpy(memory), lease)
        return Block(torch.from_numpy(memory), lease)

    def prepare(self) -> None:
        """Have the first slab made by a thread, if the pool looks ahead and has none; it waits for nothing."""
        if self._ahead and not self._slabs:
            with self._lock:
                self._look_ahead(ALIGNMENT, [])

    def _made_room(self, size: int, nbytes: int) -> Lease:
        """A block that room was made for, by another slab or by waiting for copies."""
        lease = self._grow(size) or self._scrape(size)
        if lease is None:
            raise CapacityError(
                f"a checkpoint or an offloaded session needs {nbytes} bytes of host memory in one piece, and "
                f"{self._taken()} of pinned_bytes={self.limit} are taken. Drop checkpoints that are not needed (save() "
                "them first), close an offloaded session, or compile with a larger pinned_bytes."
            )
        return lease

    def _look_ahead(self, size: int, leaving: list[Lease]) -> None:
        """Have the next slab made, if what is free may not do for one more block like the last.

        One block may be free while the copy of another goes on; who has two being copied makes them faster than the bus
        carries them, and no memory would be enough.
        """
        wanted = self._next_slab(size)
        if not self._ahead or self._coming is not None or not wanted:
            return
        if self._has(size) or self._places(size, leaving) > 1:
            return
        device = torch.cuda.current_device() if self._pinned else None
        thread = threading.Thread(target=self._make_ahead, args=(wanted, device), name="djinn-pinning")
        with suppress(RuntimeError):  # no thread can be had: then nothing is made ahead
            thread.start()
            self._coming, self._promised = thread, wanted

    def _places(self, size: int, leaving: list[Lease]) -> int:
        """How many blocks of ``size`` have room, when the copies of these dropped blocks are through."""
        found = 0
        for slab in self._slabs:
            soon = [(lease.offset, lease.size) for lease in leaving if lease.slab is slab]
            begun = end = -1
            for offset, length in [*sorted(slab.free + soon), (-1, 0)]:
                if offset != end:
                    found += (end - begun) // size
                    begun = offset
                end = offset + length
        return found

    def _make_ahead(self, nbytes: int, device: int | None) -> None:
        """Make a slab; ``device`` is the one that whoever wanted it was on, for a thread begins on the first."""
        slab = None
        try:
            if device is not None:
                torch.cuda.set_device(device)
            slab = Slab(nbytes, self._pinned)
        except Exception:  # whatever it is: whoever needs the slab tries himself, and is told
            self._ahead = False
        finally:  # or those who wait for it would wait for ever
            with self._lock:
                self._slabs += [slab] if slab is not None else []
                self._coming, self._promised = None, 0

    def _next_slab(self, size: int) -> int:
        """Bytes of the next slab for a block of ``size``; 0 if the bound allows none."""
        room = self.limit - self.capacity
        longer = size // SLACK if self._growing else 0
        wanted = self._slab if size <= self._slab else _up(size + longer, PAGE)
        return min(wanted, room) if size <= room else 0

    def _has(self, size: int) -> bool:
        """Whether a block of ``size`` is free."""
        for slab in self._slabs:
            for _, length in slab.free:
                if length >= size:
                    return True
        return False

    def _find(self, size: int) -> Lease | None:
        for slab in self._slabs:
            offset = slab.take(size)
            if offset is not None:
                return Lease(slab, offset, size)
        return None

    def _grow(self, size: int) -> Lease | None:
        """A block of a new slab, if the bound allows one."""
        nbytes = self._next_slab(size)
        if not nbytes:
            return None
        try:
            self._slabs.append(Slab(nbytes, self._pinned))
        except (MemoryError, OSError, RuntimeError) as error:
            if isinstance(error, CapacityError):
                raise
            raise CapacityError(
                f"the system has no {nbytes} bytes of host memory for a checkpoint or a session off the device "
                f"({type(error).__name__}: {error}). Free host memory, or drop checkpoints that are not needed."
            ) from error
        return self._find(size)

    def _scrape(self, size: int) -> Lease | None:
        """The last resort: wait for copies of dropped blocks, then give slabs back for one that is long enough."""
        for lease in self._waiting():
            lease.through()
        self._reap()
        found = self._find(size)
        if found is None:
            self._slabs = [slab for slab in self._slabs if not slab.whole]
            found = self._grow(size)
        return found

    def _waiting(self) -> list[Lease]:
        """What was dropped and is still touched; one by one, since a deque that grows cannot be iterated over."""
        dropped = [self._dropped[index].lease for index in range(len(self._dropped))]
        return [lease for lease in dropped if lease is not None]

    def _reap(self) -> None:
        """Make free what was dropped and is no longer touched; the caller holds the lock."""
        for _ in range(len(self._dropped)):
            watch = self._dropped.popleft()
            lease = watch.lease
            if lease is None:
                continue
            if lease.over():
                lease.slab.held.pop(lease.offset, None)
                lease.slab.give(lease.offset, lease.size)
            else:
                self._dropped.append(watch)


def ordinary(nbytes: int) -> HostPool:
    """Host memory for one block, not pinned and beyond every budget."""
    return HostPool(nbytes + (1 << 16), pinned=False, slab=nbytes, growing=False)


def _up(nbytes: int, step: int) -> int:
    return -(-nbytes // step) * step
