"""Ways to bring many tensors of a device into host memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from djinn_fx.benchmarks.models import Loaded
from djinn_fx.kernels import pack as packing
from djinn_fx.program import KVSpec
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.parcels import Sent
from djinn_fx.runtime.pinned import SLAB, HostPool
from djinn_fx.runtime.transfer import Transfer

#: Positions of a row beyond the prefix that is copied: what makes the tensors strided.
SLACK = 9


class Row:
    """A row of a KV arena, sent as checkpoints send theirs, into a pool of host memory as theirs.

    Args:
        loaded: the model whose keys and values it has.
        length: positions that are sent; the row has a few more.
    """

    def __init__(self, loaded: Loaded, length: int) -> None:
        heads, width = loaded.kv_shape
        dtype, device = next(loaded.model.parameters()).dtype, loaded.device
        generator = torch.Generator(device).manual_seed(0)
        self.length = length
        self.arena = KVArena([KVSpec(heads, width, width)] * loaded.layers, 1, length + SLACK, dtype, device)
        for tensor in self.arena.env.values():
            tensor.normal_(generator=generator)
        nbytes = length * self.arena.packer.width
        self.transfer = Transfer(self.arena, HostPool(4 * nbytes + (256 << 20), pinned=device.type == "cuda"))
        self.sent: Sent | None = None
        # Memory is pinned, kernels are compiled; each is there before the last one goes. Ordinary memory gets its pages
        # when it is first written, and a pool goes round its whole slab.
        for _ in range(3 if device.type == "cuda" else 3 + min(64, SLAB // nbytes)):
            self.send()

    def send(self) -> None:
        """Begin to send it."""
        self.sent = self.transfer.send(0, self.length)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What is sent: views, strided."""
        return [tensor[0, :, : self.length] for tensor in self.arena.env.values()]

    def arrived(self) -> bool:
        """Whether what was sent last is on the host, bit for bit."""
        if self.sent is None or self.sent.parked is None:
            return False
        return _equal(self.sent.parked.tensors(), self.tensors)

    def spoil(self) -> None:
        """Forget what was sent last, and make its bytes wrong."""
        if self.sent is not None and self.sent.parked is not None:
            self.sent.parked.block.tensor.fill_(0xA5)
        self.sent = None


