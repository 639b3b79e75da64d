"""Copies beside the engine's work: a stream of their own made current, events, parts of buffers, cheap for the host."""

from __future__ import annotations

import torch


class Current:
    """A copy stream is the current one inside; if something fails there, wait until nothing of it is under way.

    By hand: ``torch.cuda.stream(...)`` costs the host three times as much, a generator twice. One at a time, as the
    engine's lock has it.

    Args:
        stream: the copy stream.
        before: the current stream of its device.
    """

    __slots__ = ("_before", "_device", "_stream")

    def __init__(self, stream: torch.cuda.Stream, before: torch.cuda.Stream) -> None:
        self._stream, self._before = stream, before
        self._device: int = stream.device_index

    def __enter__(self) -> None:
        self._device = torch._C._cuda_getDevice()
        try:
            torch.cuda.set_stream(self._stream)
        except BaseException:  # an interrupt: whatever is enqueued next shall not go to the copy stream
            torch.cuda.set_stream(self._before)
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            # Nothing may write into memory that is then given to somebody else.
            torch.cuda.synchronize(self._stream.device_index)
        torch.cuda.set_stream(self._before)
        if self._device != self._stream.device_index:
            torch.cuda.set_device(self._device)


def mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """How far a stream has come."""
    event = torch.cuda.Event()
    event.record(stream)
    return event


def part(memory: torch.Tensor, start: int, nbytes: int) -> torch.Tensor:
    """Some bytes of a buffer; the buffer itself, if they are all."""
    return memory if nbytes == memory.numel() else memory.narrow(0, start, nbytes)
