"""Streams that do nothing until somebody waits, and then in any order that they allow: races without a GPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from djinn_fx.kernels.rows import Piece, Rows
from djinn_fx.runtime.transfer import Transfer


class Point:
    """A place in a stream's queue, passed or not."""

    passed = False


class Stream:
    """Its work waits in a queue."""

    device_index = 0

    def __init__(self, cuda: LazyCuda) -> None:
        self.cuda = cuda
        self.queue: list[Callable[[], bool]] = []  # each says whether it could be done
        cuda.streams.append(self)

    def do(self, work: Callable[[], object]) -> None:
        self.queue.append(lambda: work() is None or True)

    def wait_event(self, event: Event) -> None:
        point = event.point
        self.queue.append(lambda: point is None or point.passed)

    def record_event(self) -> Event:
        event = Event(self.cuda)
        event.record(self)
        return event

    def synchronize(self) -> None:
        while self.queue:
            self.cuda.some_work()


class Prompt(Stream):
    """Does everything at once, and lets the others work until it may."""

    def do(self, work: Callable[[], object]) -> None:
        work()

    def wait_event(self, event: Event) -> None:
        event.synchronize()


class Event:
    """Passes when its stream comes to where it was recorded last."""

    def __init__(self, cuda: LazyCuda) -> None:
        self.cuda = cuda
        self.point: Point | None = None

    def record(self, stream: Stream) -> None:
        self.point = point = Point()
        stream.do(lambda: setattr(point, "passed", True))

    def wait(self, stream: Stream) -> None:
        stream.wait_event(self)

    def query(self) -> bool:
        return self.point is None or self.point.passed

    def synchronize(self) -> None:
        while not self.query():
            self.cuda.some_work()


class LazyCuda:
    """Stands in for ``torch.cuda`` under one transfer; packing and asynchronous copies wait in the queues.

    Args:
        seed: of the order in which streams work.
        transfer: on a CPU, under this from now on.
        patch: takes it all back.
        prompt: whether the compute stream does its work at once, as a model on a CPU does.
    """

    def __init__(self, seed: int, transfer: Transfer, patch: pytest.MonkeyPatch, *, prompt: bool = False) -> None:
        self.chance, self.streams = random.Random(seed), list[Stream]()
        self.compute: Stream = Prompt(self) if prompt else Stream(self)
        self.current = self.compute
        self.eager = list[Stream]()
        patch.setattr(transfer, "_cuda", True)
        patch.setattr(transfer, "_stream", None)
        patch.setattr(transfer, "_other", None)
        copy, pack, unpack, clear = torch.Tensor.copy_, Rows.pack, Rows.unpack, Rows.clear

        def copied(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            if not non_blocking:
                return copy(target, source)
            assert target.dtype == source.dtype and target.shape == source.shape
            self.current.do(lambda: void(copy(target, source)))
            return target

        def packed(
            rows: Rows, row: int, piece: Piece, out: torch.Tensor, extra: torch.Tensor | None = None, at: int = 0
        ) -> None:
            self.current.do(lambda: pack(rows, row, piece, out, extra, at))

        for name, made in {
            "Stream": lambda device: Stream(self),
            "Event": lambda: Event(self),
            "default_stream": lambda device: self.compute,
            "current_stream": lambda device: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "stream": self.stream,
            "synchronize": lambda device=None: self.drain(),
        }.items():
            patch.setattr(torch.cuda, name, made)
        patch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
        patch.setattr(torch.Tensor, "copy_", copied)
        patch.setattr(Rows, "pack", packed)
        patch.setattr(Rows, "unpack", lambda rows, *given: self.current.do(lambda: unpack(rows, *given)))
        patch.setattr(Rows, "clear", lambda rows, row: self.current.do(lambda: clear(rows, row)))

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def some_work(self) -> None:
        """One thing of some stream that need not wait; now and then another stream becomes the laziest."""
        if self.chance.random() < 0.1:
            self.chance.shuffle(self.eager)
        self.eager += [stream for stream in self.streams if stream not in self.eager]
        for stream in self.eager:
            if stream.queue and stream.queue[0]():
                del stream.queue[0]
                return
        raise AssertionError("every stream waits for another")

    def drain(self) -> None:
        """All of it."""
        while any(stream.queue for stream in self.streams):
            self.some_work()


def void(_: Any) -> None:
    """Nothing."""
