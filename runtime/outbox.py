"""The outbox: what a decode step is told by the host, on its way to the device.

Small messages cost the host more than the device: pinned memory made for each, a copy into it, a copy out of it. Here
NumPy writes them into pinned slots that are there from the start, one for each of the last :data:`SLOTS` steps; a slot
is used again when the device is past its step.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from djinn_fx.kernels.advance import INPUTS, KEEP, NEW, OTHER, Beginning
from djinn_fx.runtime.steps import UNKNOWN

#: Steps whose tokens the host keeps at a time, and whose messages may be under way.
SLOTS = 16


class Outbox:
    """Messages of the last steps.

    Args:
        lanes: how many the buffers have.
        flags: shape of the flags.
        device: where they go.
    """

    def __init__(self, lanes: int, flags: tuple[int, ...], device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._inputs = torch.zeros(SLOTS, INPUTS, lanes, dtype=torch.int64, pin_memory=pinned)
        self._flags = torch.zeros(SLOTS, *flags, dtype=torch.bool, pin_memory=pinned)
        self._written, self._raised = self._inputs.numpy(), self._flags.numpy()
        self._passed = [torch.cuda.Event() for _ in range(SLOTS)] if pinned else None
        self._stream = torch.cuda.default_stream(device) if pinned else None  # whoever holds the engine's lock is on it
        self._beginning = Beginning()

    def send_flags(self, flags: npt.NDArray[np.bool_], target: torch.Tensor, number: int) -> None:
        """Send the flags of step ``number``, as they are now."""
        slot = self._slot(number)
        self._raised[slot] = flags
        target.copy_(self._flags[slot], non_blocking=True)

    def send_inputs(
        self, rows: Mapping[int, tuple[int, int, int, int]], ints: torch.Tensor, count: int, number: int, *, whole: bool
    ) -> None:
        """Send what lanes run in step ``number``.

        Args:
            rows: token, position, arena row and length by lane. A token that is :data:`UNKNOWN` stays what it is on
                the device: the last step left it there.
            ints: as in :class:`djinn_fx.runtime.lanes.Lanes`.
            count: how many lanes the step's program has.
            number: the step's number.
            whole: whether ``rows`` are all ``count`` lanes; else the others go on from what the last step left.
        """
        slot = self._slot(number)
        message = self._written[slot]
        if not whole:
            message[-1, :count] = KEEP
        for lane, numbers in rows.items():
            message[:, lane] = (*numbers, number, OTHER if numbers[0] == UNKNOWN else NEW)
        self._beginning(self._inputs[slot], ints, count)

    def passed(self, number: int) -> torch.cuda.Event | None:
        """An event that passes when step ``number``, enqueued just now, is done; None on the CPU, where it is."""
        if self._passed is None:
            return None
        event = self._passed[number % SLOTS]
        event.record(self._stream)  # to look up the current one takes longer
        return event

    def _slot(self, number: int) -> int:
        """Where the messages of a step lie, once nobody reads what lay there."""
        slot = number % SLOTS
        if self._passed is not None and not self._passed[slot].query():
            self._passed[slot].synchronize()
        return slot