@dataclass
class Copying:
    """Tensors of a session's size, and room for them.

    Attributes:
        tensors: to copy, strided.
        device: where they are.
        staging: bytes on the device, as many as packed tensors take.
        host: as many on the host, pinned on CUDA.
        parts: the host's bytes as one tensor each.
        flat: one contiguous tensor of as many bytes, for comparison.
        stream: of the copies; None on the CPU.
        row: whose tensors they are, if they are a row's.
        waiting: events of copies not yet read: their begin and end.
    """

    tensors: list[torch.Tensor]
    device: torch.device
    staging: torch.Tensor
    host: torch.Tensor
    parts: list[torch.Tensor]
    flat: torch.Tensor
    stream: Any
    row: Row | None = None
    waiting: list[tuple[Any, Any]] = field(default_factory=list)

    @staticmethod
    def like(loaded: Loaded, nbytes: int) -> Copying:
        """Keys and values of every layer of a model, together about ``nbytes``."""
        heads, width = loaded.kv_shape
        dtype = next(loaded.model.parameters()).dtype
        row = Row(loaded, max(1, nbytes // (2 * loaded.layers * heads * width * dtype.itemsize)))
        found = Copying.of(row.tensors)
        found.row = row
        return found

    @staticmethod
    def of(tensors: list[torch.Tensor]) -> Copying:
        """Room for these tensors."""
        device = tensors[0].device
        cuda = device.type == "cuda"
        layout = packing.plan(tensors)
        staging = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
        host = torch.zeros(layout.nbytes, dtype=torch.uint8, pin_memory=cuda)
        stream = torch.cuda.Stream(device) if cuda else None
        parts = views(host, tensors, layout.offsets)
        flat = torch.empty_like(staging).random_()
        return Copying(tensors, device, staging, host, parts, flat, stream)

    @property
    def nbytes(self) -> int:
        """Bytes that arrive on the host."""
        return self.host.numel()

    def spoil(self) -> None:
        """Make the host's bytes wrong."""
        self.finish()
        self.host.fill_(0xA5)
        if self.row is not None:
            self.row.spoil()

    def finish(self) -> None:
        """Wait until what was begun has arrived."""
        if self.stream is not None:
            torch.cuda.synchronize(self.device)

    def begin(self, way: Way, own: list[float]) -> None:
        """Begin a copy beside what the device does, and note how long it takes."""
        if self.stream is None:
            start = time.perf_counter()
            way.copy()
            own.append(1e3 * (time.perf_counter() - start))
            return
        if self.waiting and not self.waiting[-1][1].query():
            return  # the last one is still on its way: begin no queue
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record(self.stream)
        way.copy()
        if way.own_stream and self.row is not None and self.row.sent is not None:
            self.stream.wait_event(self.row.sent.arrived)
        last.record(self.stream)
        self.waiting.append((first, last))

    def collect(self, own: list[float]) -> None:
        """Read the events of the copies that were begun."""
        self.finish()
        own += [first.elapsed_time(last) for first, last in self.waiting]
        self.waiting.clear()


@dataclass(frozen=True)
class Way:
    """One way to copy.

    Attributes:
        name: in tables.
        copy: begins it, on the copies' stream.
        arrived: whether the host holds the right bytes, once it is finished.
        absent: why it cannot be done here.
        own_stream: whether it goes on another stream than the copies'.
    """

    name: str
    copy: Callable[[], None]
    arrived: Callable[[], bool]
    absent: str | None = None
    own_stream: bool = False


def views(buffer: torch.Tensor, tensors: Sequence[torch.Tensor], offsets: Sequence[int]) -> list[torch.Tensor]:
    """The parts of a buffer of bytes that hold the tensors."""
    return [
        buffer[offset : offset + tensor.numel() * tensor.itemsize].view(tensor.dtype).view(tensor.shape)
        for offset, tensor in zip(offsets, tensors, strict=True)
    ]


def ways(copying: Copying) -> list[Way]:
    """Every way."""
    tensors, host, staging = copying.tensors, copying.host, copying.staging
    staged = views(staging, tensors, packing.plan(tensors).offsets)
    on_stream = partial(_on_stream, copying)

    def send() -> None:
        host.copy_(staging, non_blocking=True)

    def packed() -> None:
        packing.pack(tensors, staging)
        send()

    def foreach() -> None:
        torch._foreach_copy_(staged, tensors)
        send()

    def one_by_one() -> None:
        for part, tensor in zip(copying.parts, tensors, strict=True):
            part.copy_(tensor, non_blocking=True)

    def contiguous() -> None:
        host.copy_(copying.flat, non_blocking=True)

    right = partial(_arrived, copying)
    return [
        _ours(copying),
        Way("pack any tensors, one copy", partial(on_stream, packed), right),
        Way("torch._foreach_copy_ and one copy", partial(on_stream, foreach), right),
        _direct(copying, on_stream, right),
        Way("one by one", partial(on_stream, one_by_one), right),
        Way("one contiguous copy", partial(on_stream, contiguous), lambda: bool(torch.equal(host, copying.flat.cpu()))),
    ]


def _ours(copying: Copying) -> Way:
    """What a checkpoint does with its session's KV."""
    name, row = "a row as checkpoints send it (ours)", copying.row
    if row is None:
        return Way(name, lambda: None, lambda: False, "the tensors are no row of an arena")
    return Way(name, row.send, row.arrived, own_stream=True)


def _direct(copying: Copying, on_stream: Callable[[Callable[[], None]], None], right: Callable[[], bool]) -> Way:
    """The packing kernel with host memory for its target."""
    name = "kernel that writes host memory"
    if copying.device.type != "cuda":
        return Way(name, lambda: None, lambda: False, "on the CPU there is no kernel and no bus")
    try:
        mapped = on_device(copying.host, copying.device)
    except (RuntimeError, TypeError, ValueError) as error:
        return Way(name, lambda: None, lambda: False, f"pinned memory has no address on the device: {error}"[:200])
    return Way(name, partial(on_stream, lambda: packing.pack(copying.tensors, mapped)), right)


class _Mapped:
    """Pinned host memory, as the CUDA array interface describes arrays; one address space serves both sides."""

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host
        self.__cuda_array_interface__ = {
            "shape": (host.numel(),),
            "typestr": "|u1",
            "data": (host.data_ptr(), False),
            "strides": None,
            "version": 2,
        }


def on_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CUDA tensor over pinned host memory, without a copy."""
    mapped = torch.as_tensor(_Mapped(host), device=device)
    if mapped.data_ptr() != host.data_ptr():
        raise RuntimeError("torch copied it")
    return mapped


def _on_stream(copying: Copying, work: Callable[[], None]) -> None:
    """Do it on the copies' stream; the tensors lie ready, so it waits for nothing."""
    if copying.stream is None:
        work()
        return
    with torch.cuda.stream(copying.stream):
        work()


def _arrived(copying: Copying) -> bool:
    """Whether the host's parts equal the tensors, bit for bit."""
    copying.finish()
    return _equal(copying.parts, copying.tensors)


def _equal(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> bool:
    """Whether tensors on the host equal others, bit for bit."""
    return all(
        torch.equal(part.contiguous().view(torch.uint8), tensor.cpu().contiguous().view(torch.uint8))
        for part, tensor in zip(found, wanted, strict=True)
    )
