"""The two ends of a decode step on a GPU.

The end takes two launches: maxima of runs of the vocabulary, then the first of the largest.

Ties go to the smallest token, and a NaN is below everything, as in :func:`djinn_fx.kernels.advance.greedy`. A maximum
does not depend on the order in which it is sought, so neither does the token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from djinn_fx.kernels.backend import jit, next_power_of_2, stream_of, tl
from djinn_fx.kernels.triton_taking import taken_words

#: Logits that a program looks at.
RUN = 2048

#: Bytes of flags, or of a value, that a program brings over.
TILE = 2048


def advance(logits: Tensor, tokens: Tensor, positions: Tensor, lengths: Tensor, slot: Tensor, ring: Tensor) -> None:
    """See :func:`djinn_fx.kernels.advance.advance`; never waits. A pinned ring is written over the bus."""
    batch, vocab = logits.shape
    runs = -(-vocab // RUN)
    peaks = logits.new_empty(batch, runs, dtype=torch.float32 if logits.itemsize <= 4 else logits.dtype)
    firsts = logits.new_empty(batch, runs, dtype=torch.int32)
    with torch.cuda.device_of(logits):
        _peaks[runs, batch](
            logits, logits.stride(0), logits.stride(1), vocab, peaks, firsts, runs, slot, RUN=RUN, num_warps=4
        )
        _choose[(batch,)](
            peaks, firsts, runs, tokens, positions, lengths, slot, ring, ring.shape[0], ring.stride(0),
            RUNS=max(2, next_power_of_2(runs)), num_warps=2,
        )  # fmt: skip


def begin(
    message: Tensor,
    ints: Tensor,
    count: int,
    raised: Tensor,
    flags: Tensor,
    parts: int,
    tiles: int,
    letter: bool,
    kernels: dict[object, Any],
) -> None:
    """See :class:`djinn_fx.kernels.advance.Beginning`; what is pinned is read over the bus.

    Args:
        message: see :class:`djinn_fx.kernels.advance.Message`.
        ints: see there.
        count: see there.
        raised: see there.
        flags: see there.
        parts: how many programs bring over flags.
        tiles: how many bring over the value.
        letter: whether it is for one step alone.
        kernels: those found so far for these buffers; a new one is added.
    """
    lanes, grid, kernel = message.shape[1], (1 + parts + tiles, 1, 1), kernels.get(letter)
    numbers = lanes, next_power_of_2(lanes), TILE, letter
    if kernel is None:
        with torch.cuda.device_of(ints):
            kernels[letter] = _begin[grid](
                message, ints, count, raised, flags, flags.numel(), parts, *numbers, num_warps=2
            )
    else:
        # Addresses: a tensor would be asked for its own, and the driver whether it is one, at several times the cost.
        places = message.data_ptr(), ints.data_ptr(), count, raised.data_ptr(), flags.data_ptr()
        kernel[grid](*places, flags.numel(), parts, *numbers, stream=stream_of(ints))


@jit(do_not_specialize=("count", "nbytes", "parts"))
def _begin(  # type: ignore[no-untyped-def]
    message, ints, count, raised, flags, nbytes, parts,
    LANES: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, LETTER: tl.constexpr,
):  # fmt: skip
    """What is new for each lane in the first program, some of the flags in each of the next, then some of the value."""
    # All that a program reads over the bus is asked for at once: each way takes as long as the rest of it.
    part, rest, bound = tl.program_id(0), message + 6 * LANES, count
    if LETTER:
        bound = tl.where(tl.load(rest + 6) == tl.load(ints + 4 * LANES), count, 0)
    if part == 0:
        lane = tl.arange(0, BLOCK)
        inside = lane < count
        news = tl.load(message + 5 * LANES + lane, mask=inside, other=0)
        for row in tl.static_range(0, 5):
            said = tl.load(message + row * LANES + lane, mask=inside)
            tl.store(ints + row * LANES + lane, said, mask=(news > (1 if row == 0 else 0)) & (lane < bound))
    elif part <= parts:
        word = (part - 1) * (TILE // 4) + tl.arange(0, TILE // 4)
        within = word < nbytes // 16 * 4
        there = tl.multiple_of(raised.to(tl.pointer_type(tl.int32)), 16) + word
        here = tl.multiple_of(flags.to(tl.pointer_type(tl.int32)), 16) + word
        anew = (tl.load(rest + 5) != 0) & (bound > 0)
        tl.store(here, tl.load(there, mask=within), mask=within & anew)
    else:
        value = tl.load(rest).to(tl.pointer_type(tl.int32))
        place = tl.load(rest + 1).to(tl.pointer_type(tl.int32))
        own = tl.load(rest + 2).to(tl.pointer_type(tl.int32))
        differs = tl.load(rest + 3).to(tl.pointer_type(tl.int32))
        size = tl.where(bound > 0, tl.load(rest + 4), 0)
        new, at, inside, differ = taken_words(value, place, own, size, part - parts - 1, TILE)
        tl.store(tl.multiple_of(place, 16) + at, new, mask=inside)
        if differ != 0:
            tl.store(differs, 1)


@jit
def _peaks(  # type: ignore[no-untyped-def]
    logits, row_stride, stride, vocab, peaks, firsts, runs, slot, RUN: tl.constexpr
):
    """Largest logit of one run of one row and where it stands first; grid ``[runs, B]``."""
    run, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if run + b == 0:
        tl.store(slot, tl.load(slot) + 1)  # here, where nobody else reads it
    at = run * RUN + tl.arange(0, RUN)
    inside = at < vocab
    wide = peaks.dtype.element_ty
    value = tl.load(logits + b * row_stride + at * stride, mask=inside, other=float("-inf")).to(wide)
    value = tl.where(value == value, value, float("-inf"))
    peak = tl.max(value, 0)
    # Where all is -Inf, the first one that really is: a NaN does not count.
    raw = tl.load(logits + b * row_stride + at * stride, mask=inside, other=float("nan")).to(wide)
    first = tl.min(tl.where(raw == peak, at, 2147483647), 0)
    tl.store(peaks + b * runs + run, peak)
    tl.store(firsts + b * runs + run, first)


@jit
def _choose(  # type: ignore[no-untyped-def]
    peaks, firsts, runs, tokens, positions, lengths, slot, ring, slots, ring_stride, RUNS: tl.constexpr
):
    """The first of the largest, and one step on; grid ``[B]``."""
    b = tl.program_id(0)
    run = tl.arange(0, RUNS)
    inside = run < runs
    peak = tl.load(peaks + b * runs + run, mask=inside, other=float("-inf"))
    first = tl.load(firsts + b * runs + run, mask=inside, other=2147483647)
    token = tl.min(tl.where(peak == tl.max(peak, 0), first, 2147483647), 0)
    token = tl.where(token == 2147483647, 0, token)
    live = (tl.load(lengths + b) > 0).to(tl.int64)
    tl.store(tokens + b, token.to(tl.int64))
    here = (tl.load(slot) - 1) % slots
    tl.store(ring + here * ring_stride + b, token.to(tl.int64))
    tl.store(positions + b, tl.load(positions + b) + live)
    tl.store(lengths + b, tl.load(lengths + b) + live)
