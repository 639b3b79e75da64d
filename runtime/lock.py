"""The engine's lock, which is also the way onto the engine's stream."""

from __future__ import annotations

import threading
from types import TracebackType

import torch


class EngineLock:
    """A re-entrant lock; while it is held, the model's device is the current one, and so is its default stream.

    Calls may come from any thread, with any GPU current and under any stream: kernels of Triton go to whichever is
    current. The engine's work waits for what the caller enqueued before, and what the caller enqueues afterwards waits
    for the engine's: nobody has to synchronise by hand.

    Args:
        device: the model's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._lock = threading.RLock()
        self._device = device
        self._depth = 0
        self._caller: torch.cuda.Stream | None = None
        self._before: int | None = None  # the caller's device, where it is another
        self._index = device.index
        if device.type == "cuda" and device.index is None:
            self._index = torch.cuda.current_device()

    def __enter__(self) -> EngineLock:
        self._lock.acquire()
        self._depth += 1
        try:
            if self._depth == 1 and self._device.type == "cuda":
                self._come()
        except BaseException:  # an interrupt must not leave it locked for ever
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._depth == 1 and self._caller is not None:
                self._leave(self._caller)
        finally:
            if self._depth == 1 and self._before is not None:
                torch.cuda.set_device(self._before)
                self._before = None
            self._depth -= 1
            self._lock.release()

    def _come(self) -> None:
        current = torch._C._cuda_getDevice()
        if current != self._index:
            self._before = current
            torch.cuda.set_device(self._index)
        # The default stream is number 0. Stream objects would cost a step more than all else that is done here.
        if torch._C._cuda_getCurrentRawStream(self._index) == 0:
            return
        own, caller = torch.cuda.default_stream(self._device), torch.cuda.current_stream(self._device)
        own.wait_stream(caller)
        self._caller = caller
        torch.cuda.set_stream(own)

    def _leave(self, caller: torch.cuda.Stream) -> None:
        self._caller = None
        caller.wait_stream(torch.cuda.default_stream(self._device))
        torch.cuda.set_stream(caller)
