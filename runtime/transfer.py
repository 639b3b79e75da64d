"""Transfers: a row's KV to host memory and back, on a stream of their own; the host waits for nothing.

On CUDA a row is packed into a staging buffer with one launch, a stop's value behind it, and sent with one asynchronous
copy. What is longer than the buffer goes in pieces, the first of them short, so that the bus begins at once. Two
streams take them in turn, each with its half of the buffer: one packs while the other copies. The way back is the
mirror, on one stream. The copy stream begins behind all that the compute stream was given so far. The compute stream
waits for it only where something would overwrite what is still being read (:meth:`KVArena.settle`). A row that its
session leaves is zeroed on the copy stream, and a row that comes back is ready when an event passes
(:meth:`KVArena.moving`): the driver waits for that on the host, outside the engine's lock, so that the steps of others
are never behind a copy. On the CPU the same calls copy, at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from djinn_fx.errors import CapacityError
from djinn_fx.kernels.rows import WORD, Piece, RowLayout
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.copystream import Current, mark, part
from djinn_fx.runtime.modes import outside_inference
from djinn_fx.runtime.pinned import Block, HostPool, ordinary

#: Bytes of the staging buffer on the device; what is longer goes in pieces of half as many.
STAGING = 32 << 20

#: Bytes of the first piece of several: few, so that the bus begins at once, but it takes longer than to send the next.
FIRST = 6 << 20

#: What follows the KV in a block begins at a multiple of this, and so does the second half of the staging buffer.
_GAP = 64


@dataclass(eq=False)
class Parked:
    """KV of one row in host memory, perhaps still on its way.

    Attributes:
        block: where it lies, packed.
        layout: how.
        length: its positions.
        nbytes: its bytes.
        arrived: passes when it is there; None on the CPU.
    """

    block: Block
    layout: RowLayout
    length: int
    nbytes: int
    arrived: torch.cuda.Event | None = None

    in_memory: ClassVar[bool] = True

    def tensors(self, length: int | None = None) -> list[torch.Tensor]:
        """Keys and values of each layer, ``[heads, length, dim]``, in the order of ``KVArena.env``.

        The host waits until they are there. They are views that nobody may write; they keep the memory.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        found = self.layout.views(self.block.tensor, self.length)
        return found if length is None else [tensor[:, :length] for tensor in found]


