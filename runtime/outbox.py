"""The outbox: what a decode step is told by the host, on its way to the device.

Small messages cost the host more than the device: pinned memory made for each, a copy into it, a copy out of it. Here
NumPy writes them into pinned slots that are there from the start, one for each of the last :data:`SLOTS` steps, and one
launch a step brings over all of them; a slot is used again when the device is past its step.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from djinn_fx.kernels.advance import INPUTS, KEEP, NEW, OTHER, Beginning
from djinn_fx.kernels.triton_taking import Taken
from djinn_fx.runtime.steps import UNKNOWN

#: Steps whose tokens the host keeps at a time, and whose messages may be under way.
SLOTS = 16


class Outbox:
    """Messages of the last steps.

    Args:
        ints: what lanes run, int64 ``[INPUTS - 1, lanes]`` on the device.
        flags: what acts on them, bool on the device, a multiple of 16.
    """

    def __init__(self, ints: torch.Tensor, flags: torch.Tensor) -> None:
        device = ints.device
        pinned = device.type == "cuda"
        inputs = torch.zeros(SLOTS, INPUTS, ints.shape[1], dtype=torch.int64, pin_memory=pinned)
        raised = torch.zeros(SLOTS, flags.numel(), dtype=torch.uint8, pin_memory=pinned)
        self._slots = list(zip(inputs, raised, strict=True))
        self._written, self._raised = inputs.numpy(), raised.view(torch.bool).view(SLOTS, *flags.shape).numpy()
        self._ints, self._flags = ints, flags.view(torch.uint8).view(-1)
        self._passed = [torch.cuda.Event() for _ in range(SLOTS)] if pinned else None
        self._stream = torch.cuda.default_stream(device) if pinned else None  # whoever holds the engine's lock is on it
        self._beginning = Beginning()

    def send(
        self,
        rows: Mapping[int, tuple[int, int, int, int]],
        count: int,
        number: int,
        *,
        whole: bool,
        flags: npt.NDArray[np.bool_] | None = None,
        taken: Taken | None = None,
    ) -> None:
        """Send what lanes run in step ``number``, and what acts on them.

        Args:
            rows: token, position, arena row and length by lane. A token that is :data:`UNKNOWN` stays what it is on
                the device: the last step left it there.
            count: how many lanes the step's program has.
            number: the step's number.
            whole: whether ``rows`` are all ``count`` lanes; else the others go on from what the last step left.
            flags: as they are now; None where none has changed.
            taken: a value that goes to its place; see :class:`djinn_fx.kernels.advance.Beginning`.
        """
        slot = self._slot(number)
        message = self._written[slot]
        if not whole:
            message[-1, :count] = KEEP
        for lane, numbers in rows.items():
            message[:, lane] = (*numbers, number, OTHER if numbers[0] == UNKNOWN else NEW)
        if flags is not None:
            self._raised[slot] = flags
        inputs, raised = self._slots[slot]
        self._beginning(inputs, self._ints, count, raised, self._flags, flags is not None, taken)

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
