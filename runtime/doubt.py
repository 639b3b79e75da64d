"""Doubts: whether a value that the user may have changed was changed at all, answered by the device.

A value with the same bits is no edit. To look first costs a wait for the device; here the step is launched with the
value in it, and by the time it is launched the answer is there. Where it turns out that nothing was changed, the step
that ran is, bit for bit, the one that ran before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from djinn_fx.kernels.taking import Taking
from djinn_fx.runtime.bits import same_bits


class _Slot:
    """Where the device writes its answer, and what passes when it has."""

    def __init__(self, device: torch.device) -> None:
        self.word = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self.told = self.word.numpy()
        self.passed = torch.cuda.Event()
        self.stream = torch.cuda.default_stream(device)  # whoever holds the engine's lock is on it


class Doubt:
    """One value, taken over.

    Attributes:
        own: a copy of the value that nobody else writes; the value itself where it is known to be no edit.
        known: whether it differs from what was there; None as long as nobody asked the device.
    """

    def __init__(self, own: torch.Tensor, known: bool | None, ask: Callable[[], bool] | None = None) -> None:
        self.own, self.known, self._ask = own, known, ask

    def holds(self) -> bool:
        """Whether the value differs; waits until the device has compared it."""
        if self.known is None:
            assert self._ask is not None
            self.known = self._ask()
        return self.known


class Doubts:
    """The open questions of one engine; the caller holds its lock.

    Args:
        device: the model's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._taking = device, Taking()
        self._free: list[_Slot] = []

    def raised(self, value: torch.Tensor, before: torch.Tensor) -> Doubt:
        """Take a value over and begin to compare it; on CUDA nothing waits.

        Args:
            value: what stands there now.
            before: what the step had left there, of the same shape and dtype.
        """
        if self._device.type != "cuda":
            known = not same_bits(value, before)
            return Doubt(value.clone() if known else value, known)
        slot = self._free.pop() if self._free else _Slot(self._device)
        slot.told[0] = 0
        own = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        self._taking(value, before, own, slot.word)
        slot.passed.record(slot.stream)
        return Doubt(own, None, partial(self._answer, slot))

    def _answer(self, slot: _Slot) -> bool:
        slot.passed.synchronize()
        differs = bool(slot.told[0])
        self._free.append(slot)
        return differs
