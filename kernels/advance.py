"""The two ends of a decode step: lanes take what the host tells them; a step's token becomes the next one's input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from djinn_fx.kernels import triton_advance
from djinn_fx.kernels.backend import uses_triton
from djinn_fx.kernels.taking import take
from djinn_fx.kernels.triton_taking import Taken
from djinn_fx.kernels.words import words

#: Rows of a message about lanes: tokens, positions, arena rows, lengths, the step's number, and what is new of them.
INPUTS = 6

#: What is new for a lane: nothing, all but its token, all.
KEEP, OTHER, NEW = 0, 1, 2

#: No step has this number.
NO_STEP = -1


class Message:
    """What the host has to tell lanes, in memory of its own that the device can read.

    Attributes:
        rows: int64 ``[INPUTS + 1, lanes]`` on the host. Row ``INPUTS - 1`` says what is new for each lane; the last one
            is about the rest: where a value, its place, a copy of it and the answer whether it differs lie, its bytes,
            whether flags are new, and the step's number.
        raised: flags, uint8 ``[bytes]`` on the host.
        numbers: ``rows`` for NumPy.
        flags: ``raised`` for NumPy, bool.
        taken: what was told of a value, where no GPU reads it: there are no addresses to go by then.

    Args:
        lanes: how many, a multiple of 16.
        nbytes: of the flags, a multiple of 16.
        pinned: whether a GPU reads it.
    """

    def __init__(self, lanes: int, nbytes: int, pinned: bool) -> None:
        self.rows = torch.zeros(INPUTS + 1, lanes, dtype=torch.int64, pin_memory=pinned)
        self.raised = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned)
        self.numbers: npt.NDArray[np.int64] = self.rows.numpy()
        self.flags: npt.NDArray[np.bool_] = self.raised.view(torch.bool).numpy()
        self.taken: Taken | None = None
        self._pinned, self._rest = pinned, self.numbers[INPUTS]
        self.withdraw()

    @property
    def anew(self) -> bool:
        """Whether flags are new."""
        return bool(self._rest[5])

    @property
    def number(self) -> int:
        """The step that it is for."""
        return int(self._rest[6])

    def withdraw(self) -> None:
        """It is for no step."""
        self._rest[6] = NO_STEP

    def tell(self, anew: bool, taken: Taken | None, number: int = NO_STEP) -> None:
        """Write down what is not about lanes.

        Args:
            anew: see :class:`Beginning`.
            taken: see there.
            number: of the one step that it is for.
        """
        self.taken = None if self._pinned else taken
        if taken is None:
            self._rest[4:7] = 0, anew, number
        else:
            value, place, own, differs = taken
            where = value.data_ptr(), place.data_ptr(), own.data_ptr(), differs.data_ptr()
            self._rest[:7] = *where, value.nbytes, anew, number


class Beginning:
    """Lanes take what the host wrote for them; a kernel is looked up once, which costs more than to launch it.

    Args:
        ints: int64 ``[INPUTS - 1, lanes]``, contiguous, on the device.
        flags: uint8 ``[bytes]``, a multiple of 16, on the device.
    """

    def __init__(self, ints: Tensor, flags: Tensor) -> None:
        self._ints, self._flags = ints, flags
        self._parts = -(-flags.numel() // triton_advance.TILE)
        self._kernels: dict[object, Any] = {}

    @property
    def by_kernel(self) -> bool:
        """Whether Triton does it, in one launch."""
        return self._ints.is_cuda and uses_triton()

    @property
    def reads_letters(self) -> bool:
        """Whether :meth:`read` is possible here: the twin waits for the device, which no graph can."""
        return self.by_kernel or not self._ints.is_cuda

    def __call__(self, message: Message, count: int, anew: bool, taken: Taken | None = None) -> None:
        """Bring a message over, never waiting for the device.

        Args:
            message: what of it is about lanes must be written already.
            count: how many of the first lanes are looked at.
            anew: whether ``flags`` become what ``message`` raised.
            taken: a value to take over, as :class:`djinn_fx.kernels.taking.Taking` does, and the place that becomes
                it: value, place, own, differs; the first three alike, contiguous, at multiples of 16 bytes and as long.
        """
        if self.by_kernel:
            message.tell(anew, taken)
            tiles = 0 if taken is None else -(-taken[0].nbytes // triton_advance.TILE)
            self._launch(message, count, self._parts if anew else 0, tiles, False)
        else:
            self._twin(message, count, anew, taken)

    def _twin(self, message: Message, count: int, anew: bool, taken: Taken | None) -> None:
        flags, ints = self._flags, self._ints
        if anew:
            flags.copy_(message.raised)
        if taken is not None:
            value, place, own, differs = taken
            take(value, place, own, differs)
            words(place).copy_(words(own))
        news = message.rows[INPUTS - 1, :count].to(ints.device)
        said = message.rows[: INPUTS - 1, :count].to(ints.device)
        mine = ints[:, :count]
        mine[0] = torch.where(news == NEW, said[0], mine[0])
        mine[1:] = torch.where(news != KEEP, said[1:], mine[1:])

    def read(self, letter: Message, count: int, most: int) -> None:
        """Bring over what will be in a message by then, if it is for the step that comes; to be captured in a graph.

        A step's number is the last of ``ints`` of the first lane. Only where :attr:`reads_letters`.

        Args:
            letter: told of a number; else nothing happens.
            count: how many of the first lanes are looked at.
            most: bytes of the longest value.
        """
        if self.by_kernel:
            self._launch(letter, count, self._parts, -(-most // triton_advance.TILE), True)
        elif letter.number == self._ints[-1, 0]:
            self._twin(letter, count, letter.anew, letter.taken)

    def _launch(self, message: Message, count: int, parts: int, tiles: int, letter: bool) -> None:
        triton_advance.begin(
            message.rows, self._ints, count, message.raised, self._flags, parts, tiles, letter, self._kernels
        )


def greedy(logits: Tensor) -> Tensor:
    """The first maximum of each row ``[B, V]`` among what is not NaN; 0 where all are NaN: int64 ``[B]``."""
    peak = logits.masked_fill(logits.isnan(), -math.inf).amax(-1, keepdim=True)
    # The first of equals is what argmax gives, and a NaN equals nothing.
    return (logits == peak).view(torch.uint8).argmax(-1)


def advance(logits: Tensor, tokens: Tensor, positions: Tensor, lengths: Tensor, slot: Tensor, ring: Tensor) -> None:
    """Make a step's inputs those of the next step, in place, and write the tokens down where the host reads them.

    Args:
        logits: ``[B, V]``, any floating-point dtype.
        tokens: int64 ``[B]``; becomes :func:`greedy` of the logits.
        positions: int64 ``[B]``; one more where the row is live.
        lengths: int64 ``[B]``, 0 for a dead row, which stays dead; else one more.
        slot: int64 ``[1]``, number of this step; becomes that of the next.
        ring: int64 ``[slots, B or more]``, on the CPU or pinned; row ``slot % slots`` takes the tokens.
    """
    if logits.is_cuda and uses_triton():
        triton_advance.advance(logits, tokens, positions, lengths, slot, ring)
        return
    live = lengths > 0
    tokens.copy_(greedy(logits))
    positions.add_(live)
    lengths.add_(live)
    ring.index_copy_(0, (slot % ring.shape[0]).to(ring.device), _widened(tokens, ring)[None].to(ring.device))
    slot.add_(1)


def _widened(tokens: Tensor, ring: Tensor) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, ring.shape[1] - tokens.shape[0]))
