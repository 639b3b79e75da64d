"""The two ends of a decode step: lanes take what the host tells them; a step's token becomes the next one's input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from djinn_fx.kernels import triton_advance
from djinn_fx.kernels.backend import uses_triton
from djinn_fx.kernels.taking import take
from djinn_fx.kernels.triton_taking import Taken
from djinn_fx.kernels.words import words

#: Rows of a message to lanes: tokens, positions, arena rows, lengths, the step's number, and what is new of them.
INPUTS = 6

#: What is new for a lane: nothing, all but its token, all.
KEEP, OTHER, NEW = 0, 1, 2


class Beginning:
    """Lanes take what the host wrote for them; a kernel is looked up once, which costs more than to launch it."""

    def __init__(self) -> None:
        self._kernels: dict[object, Any] = {}

    def __call__(
        self,
        message: Tensor,
        ints: Tensor,
        count: int,
        raised: Tensor,
        flags: Tensor,
        anew: bool,
        taken: Taken | None = None,
    ) -> None:
        """Never waits for the device.

        Args:
            message: int64 ``[INPUTS, lanes]``, contiguous, on the CPU or pinned; its last row says what is new.
            ints: int64 ``[INPUTS - 1, lanes]``, contiguous, on the device.
            count: how many of the first lanes are looked at.
            raised: uint8 ``[bytes]``, a multiple of 16, on the CPU or pinned.
            flags: as ``raised``, on the device.
            anew: whether ``flags`` become ``raised``.
            taken: a value to take over, as :class:`djinn_fx.kernels.taking.Taking` does, and the place that becomes
                it: value, place, own, differs; the first three alike, contiguous, at multiples of 16 bytes and as long.
        """
        if ints.is_cuda and uses_triton():
            triton_advance.begin(message, ints, count, raised, flags, anew, taken, self._kernels)
            return
        if anew:
            flags.copy_(raised)
        if taken is not None:
            value, place, own, differs = taken
            take(value, place, own, differs)
            words(place).copy_(words(own))
        news = message[-1, :count].to(ints.device)
        said = message[:-1, :count].to(ints.device)
        mine = ints[:, :count]
        mine[0] = torch.where(news == NEW, said[0], mine[0])
        mine[1:] = torch.where(news != KEEP, said[1:], mine[1:])


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