@dataclass(eq=False, slots=True)
class Sent:
    """What one checkpoint sent.

    Attributes:
        parked: the KV; None if none was asked for.
        arrived: passes when all of it is there; None on the CPU.
        block: the memory, if a tensor went with the KV.
        place: where it lies in the block: its first byte, dtype and shape.
        kept: the tensor itself, if it needed no copy.
    """

    parked: Parked | None
    arrived: torch.cuda.Event | None = None
    block: Block | None = None
    place: tuple[int, torch.dtype, torch.Size] | None = None
    kept: torch.Tensor | None = None

    @property
    def extra(self) -> torch.Tensor | None:
        """The tensor that went with it, on the host, to be read once it has arrived; None if there was none."""
        if self.block is None or self.place is None:
            return self.kept
        start, dtype, shape = self.place
        return self.block.tensor[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def fetch(tensors: Mapping[str, torch.Tensor], pool: HostPool) -> dict[str, torch.Tensor]:
    """Tensors on the host: those that lie there as they are, the others copied; the host waits for them.

    The copies are views of one block of ``pool``, or where that has no room left, ordinary memory.

    Args:
        tensors: whatever is to come; on a GPU each must be computed already, not just enqueued.
        pool: where the block comes from.
    """
    far = {name: tensor for name, tensor in tensors.items() if not tensor.is_cpu}
    if not far:
        return dict(tensors)
    sizes = [-(-tensor.nbytes // _GAP) * _GAP for tensor in far.values()]
    try:
        memory = pool.take(sum(sizes)).tensor
    except CapacityError:
        return {name: tensor.cpu() for name, tensor in tensors.items()}
    found, offset = dict(tensors), 0
    stream = torch.cuda.Stream(next(iter(far.values())).device)
    with torch.cuda.stream(stream):
        for (name, tensor), size in zip(far.items(), sizes, strict=True):
            found[name] = memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            found[name].copy_(tensor, non_blocking=True)
            offset += size
    stream.synchronize()
    return found


class Transfer:
    """Moves rows of an arena to host memory and back; the caller holds the engine's lock.

    Args:
        arena: whose rows.
        pool: where host memory comes from.
        staging: bytes of the staging buffer, made at the first transfer.
    """

    def __init__(self, arena: KVArena, pool: HostPool, staging: int = STAGING) -> None:
        self._arena, self._pool, self._limit = arena, pool, staging
        self._staging: torch.Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._other: torch.cuda.Stream | None = None  # the second, for what is longer than the staging buffer
        self._cuda = arena.device.type == "cuda"
        self._compute: torch.cuda.Stream  # the engine's stream; made with the copy stream, like the next two
        self._begun: torch.cuda.Event  # how far the compute stream had come
        self._aside: Current  # the copy stream in its place
        # Device tensors that are being sent; kept until they are through.
        self._flying: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()

    @property
    def staging_bytes(self) -> int:
        """Bytes of device memory that it takes."""
        return 0 if self._staging is None else self._staging.nbytes

    def send(
        self,
        row: int | None,
        length: int,
        extra: torch.Tensor | None = None,
        *,
        beyond: bool = False,
    ) -> Sent:
        """Begin to copy positions ``[0, length)`` of a row to the host, and one tensor with it.

        Args:
            row: the row; None sends ``extra`` alone.
            length: how many positions.
            extra: contiguous, on the arena's device, not written from now on. On the CPU it is kept as it is.
            beyond: to ordinary memory that no budget counts; on CUDA the host waits for that.

        Raises:
            CapacityError: no host memory is left, or no device memory to stage in; nothing was begun.
        """
        packer = self._arena.packer
        size = 0 if row is None else length * packer.width
        start = -(-size // _GAP) * _GAP
        more = 0 if extra is None else extra.nbytes
        whole = start + more if self._cuda and extra is not None else size
        block = (ordinary(whole) if beyond else self._pool).take(whole)
        parked = None if row is None else Parked(block, packer.layout, length, size)
        if not self._cuda:
            if row is not None:
                for piece in packer.pieces(length, size):
                    packer.pack(row, piece, block.tensor)
            return Sent(parked, kept=extra)
        stream, staging = self._ready()
        with self._aside:
            along = False
            if row is not None and size:
                along = self._pack(row, length, block.tensor, staging, stream, extra, start)
            if extra is not None and not along:
                part(block.tensor, start, more).copy_(extra.view(-1).view(torch.uint8), non_blocking=True)
            arrived = mark(stream)
            block.busy_until(arrived)
            if extra is not None:
                self._flying.append((arrived, extra))
        if parked is not None:
            parked.arrived = arrived
        if extra is None:
            return Sent(parked, arrived)
        return Sent(parked, arrived, block, (start, extra.dtype, extra.shape))

    def leave(self, row: int) -> None:
        """Zero a row that was sent whole, behind its packing; the caller gives it back with :meth:`KVArena.vacated`."""
        if self._stream is None:
            self._arena.packer.clear(row)
            return
        with self._aside:
            self._arena.packer.clear(row)
            self._arena.moving(row, mark(self._stream))

    def receive(self, parked: Parked, row: int) -> None:
        """Begin to copy what was parked into a row; :meth:`KVArena.arrive` and ``on_the_way`` say when it is there.

        Raises:
            CapacityError: no device memory to stage in; nothing was begun.
        """
        packer = self._arena.packer
        memory = parked.block.tensor
        if not self._cuda:
            for piece in packer.pieces(parked.length, parked.nbytes):
                packer.unpack(memory, row, piece)
            return
        stream, staging = self._ready()
        if parked.block.busy is not None:
            stream.wait_event(parked.block.busy)  # another model's stream may have sent it, or be reading it too
        with self._aside:
            for piece in packer.pieces(parked.length, staging.numel()):
                there = memory[piece.offset : piece.offset + piece.nbytes]
                staging[: piece.nbytes].copy_(there, non_blocking=True)
                packer.unpack(staging, row, piece)
            done = mark(stream)
            parked.block.busy_until(done)
        self._arena.moving(row, done)

    def warm(self) -> None:
        """Make what the first transfer would have to make: staging, the first slab, the kernels.

        Raises:
            CapacityError: as :meth:`send`.
        """
        spare = self._arena.spare_row
        sample = self._arena.layers[0][0][spare, 0, :1] if self._arena.layers else None
        sent = self.send(spare, 1, None if sample is None else sample.clone())
        if sent.parked is not None:
            self.receive(sent.parked, spare)
            self._arena.arrive(spare)
        self._arena.copy(spare, [spare], 1)

    def _pack(
        self,
        row: int,
        length: int,
        memory: torch.Tensor,
        staging: torch.Tensor,
        stream: torch.cuda.Stream,
        extra: torch.Tensor | None,
        start: int,
    ) -> bool:
        """Begin to send KV to the beginning of ``memory``, and ``extra`` to its byte ``start`` if it fits behind it.

        Returns:
            whether ``extra`` went along.
        """
        packer, room = self._arena.packer, staging.numel()
        if length * packer.width <= room:
            halves, pieces = [staging], packer.pieces(length, room)
        else:
            halves = [staging[: room // 2], staging[room // 2 :]]
            pieces = packer.pieces(length, room // 2, min(FIRST, room // 2))
        last = pieces[-1]
        at = start - last.offset
        if extra is not None and (at + extra.nbytes > halves[0].numel() or extra.data_ptr() % WORD):
            extra = None
        if len(pieces) == 1:
            packer.pack(row, last, staging, extra, at)
            # From here on the row may be overwritten: what is still to be sent lies in the staging buffer.
            self._arena.reading(row, mark(stream))
            end = last.nbytes if extra is None else memory.numel()
            part(memory, 0, end).copy_(part(staging, 0, end), non_blocking=True)
        else:
            self._pack_in_turn(row, pieces, memory, halves, stream, extra, at)
        return extra is not None

    def _pack_in_turn(
        self,
        row: int,
        pieces: list[Piece],
        memory: torch.Tensor,
        halves: list[torch.Tensor],
        stream: torch.cuda.Stream,
        extra: torch.Tensor | None,
        at: int,
    ) -> None:
        """:meth:`_pack` of several pieces: the last goes on ``stream``, that before it on the other, and so on."""
        if self._other is None:
            self._other = torch.cuda.Stream(self._arena.device)
        streams, final = (stream, self._other), len(pieces) - 1
        packed = through = mark(stream)
        self._other.wait_event(packed)  # what the stream does still may read the row, or fill the staging buffer
        for index, piece in enumerate(pieces):
            turn = (final - index) % 2
            torch.cuda.set_stream(streams[turn])
            end = piece.nbytes
            if index == final:
                stream.wait_event(packed)
                self._arena.packer.pack(row, piece, halves[turn], extra, at)
                self._arena.reading(row, mark(stream))
                end = end if extra is None else memory.numel() - piece.offset
            else:
                self._arena.packer.pack(row, piece, halves[turn])
                if index == final - 1:
                    packed = mark(self._other)
            part(memory, piece.offset, end).copy_(part(halves[turn], 0, end), non_blocking=True)
            if index == final - 1:
                through = mark(self._other)
        stream.wait_event(through)

    def _ready(self) -> tuple[torch.cuda.Stream, torch.Tensor]:
        """The copy stream, behind all that the compute stream was given so far; the staging buffer."""
        while self._flying and self._flying[0][0].query():
            self._flying.popleft()
        device = self._arena.device
        if self._stream is None:
            self._stream, self._begun = torch.cuda.Stream(device), torch.cuda.Event()
            self._compute = torch.cuda.default_stream(device)  # whoever holds the engine's lock is on it
            self._aside = Current(self._stream, self._compute)
        if self._staging is None:
            self._staging = self._make_staging(self._stream)
        self._begun.record(self._compute)
        self._begun.wait(self._stream)
        return self._stream, self._staging

    def _make_staging(self, stream: torch.cuda.Stream) -> torch.Tensor:
        packer = self._arena.packer
        widest = max((dim for _, dim in packer.layout.shapes), default=1) * packer.layout.dtype.itemsize
        # A whole row of a small model, and what goes along; two positions of a head at least.
        size = min(self._limit, packer.width * self._arena.positions + FIRST)
        half = max(size // 2, widest)
        size = 2 * (-(-half // _GAP) * _GAP)
        try:
            # Of the copy stream's own memory: it is given to nobody else before that stream is through with it.
            with outside_inference(), torch.cuda.stream(stream):
                return torch.empty(size, dtype=torch.uint8, device=self._arena.device)
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"{size} bytes of device memory are needed to stage copies to the host, and the device has none left. "
                "Free device memory, or compile with a smaller max_sessions or max_length."
            ) from error
