"""Weights on another device than the user's model: copies that stay, and layers that stream through two slots.

A program's weights are tensors on the device at fixed addresses. Those of a layer that streams lie in a *slot*, a
stretch of device memory that it shares with other layers; pinned host memory holds each such layer in the same layout,
so that one copy brings it. Layers take the slots in turn. Before a segment runs, the layers that it reads are in their
slots; as soon as it is done with one, the next of that slot begins to arrive, on a stream of its own. After the last
comes the first again, so the copies run ahead over the end of a step too.

At rest the slots hold the first layers: that is where a whole step begins and ends. So a decode step that is one CUDA
graph has the copies in it as nodes, beside the kernels.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from djinn_fx.errors import CapacityError, CaptureError, InternalError
from djinn_fx.program import Segment
from djinn_fx.runtime.pinned import PAGE, HostPool, outside_inference
from djinn_fx.runtime.placement import SLOTS, Layer, Placement, leaves


@dataclass(frozen=True)
class Use:
    """What a segment needs of the weights.

    Attributes:
        layers: ranks of the layers that stream and that it reads, in order.
        done: those that no later segment of its program reads.
        tensors: keys of the user's tensors behind its weights.
    """

    layers: tuple[int, ...]
    done: tuple[int, ...]
    tensors: tuple[int, ...]


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


@dataclass(frozen=True, eq=False)
class _Streamed:
    """A layer that streams: its bytes on the host, where each weight lies in them, and its slot."""

    layer: Layer
    host: torch.Tensor
    parts: Mapping[int, torch.Tensor]
    slot: Slot


class Weights:
    """The device's side of a model's weights.

    Attributes:
        placement: what stays and what streams.
        device: where programs run.

    Args:
        model: the user's model, which is not touched.
        placement: likewise.
        device: likewise.

    Raises:
        CapacityError: the system has not enough host memory to pin.
    """

    def __init__(self, model: nn.Module, placement: Placement, device: torch.device) -> None:
        self.placement, self.device = placement, device
        self._lock = threading.RLock()
        self._own: dict[int, torch.Tensor] = {}
        self._copies: dict[int, torch.Tensor] = {}
        self._versions: dict[int, int] = {}
        self._rank_of: dict[int, int] = {}
        self._key_of: dict[int, int] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with outside_inference(), torch.no_grad():
            slots = [Slot(placement.slot_bytes, device) for _ in range(SLOTS)] if placement.streamed else []
            self._slots = tuple(slots)
            self._layers = self._load(placement)
            for tensor in leaves(model):
                self.stand_in(tensor)
        if self._stream is not None:
            torch.cuda.synchronize(device)  # the slots' memory may have been somebody's
        self._start()

    def _load(self, placement: Placement) -> tuple[_Streamed, ...]:
        """Copy the layers that stream to memory of ours."""
        layers = [placement.layers[index] for index in placement.streamed]
        pages = [-(-layer.nbytes // PAGE) * PAGE for layer in layers]
        pool = HostPool(sum(pages), pinned=self._stream is not None, slab=PAGE)
        found = []
        for rank, layer in enumerate(layers):
            slot = self._slots[rank % SLOTS]
            try:
                host = pool.take(layer.nbytes).tensor
            except CapacityError as error:
                raise CapacityError(
                    f"{sum(pages)} bytes of weights would have to lie in pinned host memory to stream, and the system "
                    "refuses. Free host memory, raise the limit of locked memory (ulimit -l), or give a larger "
                    "weights_bytes."
                ) from error
            parts: dict[int, torch.Tensor] = {}
            places = zip(layer.tensors, layer.views(host), layer.views(slot.memory), strict=True)
            for tensor, part, there in places:
                part.copy_(tensor)
                # A storage of its own, as if it were a weight like others: graphs must be the same for all layers.
                self._remember(tensor, from_dlpack(there))
                self._rank_of[id(tensor)] = rank
                parts[id(tensor)] = part
            found.append(_Streamed(layer, host, parts, slot))
        return tuple(found)

    def _remember(self, tensor: torch.Tensor, copy: torch.Tensor) -> None:
        if isinstance(tensor, nn.Parameter):
            copy = nn.Parameter(copy, requires_grad=tensor.requires_grad)
        self._own[id(tensor)], self._copies[id(tensor)] = tensor, copy
        self._versions[id(tensor)] = _version(tensor)
        self._key_of[_storage(copy)] = id(tensor)

    def stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a program reads in place of one of the model's tensors."""
        if id(tensor) not in self._copies:
            with outside_inference(), torch.no_grad():
                self._remember(tensor, torch.empty_like(tensor, device=self.device).copy_(tensor))
        return self._copies[id(tensor)]

    @property
    def device_bytes(self) -> int:
        """Bytes on the device: what stays, and the slots."""
        stay = sum(copy.nbytes for key, copy in self._copies.items() if key not in self._rank_of)
        return stay + sum(slot.memory.nbytes for slot in self._slots)

    @property
    def host_bytes(self) -> int:
        """Bytes on the host, pinned for CUDA."""
        return sum(each.host.nbytes for each in self._layers)

    # -- who uses them -------------------------------------------------------------------------

    def feed(self, segments: Sequence[Segment], weights: Mapping[str, torch.Tensor]) -> ProgramFeed:
        """What brings the weights of a program.

        Raises:
            CaptureError: a segment reads more layers than there are slots.
        """
        keys = [[self._key_of.get(_storage(weights[name])) for name in segment.weights] for segment in segments]
        known = [tuple(key for key in some if key is not None) for some in keys]
        layers = [tuple(sorted({self._rank_of[key] for key in some if key in self._rank_of})) for some in known]
        last = {rank: index for index, ranks in enumerate(layers) for rank in ranks}
        uses = []
        for index, ranks in enumerate(layers):
            if len({rank % SLOTS for rank in ranks}) < len(ranks):
                raise CaptureError(
                    f"{segments[index].name} reads the weights of {len(ranks)} layers at once, so they cannot stream: "
                    "this model is not cut at its layers. Compile without weights_bytes."
                )
            uses.append(Use(ranks, tuple(rank for rank in ranks if last[rank] == index), known[index]))
        return ProgramFeed(self, tuple(uses))

    def around(self, path: str) -> AbstractContextManager[None] | None:
        """What a module of an eager model runs in, if it is a layer that streams."""
        for rank, each in enumerate(self._layers):
            if each.layer.path == path:
                return self.running(Use((rank,), (rank,), tuple(each.parts)))
        return None

    @contextmanager
    def running(self, use: Use) -> Iterator[None]:
        """While something runs that reads weights: they are there, and what comes next begins to arrive."""
        with self._lock:
            self._freshen(use.tensors)
            if use.layers:
                self._bring(use.layers)
            try:
                yield
            finally:
                if use.layers:
                    self._note_read([self._layers[rank].slot for rank in use.layers])
                for rank in use.done:
                    self._begin(self._following(rank))

    @contextmanager
    def replaying(self, uses: Iterable[Use]) -> Iterator[None]:
        """While a captured step is enqueued, which brings its layers itself."""
        with self._lock:
            for use in uses:
                self._freshen(use.tensors)
            self._start()
            self._wait()
            try:
                yield
            finally:
                for slot in self._slots:  # whoever read it before was waited for
                    slot.read = {}
                event = self._note_read(self._slots)
                for slot in self._slots:  # what the step leaves there is there at its end
                    slot.arrived = event

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """While a step is captured: nothing outside is under way, and nothing of it is waited for outside."""
        with self._lock:
            self._start()
            if self._stream is not None:
                torch.cuda.synchronize(self.device)
            for slot in self._slots:
                slot.settle()
            try:
                yield
            except BaseException:
                for slot in self._slots:  # nothing of it ran, so nobody knows what is there
                    slot.holds = None
                raise
            finally:
                for slot in self._slots:
                    slot.settle()
            if any(slot.holds != rank for rank, slot in enumerate(self._slots)):
                raise InternalError("a captured step does not end with the first layers in their slots")

    def join(self) -> None:
        """The current stream waits for every copy that was begun."""
        with self._lock:
            self._wait()

    def reload(self) -> None:
        """Take over the values of the user's tensors as they are now."""
        with self._lock:
            self._take_over(self._own)

    # -- copies --------------------------------------------------------------------------------

    def _following(self, rank: int) -> int:
        """The layer that comes into a layer's slot after it."""
        return rank + SLOTS if rank + SLOTS < len(self._layers) else rank % SLOTS

    def _bring(self, ranks: tuple[int, ...]) -> None:
        """Let the current stream have these layers; they are on their way already, unless another step came between."""
        missing = [rank for rank in ranks if self._layers[rank].slot.holds != rank]
        for rank in missing:
            self._begin(rank)
        after = ranks[-1] + 1
        if missing and after < len(self._layers) and after % SLOTS not in {rank % SLOTS for rank in ranks}:
            self._begin(after)
        self._wait([self._layers[rank].slot for rank in ranks])

    def _start(self) -> None:
        """Let the slots hold, or be about to hold, the first layers."""
        for rank, _ in enumerate(self._slots):
            self._begin(rank)

    def _begin(self, rank: int) -> None:
        """Begin the copy of a layer to its slot, once nobody reads what is there; nothing if it is there."""
        each = self._layers[rank]
        slot = each.slot
        if slot.holds == rank:
            return
        slot.holds = None
        target = slot.memory[: each.layer.nbytes]
        if self._stream is None:
            self._copy(target, each.host)
        else:
            for event in slot.read.values():
                self._stream.wait_event(event)
            with torch.cuda.stream(self._stream):
                self._copy(target, each.host)
            slot.read, slot.arrived = {}, torch.cuda.Event()
            slot.arrived.record(self._stream)
        slot.holds = rank

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue one copy on the current stream."""
        with outside_inference(), torch.no_grad():
            target.copy_(source, non_blocking=True)

    def _wait(self, slots: Sequence[Slot] | None = None) -> None:
        """The current stream waits until what slots hold is there; all slots: and until nobody else reads them."""
        if self._stream is None:
            return
        stream = torch.cuda.current_stream(self.device)
        for slot in self._slots if slots is None else slots:
            events = [] if slot.arrived is None else [slot.arrived]
            for event in [*events, *(slot.read.values() if slots is None else ())]:
                stream.wait_event(event)

    def _note_read(self, slots: Sequence[Slot]) -> torch.cuda.Event | None:
        """The current stream has just been given the last that reads these slots; the event passes behind it."""
        if self._stream is None or not slots:
            return None
        stream = torch.cuda.current_stream(self.device)
        event = torch.cuda.Event()
        event.record(stream)
        for slot in slots:
            slot.read[stream.stream_id] = event
        return event

    # -- changes in place ----------------------------------------------------------------------

    def _freshen(self, keys: Iterable[int]) -> None:
        """Take over what was changed in place."""
        changed = [key for key in keys if _version(self._own[key]) != self._versions[key]]
        if changed:
            self._take_over(changed)

    def _take_over(self, keys: Iterable[int]) -> None:
        if self._stream is not None:
            torch.cuda.synchronize(self.device)  # copies from the host's memory may be under way
        with outside_inference(), torch.no_grad():
            for key in keys:
                tensor, rank = self._own[key], self._rank_of.get(key)
                self._versions[key] = _version(tensor)
                if rank is None:
                    self._copies[key].copy_(tensor)
                else:
                    each = self._layers[rank]
                    each.parts[key].copy_(tensor)
                    each.slot.holds = None if each.slot.holds == rank else each.slot.holds


@dataclass(frozen=True, eq=False)
class ProgramFeed:
    """A program's weights; see :class:`djinn_fx.program.Feed`."""

    weights: Weights
    uses: tuple[Use, ...]

    def running(self, segment: int) -> AbstractContextManager[None]:
        """While a segment runs."""
        return self.weights.running(self.uses[segment])

    def replaying(self) -> AbstractContextManager[None]:
        """While the captured step is enqueued."""
        return self.weights.replaying(self.uses)

    def capturing(self) -> AbstractContextManager[None]:
        """While the step is captured."""
        return self.weights.capturing()

    def join(self) -> None:
        """At the end of a captured step: its copies belong to it."""
        self.weights.join()


def _version(tensor: torch.Tensor) -> int:
    """Counts changes in place, other than through ``.data``; a tensor of inference mode counts none."""
    return 0 if tensor.is_inference() else tensor._version


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
