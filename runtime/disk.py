"""The lowest tier: KV of paused sessions in files of our own, written and read on a thread of their own.

A file holds the packed KV of one row and nothing else; it goes when nobody refers to it any more. It is no checkpoint:
another process cannot use it, and it is not synced. Its checksum is compared when it is read. What a process that was
killed left behind is removed by the next that needs the same folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from djinn_fx.errors import CapacityError, CheckpointError
from djinn_fx.kernels.rows import RowLayout
from djinn_fx.runtime.parcels import Parked
from djinn_fx.runtime.pinned import HostPool, ordinary

try:
    import fcntl
except ImportError:  # not on this system: what the dead leave stays
    fcntl = None  # type: ignore[assignment]

#: Bytes that are summed, written or read at a time: other threads come between.
STRETCH = 4 << 20

#: How the name of a folder begins, and the name of the file in it that its process keeps locked.
PREFIX, LOCK = "djinn-kv-", "lock"


class Filed:
    """KV of one row in a file; it stands in the place of a :class:`Parked`.

    Attributes:
        path: of the file; removed when this object goes.
        layout: how the file is laid out.
        length: its positions.
        nbytes: its bytes.
        total: checksum of the bytes.
        folder: in which it lies, kept for as long as it does: a checkpoint may share the file, and outlives its model.
    """

    def __init__(self, path: Path, layout: RowLayout, length: int, nbytes: int, total: int, folder: Folder) -> None:
        self.path, self.layout, self.length, self.nbytes, self.total = path, layout, length, nbytes, total
        self.folder = folder

    in_memory = False

    def tensors(self, length: int | None = None) -> list[torch.Tensor]:
        """As :meth:`Parked.tensors`; reads the file now."""
        return self.read(None).tensors(length)

    def read(self, pool: HostPool | None) -> Parked:
        """The KV in host memory again: of ``pool`` if that has room, else ordinary memory.

        Raises:
            CapacityError: the system has no memory for it.
            CheckpointError: the file is not what was written.
        """
        block = None
        if pool is not None:
            try:
                block = pool.take(self.nbytes)
            except CapacityError:
                block = None  # ordinary memory, for as long as it takes to find a row
        try:
            block = block or ordinary(self.nbytes).take(self.nbytes)
            total, place, memory = 0, 0, block.tensor.numpy()
            with self.path.open("rb") as file:
                while place < self.nbytes and (got := file.readinto(memory[place : place + STRETCH].data)):
                    total = zlib.crc32(memory[place : place + got].data, total)
                    place += got
        except MemoryError as error:
            raise CapacityError(
                f"{self.nbytes} bytes of host memory are needed to bring a session back from the disk, and there are "
                "none. It stays where it is; free host memory and go on with it."
            ) from error
        except OSError as error:
            raise CheckpointError(f"a session's KV cannot be read from {str(self.path)!r}: {error}. {_LOST}") from error
        if place != self.nbytes or total != self.total:
            raise CheckpointError(f"a session's KV in {str(self.path)!r} is not what was written there. {_LOST}")
        return Parked(block, self.layout, self.length, self.nbytes)


class Folder:
    """A folder of our own, which goes when nobody refers to it any more; two processes may have the same ``parent``.

    It holds a lock for as long as its process lives: whoever finds one without makes an end of it.
    """

    def __init__(self, parent: str | os.PathLike[str] | None) -> None:
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = (self.path / "making").open("wb")
        weakref.finalize(self, _remove, self.path, self._lock)
        with suppress(OSError):  # some file systems have no locks
            if fcntl is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                (self.path / "making").rename(self.path / LOCK)  # nobody ever sees it without its lock
                _sweep(self.path.parent)


def _remove(folder: Path, lock: BinaryIO) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()


def _sweep(parent: Path) -> None:
    """Remove the folders of processes that are dead."""
    for place in parent.glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError), place.open("r+b") as lock:  # locked, or not ours
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(place.parent, ignore_errors=True)


_LOST = "Somebody changed spill_dir. Close the session, or restore a checkpoint of it; other sessions are untouched."


class Disk:
    """Files for KV, under a bound, and the thread that writes and reads them.

    Args:
        limit: bytes that all files together may take; 0: no file is ever written.
        folder: where; None: a folder of our own under the system's folder for temporary files.
    """

    def __init__(self, limit: int, folder: str | os.PathLike[str] | None = None) -> None:
        self.limit, self._asked = limit, folder
        self._folder: Folder | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._sizes: dict[int, int] = {}
        self._gone: deque[int] = deque()  # only appended to by the collector, which may run anywhere
        self._count = 0

    @property
    def used(self) -> int:
        """Bytes of all files, those being written included."""
        while self._gone:
            self._sizes.pop(self._gone.popleft(), None)
        return sum(self._sizes.values())

    def has_room(self, nbytes: int) -> bool:
        """Whether one more file of so many bytes stays within the bound."""
        return self.limit > 0 and self.used + nbytes <= self.limit

    def write(self, parked: Parked) -> Future[Filed]:
        """Begin to write what was parked. The future raises :class:`CapacityError` where the disk refuses."""
        self._count += 1
        number = self._count
        self._sizes[number] = parked.nbytes
        try:
            return self._run(self._write, parked, number)
        except BaseException:
            self._gone.append(number)
            raise

    def read(self, filed: Filed, pool: HostPool) -> Future[Parked]:
        """Begin to read a file; see :meth:`Filed.read`."""
        return self._run(filed.read, pool)

    def close(self) -> None:
        """End the thread when it is through; the folder goes with the last file that somebody refers to."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
        self._folder = None

    def _run(self, act: Callable[..., Any], *arguments: Any) -> Future[Any]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "djinn-disk")
        return self._thread.submit(act, *arguments)

    def _write(self, parked: Parked, number: int) -> Filed:
        try:
            folder = self._place()
            path = folder.path / f"{number}.kv"
            if parked.arrived is not None:
                parked.arrived.synchronize()
            data, total = parked.block.tensor[: parked.nbytes].numpy(), 0
            try:
                with path.open("wb", buffering=0) as file:
                    for start in range(0, parked.nbytes, STRETCH):
                        part = data[start : start + STRETCH].data
                        total = zlib.crc32(part, total)
                        while part:
                            part = part[file.write(part) :]
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        except BaseException as error:
            self._gone.append(number)
            if not isinstance(error, OSError):
                raise
            raise CapacityError(
                f"the disk refuses {parked.nbytes} bytes of a paused session's KV: {error}. The session stays in host "
                "memory; free room in spill_dir, or close a session."
            ) from error
        filed = Filed(path, parked.layout, parked.length, parked.nbytes, total, folder)
        weakref.finalize(filed, self._drop, path, number)
        return filed

    def _place(self) -> Folder:
        if self._folder is None:
            self._folder = Folder(self._asked)
        return self._folder

    def _drop(self, path: Path, number: int) -> None:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        self._gone.append(number)
