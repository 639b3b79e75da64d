"""Weights on another device than the user's model: copies that stay, and layers that stream through slots.

A program's weights are tensors on the device at fixed addresses. Those of a layer that streams lie in a *slot*, a
stretch of device memory that it shares with other layers (:mod:`djinn_fx.runtime.slots`); pinned host memory holds each
such layer in the same layout, so that one copy brings it. Layers take the slots in turn. Before a segment runs, the
layers that it reads are in their slots; as soon as it is done with one, the next of that slot begins to arrive. After
the last comes the first again, so the copies run ahead over the end of a step too.

A decode step that is one CUDA graph has the copies in it as nodes, beside the kernels.
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
from djinn_fx.runtime.modes import outside_inference
from djinn_fx.runtime.pinned import HostPool
from djinn_fx.runtime.placement import SLOTS, Layer, Placement, leaves
from djinn_fx.runtime.slab import PAGE
from djinn_fx.runtime.slots import Slots


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


@dataclass(frozen=True, eq=False)
class _Streamed:
    """A layer that streams: its bytes on the host, and where each weight lies in them."""

    layer: Layer
    host: torch.Tensor
    parts: Mapping[int, torch.Tensor]


class Weights:
    """The device's side of a model's weights.

    Attributes:
        placement: what stays and what streams.
        device: where programs run.
        slots: where layers that stream come to.

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
        layers = [placement.layers[index] for index in placement.streamed]
        with outside_inference(), torch.no_grad():
            hosts = _host_memory(layers, pinned=device.type == "cuda")
            self.slots = Slots(hosts, device)
            self._layers = tuple(self._load(*each) for each in enumerate(zip(layers, hosts, strict=True)))
            for tensor in leaves(model):
                self.stand_in(tensor)
        self.slots.start()

    def _load(self, rank: int, where: tuple[Layer, torch.Tensor]) -> _Streamed:
        """Copy a layer that streams to its place on the host."""
        layer, host = where
        parts: dict[int, torch.Tensor] = {}
        places = zip(layer.tensors, layer.views(host), layer.views(self.slots.of(rank).memory), strict=True)
        for tensor, part, there in places:
            part.copy_(tensor)
            # A storage of its own, as if it were a weight like others: graphs must be the same for all layers.
            self._remember(tensor, from_dlpack(there))
            self._rank_of[id(tensor)] = rank
            parts[id(tensor)] = part
        return _Streamed(layer, host, parts)

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
        return stay + self.slots.nbytes

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
                self.slots.bring(use.layers)
            try:
                yield
            finally:
                self.slots.used(use.layers, use.done)

    @contextmanager
    def replaying(self, uses: Iterable[Use]) -> Iterator[None]:
        """While a captured step is enqueued, which brings its layers itself."""
        with self._lock:
            for use in uses:
                self._freshen(use.tensors)
            self.slots.start()
            self.slots.join()
            try:
                yield
            finally:
                self.slots.enqueued()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """While a step is captured: nothing outside is under way, and nothing of it is waited for outside."""
        slots = self.slots.slots
        with self._lock:
            self.slots.start()
            self.slots.synchronize()
            self.slots.settle()
            try:
                yield
            except BaseException:
                for slot in slots:  # nothing of it ran, so nobody knows what is there
                    slot.holds = None
                raise
            finally:
                self.slots.settle()
            if any(slot.holds != rank for rank, slot in enumerate(slots)):
                raise InternalError("a captured step does not end with the first layers in their slots")

    def join(self) -> None:
        """The current stream waits for every copy that was begun."""
        with self._lock:
            self.slots.join()

    def reload(self) -> None:
        """Take over the values of the user's tensors as they are now."""
        with self._lock:
            self._take_over(self._own)

    # -- changes in place ----------------------------------------------------------------------

    def _freshen(self, keys: Iterable[int]) -> None:
        """Take over what was changed in place."""
        changed = [key for key in keys if _version(self._own[key]) != self._versions[key]]
        if changed:
            self._take_over(changed)

    def _take_over(self, keys: Iterable[int]) -> None:
        self.slots.synchronize()  # copies from the host's memory may be under way
        with outside_inference(), torch.no_grad():
            for key in keys:
                tensor, rank = self._own[key], self._rank_of.get(key)
                self._versions[key] = _version(tensor)
                if rank is None:
                    self._copies[key].copy_(tensor)
                else:
                    self._layers[rank].parts[key].copy_(tensor)
                    self.slots.forget(rank)


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


def _host_memory(layers: Sequence[Layer], *, pinned: bool) -> list[torch.Tensor]:
    """A stretch of host memory for each layer."""
    pages = [-(-layer.nbytes // PAGE) * PAGE for layer in layers]
    pool = HostPool(sum(pages), pinned=pinned, slab=PAGE, growing=False)
    try:
        return [pool.take(layer.nbytes).tensor for layer in layers]
    except CapacityError as error:
        raise CapacityError(
            f"{sum(pages)} bytes of weights would have to lie in pinned host memory to stream, and the system refuses. "
            "Free host memory, raise the limit of locked memory (ulimit -l), or give a larger weights_bytes."
        ) from error


def _version(tensor: torch.Tensor) -> int:
    """Counts changes in place, other than through ``.data``; a tensor of inference mode counts none."""
    return 0 if tensor.is_inference() else tensor._version


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
