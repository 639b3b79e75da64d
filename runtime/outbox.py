"""The outbox: what a decode step is told by the host, on its way to the device.

Small messages cost the host more than the device: pinned memory made for each, a copy into it, a copy out of it. Here
NumPy writes them into pinned slots that are there from the start, one for each of the last :data:`SLOTS` steps, and one
launch a step brings over all of them; a slot is used again when the device is past its step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from djinn_fx.kernels.advance import INPUTS, KEEP, NEW, OTHER, Beginning, Message
from djinn_fx.kernels.triton_taking import Taken
from djinn_fx.runtime.steps import UNKNOWN

#: Steps whose tokens the host keeps at a time, and whose messages may be under way.
SLOTS = 16


class Outbox:
    """Messages of the last steps, and one letter, which a graph opens by itself when it runs.

    Args:
        ints: what lanes run, int64 ``[INPUTS - 1, lanes]`` on the device.
        flags: what acts on them, bool on the device, a multiple of 16.
    """

    def __init__(self, ints: torch.Tensor, flags: torch.Tensor) -> None:
        device = ints.device
        pinned, lanes, nbytes = device.type == "cuda", ints.shape[1], flags.numel()
        self._slots = [Message(lanes, nbytes, pinned) for _ in range(SLOTS)]
        self._letter, self._posted = Message(lanes, nbytes, pinned), 0  # the number of the step it was posted for
        self._passed = [torch.cuda.Event() for _ in range(SLOTS)] if pinned else None
        self._stream = torch.cuda.default_stream(device) if pinned else None  # whoever holds the engine's lock is on it
        self._beginning = Beginning(ints, flags.view(torch.uint8).view(-1))

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
        message = self._slots[self._free(number)]
        _write(message, rows, count, number, whole, flags)
        self._beginning(message, count, flags is not None, taken)

    def post(
        self,
        rows: Mapping[int, tuple[int, int, int, int]],
        count: int,
        number: int,
        *,
        flags: npt.NDArray[np.bool_] | None,
        taken: Taken,
    ) -> None:
        """:meth:`send`, not whole, to be opened by the graph that runs step ``number``: see :meth:`opening`."""
        self._free(self._posted)
        letter, self._posted = self._letter, number
        letter.withdraw()  # an interrupt: half a letter is for nobody
        _write(letter, rows, count, number, False, flags)
        letter.tell(flags is not None, taken, number)

    def opening(self, count: int, most: int) -> Callable[[], None] | None:
        """What a graph begins with to open the letter that is for it, if there is one; None where graphs cannot.

        Args:
            count: how many lanes its program has.
            most: bytes of the longest value that may be in it.
        """
        beginning = self._beginning
        return partial(beginning.read, self._letter, count, most) if beginning.reads_letters else None

    def passed(self, number: int) -> torch.cuda.Event | None:
        """An event that passes when step ``number``, enqueued just now, is done; None on the CPU, where it is."""
        if self._passed is None:
            return None
        event = self._passed[number % SLOTS]
        event.record(self._stream)  # to look up the current one takes longer
        return event

    def _free(self, number: int) -> int:
        """Where the messages of a step lie, once nobody reads what lay there."""
        slot = number % SLOTS
        if self._passed is not None and not self._passed[slot].query():
            self._passed[slot].synchronize()
        return slot


def _write(
    message: Message,
    rows: Mapping[int, tuple[int, int, int, int]],
    count: int,
    number: int,
    whole: bool,
    flags: npt.NDArray[np.bool_] | None,
) -> None:
    """Write down what lanes run: see :meth:`Outbox.send`."""
    numbers = message.numbers
    if not whole:
        numbers[INPUTS - 1, :count] = KEEP
    for lane, those in rows.items():
        numbers[:INPUTS, lane] = (*those, number, OTHER if those[0] == UNKNOWN else NEW)
    if flags is not None:
        message.flags[:] = flags.reshape(-1)
