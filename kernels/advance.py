"""The end of a decode step: each row's most likely token becomes its next input, one position on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from djinn_fx.kernels import triton_advance
from djinn_fx.kernels.backend import uses_triton


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
