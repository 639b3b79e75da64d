"""Slots: device memory that layers take in turns, and the copies from the host that fill it.

Copies run on a stream of their own. A copy waits, on the device, for whoever still reads its slot; who reads a slot
waits for its copy. At rest the slots hold the first layers: that is where a whole step begins and ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from djinn_fx.runtime.modes import outside_inference
from djinn_fx.runtime.placement import SLOTS


class Slot:
    """Room on the device for one layer at a time.

    Attributes:
        memory: uint8, on the device.
        holds: rank of the layer that is there, or that arrives; None: none.
        arrived: passes when it is there; None: it is.
        read: by stream, passes when that stream has read it for the last time.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.holds: int | None = None
        self.settle()

    def settle(self) -> None:
        """Nothing is under way."""
        self.arrived: torch.cuda.Event | None = None
        self.read: dict[int, torch.cuda.Event] = {}


class Slots:
    """The slots of one model. Whoever calls holds a lock.

    Attributes:
        slots: all of them.

    Args:
        hosts: each layer's bytes on the host, uint8; pinned for CUDA.
        device: where the slots are.
    """

    def __init__(self, hosts: Sequence[torch.Tensor], device: torch.device) -> None:
        self._hosts, self._device = tuple(hosts), device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        size = max((host.nbytes for host in hosts), default=0)
        self.slots = tuple(Slot(size, device) for _ in range(SLOTS if hosts else 0))
        self.synchronize()  # their memory may have been somebody's

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(slot.memory.nbytes for slot in self.slots)

    def of(self, rank: int) -> Slot:
        """The slot of a layer, by its rank among those that stream."""
        return self.slots[rank % SLOTS]

    # -- what comes and goes -------------------------------------------------------------------

    def start(self) -> None:
        """Let the slots hold, or be about to hold, the first layers."""
        for rank, _ in enumerate(self.slots):
            self._begin(rank)

    def bring(self, ranks: tuple[int, ...]) -> None:
        """Let the current stream have these layers; they are on their way already, unless another step came between."""
        missing = [rank for rank in ranks if self.of(rank).holds != rank]
        for rank in missing:
            self._begin(rank)
        after = ranks[-1] + 1
        if missing and after < len(self._hosts) and after % SLOTS not in {rank % SLOTS for rank in ranks}:
            self._begin(after)
        for rank in ranks:
            self._await([self.of(rank).arrived])

    def used(self, ranks: Iterable[int], done: Iterable[int]) -> None:
        """The current stream has been given the last that reads these layers now; those that are done make room."""
        self._note([self.of(rank) for rank in ranks])
        for rank in done:
            self._begin(rank + SLOTS if rank + SLOTS < len(self._hosts) else rank % SLOTS)

    def forget(self, rank: int) -> None:
        """A layer changed on the host: it must come again."""
        if self.of(rank).holds == rank:
            self.of(rank).holds = None

    # -- whole steps ---------------------------------------------------------------------------

    def join(self) -> None:
        """The current stream waits for every copy that was begun, and for every other that reads a slot."""
        for slot in self.slots:
            self._await([slot.arrived, *slot.read.values()])

    def enqueued(self) -> None:
        """The current stream, which has joined all, was given a step that brings its layers itself."""
        for slot in self.slots:
            slot.read = {}
        event = self._note(self.slots)
        for slot in self.slots:  # what the step leaves there is there at its end
            slot.arrived = event

    def synchronize(self) -> None:
        """Wait until the device is done with everything."""
        if self._stream is not None:
            torch.cuda.synchronize(self._device)

    def settle(self) -> None:
        """Nothing is under way: no event of before is waited for again."""
        for slot in self.slots:
            slot.settle()

    # -- copies --------------------------------------------------------------------------------

    def _begin(self, rank: int) -> None:
        """Begin the copy of a layer to its slot, once nobody reads what is there; nothing if it is there."""
        slot, host = self.of(rank), self._hosts[rank]
        if slot.holds == rank:
            return
        slot.holds = None
        target = slot.memory[: host.nbytes]
        if self._stream is None:
            self._copy(target, host)
        else:
            for event in slot.read.values():
                self._stream.wait_event(event)
            with torch.cuda.stream(self._stream):
                self._copy(target, host)
            slot.read, slot.arrived = {}, torch.cuda.Event()
            slot.arrived.record(self._stream)
        slot.holds = rank

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue one copy on the current stream."""
        with outside_inference(), torch.no_grad():
            target.copy_(source, non_blocking=True)

    def _await(self, events: Iterable[torch.cuda.Event | None]) -> None:
        """The current stream waits for events."""
        if self._stream is None:
            return
        stream = torch.cuda.current_stream(self._device)
        for event in events:
            if event is not None:
                stream.wait_event(event)

    def _note(self, slots: Sequence[Slot]) -> torch.cuda.Event | None:
        """The current stream reads these slots up to here; the event passes behind it."""
        if self._stream is None or not slots:
            return None
        stream = torch.cuda.current_stream(self._device)
        event = torch.cuda.Event()
        event.record(stream)
        for slot in slots:
            slot.read[stream.stream_id] = event
        return event
