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

import torch

from djinn_fx.errors import CapacityError
from djinn_fx.kernels.rows import WORD, Piece
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.copystream import Current, mark, part
from djinn_fx.runtime.doubt import Copy
from djinn_fx.runtime.modes import outside_inference
from djinn_fx.runtime.parcels import GAP, Parked, Sent
from djinn_fx.runtime.pinned import Block, HostPool, ordinary

#: Bytes of the staging buffer on the device; what is longer goes in pieces of half as many.
STAGING = 32 << 20

#: Bytes of the first piece of several: few, so that the bus begins at once, but it takes longer than to send the next.
FIRST = 6 << 20

#: Bytes of a value that a kernel copies straight over the bus, in the order of the engine's stream, which it holds up
#: for twenty microseconds at most; a longer one is copied on the device, and sent beside the engine's work.
DIRECT = 1 << 20


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
        copy: Copy | None = None,
        beyond: bool = False,
    ) -> Sent:
        """Begin to copy positions ``[0, length)`` of a row to the host, and one tensor with it.

        Args:
            row: the row; None sends ``extra`` alone.
            length: how many positions.
            extra: on the arena's device. Without ``copy`` contiguous, not written from now on; on the CPU it is kept as
                it is.
            copy: copies ``extra``, which others may write to; on CUDA.
            beyond: to ordinary memory that no budget counts; on CUDA the host waits for that.

        Raises:
            CapacityError: no host memory is left, or no device memory to stage in; nothing was begun.
        """
        packer = self._arena.packer
        size = 0 if row is None else length * packer.width
        start = -(-size // GAP) * GAP
        more = 0 if extra is None else extra.nbytes
        whole = start + more if self._cuda and extra is not None else size
        block = (ordinary(whole) if beyond else self._pool).take(whole)
        parked = None if row is None else Parked(block, packer.layout, length, size)
        if not self._cuda:
            if row is not None:
                for piece in packer.pieces(length, size):
                    packer.pack(row, piece, block.tensor)
            return Sent(parked, kept=extra)
        going, arrived = extra, None
        if extra is not None and copy is not None:
            going, arrived = self._copied(extra, copy, None if beyond or more > DIRECT else (block, start))
        if size or arrived is None:
            arrived = self._send(row, length, block, going, start)
        if parked is not None:
            parked.arrived = arrived
        if extra is None:
            return Sent(parked, arrived)
        return Sent(parked, arrived, block, (start, extra.dtype, extra.shape))

    def _copied(
        self, extra: torch.Tensor, copy: Copy, place: tuple[Block, int] | None
    ) -> tuple[torch.Tensor | None, torch.cuda.Event | None]:
        """Have a tensor copied, straight into its place in a block, or where it is still to be sent from.

        Returns:
            what is still to be sent, and what passes when the tensor is in its place; one of them.
        """
        if place is None:
            own = torch.empty(extra.shape, dtype=extra.dtype, device=extra.device)
            copy(own)
            return own, None
        block, start = place
        try:
            arrived = copy(part(block.tensor, start, extra.nbytes))
            assert arrived is not None
            block.busy_until(arrived)
        except BaseException:  # an interrupt: nothing may write into memory that is then given to somebody else
            torch.cuda.synchronize(self._arena.device)
            raise
        return None, arrived

    def _send(
        self, row: int | None, length: int, block: Block, extra: torch.Tensor | None, start: int
    ) -> torch.cuda.Event:
        """Begin to send KV and ``extra``, which nobody writes, to a block; returns what passes when they are there."""
        stream, staging = self._ready()
        with self._aside:
            along = False
            if row is not None and length:
                along = self._pack(row, length, block.tensor, staging, stream, extra, start)
            if extra is not None and not along:
                there = part(block.tensor, start, extra.nbytes)
                there.copy_(extra.view(-1).view(torch.uint8), non_blocking=True)
            arrived = mark(stream)
            block.busy_until(arrived)
            if extra is not None:
                self._flying.append((arrived, extra))
        return arrived

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
        size = 2 * (-(-half // GAP) * GAP)
        try:
            # Of the copy stream's own memory: it is given to nobody else before that stream is through with it.
            with outside_inference(), torch.cuda.stream(stream):
                return torch.empty(size, dtype=torch.uint8, device=self._arena.device)
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"{size} bytes of device memory are needed to stage copies to the host, and the device has none left. "
                "Free device memory, or compile with a smaller max_sessions or max_length."
            ) from error
