"""Attention over the arena on a GPU: the Triton side of ``djinn::attention``, one token per row.

Decode is flash decoding (Dao, Haziza, Massa, Sizov, 2023): the keys that a row sees are cut into at
most ``splits`` runs, each run is reduced by a program of its own, and a second kernel merges the
runs. It is launched before the first has ended (programmatic dependent launch, Hopper on), which on
an H200 takes 1.1 us off a call. Merging in the run that ends last, found by an atomic counter, was
slower there: 6.5 against 5.5 us for one row of GPT-2, 30 against 22 for 32 rows.

Where a row's keys are cut depends on how many it sees and on the sizes of heads. All sums are
matrix products or have one fixed layout, so bits depend on the row alone: not on the batch, the
arena, its alignment, or on what unread positions hold. Nothing waits for the device.

Products of bf16 and fp16 are exact in fp32. The weights, which are fp32, meet such values as two
halves, a rounded one and the rest, so that the whole is as good as fp32 and is rounded once. (Of an
infinite value the two may make NaN.)

Wider steps go to :mod:`djinn_fx.kernels.triton_prefill`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from djinn_fx.kernels import attention as twin
from djinn_fx.kernels import triton_prefill
from djinn_fx.kernels.backend import jit, next_power_of_2, tl

#: Rows of a matrix instruction: query heads of a group are padded to as many.
LEAST_HEADS = 16

#: Factor from natural to binary exponents.
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Tiles:
    """How decode is cut; a function of head sizes and dtype alone.

    Attributes:
        splits: into how many runs the keys of a row are cut at most; a power of two.
        run: runs are multiples of so many keys; a multiple of ``keys``.
        keys: how many keys are looked at together.
        warps: warps of a program.
        stages: depth of the software pipeline over a run.
    """

    splits: int
    run: int
    keys: int
    warps: int
    stages: int


def attention(
    q: Tensor,
    k_arena: Tensor,
    v_arena: Tensor,
    rows: Tensor,
    positions: Tensor,
    lengths: Tensor,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    scale: float,
) -> Tensor:
    """See :class:`djinn_fx.kernels.signatures.Attention`; fp64 is left to the torch twin."""
    args = (q, k_arena, v_arena, rows, positions, lengths, window, softcap, sinks, scale)
    if q.dtype == torch.float64:
        return twin.attention(*args)
    return decode(*args) if q.shape[2] == 1 else triton_prefill.prefill(*args)


def tiles(groups: int, depth: int, itemsize: int) -> Tiles:
    """The cut that was fastest on an H200 (``benchmarks/kernels_speed.py``).

    Args:
        groups: key-value heads. More of them need fewer runs to fill a GPU with one row.
        depth: the larger of ``D`` and ``Dv``.
        itemsize: bytes of an element.
    """
    splits = 16 if groups <= 8 else 8
    if itemsize > 2:
        return Tiles(splits, run=64, keys=16 if depth > 64 else 32, warps=4, stages=2)
    if depth <= 64:
        return Tiles(splits, run=64, keys=64, warps=2, stages=3)
    if depth <= 128:
        return Tiles(splits, run=128, keys=64, warps=4, stages=3)
    return Tiles(splits, run=64, keys=32, warps=4, stages=3)


def decode(
    q: Tensor,
    k_arena: Tensor,
    v_arena: Tensor,
    rows: Tensor,
    positions: Tensor,
    lengths: Tensor,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    scale: float,
    cut: Tiles | None = None,
) -> Tensor:
    """Attention of one query token per row, ``T == 1``; not for fp64.

    A position at or beyond the arena's spare one, which would be an error of ours, is not read.

    Args:
        q: ``[B, H, 1, D]`` in fp32, bf16 or fp16; the rest as in
            :class:`djinn_fx.kernels.signatures.Attention`.
        k_arena: likewise.
        v_arena: likewise.
        rows: likewise.
        positions: likewise.
        lengths: likewise.
        window: likewise.
        softcap: likewise.
        sinks: likewise.
        scale: likewise.
        cut: instead of :func:`tiles`, for measurements.

    Returns:
        ``[B, 1, H, Dv]``.
    """
    batch, heads, _, depth = q.shape
    groups, room, value_depth = v_arena.shape[1], v_arena.shape[2] - 1, v_arena.shape[3]
    cut = cut or tiles(groups, max(depth, value_depth), q.itemsize)
    out = q.new_empty(batch, 1, heads, value_depth)
    stats = q.new_empty(batch, heads, 2, cut.splits, dtype=torch.float32)
    parts = q.new_empty(batch, heads, cut.splits, value_depth, dtype=torch.float32)
    # The interpreter multiplies bf16 as integers.
    exact = q.dtype == torch.float32 or not q.is_cuda
    sink = sinks if sinks is not None else stats
    early = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] >= 9
    span = (positions, lengths, positions.stride(0), lengths.stride(0), window or room, room)
    sizes = {"RUN": cut.run, "SPLITS": cut.splits, "DV": value_depth, "DV_PAD": next_power_of_2(value_depth)}
    with torch.cuda.device_of(q):
        _decode_runs[groups, batch, cut.splits](
            q, k_arena, v_arena, rows, rows.stride(0), *span, stats, parts,
            scale * (LOG2E if softcap is None else 1.0 / softcap),
            softcap * LOG2E if softcap is not None else 0.0,
            q.stride(0), q.stride(1), q.stride(3), *k_arena.stride(), *v_arena.stride(),
            CAPPED=softcap is not None, EXACT=exact, EARLY=early,
            SHARE=heads // groups, SHARE_PAD=max(LEAST_HEADS, next_power_of_2(heads // groups)),
            D=depth, D_PAD=max(16, next_power_of_2(depth)), KEYS=cut.keys, **sizes,
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
        _decode_merge[heads, batch](
            *span, stats, parts, out, sink, heads,
            SINKS=sinks is not None, EARLY=early, **sizes, num_warps=2, launch_pdl=early,
        )  # fmt: skip
    return out


@jit(do_not_specialize=("rows_stride", "positions_stride", "lengths_stride", "window", "room"))
def _decode_runs(  # type: ignore[no-untyped-def]
    q, k, v, rows, rows_stride,
    positions, lengths, positions_stride, lengths_stride, window, room,
    stats, parts, scale, cap,
    q_batch, q_head, q_dim, k_row, k_head, k_key, k_dim, v_row, v_head, v_key, v_dim,
    CAPPED: tl.constexpr, EXACT: tl.constexpr, EARLY: tl.constexpr,
    SHARE: tl.constexpr, SHARE_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    KEYS: tl.constexpr, RUN: tl.constexpr, SPLITS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """One run of one row's keys, for the query heads of one key-value head.

    Grid ``[Hkv, B, splits]``: the runs that short rows do not have come last. Writes the run's
    largest logit and sum of weights to ``stats`` ``[B, H, 2, splits]`` and its weighted sum of values
    to ``parts`` ``[B, H, splits, Dv]``, all fp32; logits are binary exponents. A run without keys
    writes nothing.
    """
    group, b, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    # What does not wait for the row's length is loaded with it.
    here, length = tl.load(positions + b * positions_stride), tl.load(lengths + b * lengths_stride)
    row = tl.load(rows + b * rows_stride).to(tl.int64)
    share, key = tl.arange(0, SHARE_PAD), tl.arange(0, KEYS)
    d, dv = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    head = group * SHARE + share
    q_at = q + b * q_batch + head[:, None].to(tl.int64) * q_head + d[None, :] * q_dim
    query = tl.load(q_at, mask=(share < SHARE)[:, None] & (d < D)[None, :], other=0.0)
    if EXACT:
        query = query.to(tl.float32)
    end = tl.where(here < length, tl.minimum(here + 1, room), 0)
    begin = tl.maximum(end - window, 0)
    run = tl.cdiv(tl.cdiv(end - begin, SPLITS), RUN) * RUN
    begin += split * run
    end = tl.minimum(begin + run, end)
    if begin >= end:
        return
    k_base = k + row * k_row + group.to(tl.int64) * k_head
    v_base = v + row * v_row + group.to(tl.int64) * v_head
    largest = tl.full((SHARE_PAD,), -1e30, tl.float32)
    total = tl.zeros((SHARE_PAD,), tl.float32)
    mixed = tl.zeros((SHARE_PAD, DV_PAD), tl.float32)
    for start in range(begin, end, KEYS):
        t = (start + key).to(tl.int64)
        live = t < end
        keys = tl.load(
            k_base + t[None, :] * k_key + d[:, None] * k_dim,
            mask=live[None, :] & (d < D)[:, None],
            other=0.0,
            eviction_policy="evict_first",  # read once a step: the cache is for what is read more often
        )
        values = tl.load(
            v_base + t[:, None] * v_key + dv[None, :] * v_dim,
            mask=live[:, None] & (dv < DV)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        if EXACT:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        logits = tl.dot(query, keys, input_precision="ieee") * scale
        if CAPPED:
            fall = tl.exp2(-2.0 * 1.4426950408889634 * tl.abs(logits))
            logits = tl.where(logits < 0, -cap, cap) * ((1.0 - fall) / (1.0 + fall))
        logits = tl.where(live[None, :], logits, float("-inf"))
        new = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - new[:, None])
        fade = tl.exp2(largest - new)
        total = total * fade + tl.sum(weights, 1)
        mixed *= fade[:, None]
        if EXACT:
            mixed = tl.dot(weights, values, mixed, input_precision="ieee")
        else:
            rough = weights.to(values.dtype)
            mixed = tl.dot(rough, values, mixed)
            mixed = tl.dot((weights - rough.to(tl.float32)).to(values.dtype), values, mixed)
        largest = new
    one = b * tl.num_programs(0) * SHARE + head
    at = stats + one * 2 * SPLITS + split
    tl.store(at, largest, mask=share < SHARE)
    tl.store(at + SPLITS, total, mask=share < SHARE)
    at = parts + (one * SPLITS + split)[:, None] * DV + dv[None, :]
    tl.store(at, mixed, mask=(share < SHARE)[:, None] & (dv < DV)[None, :])


@jit(do_not_specialize=("positions_stride", "lengths_stride", "window", "room", "heads"))
def _decode_merge(  # type: ignore[no-untyped-def]
    positions, lengths, positions_stride, lengths_stride, window, room,
    stats, parts, out, sinks, heads,
    SINKS: tl.constexpr, EARLY: tl.constexpr,
    RUN: tl.constexpr, SPLITS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """Merge the runs of one head of one row into ``out`` ``[B, 1, H, Dv]``; grid ``[H, B]``."""
    head, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    split, dv = tl.arange(0, SPLITS), tl.arange(0, DV_PAD)
    here, length = tl.load(positions + b * positions_stride), tl.load(lengths + b * lengths_stride)
    end = tl.where(here < length, tl.minimum(here + 1, room), 0)
    begin = tl.maximum(end - window, 0)
    run = tl.maximum(tl.cdiv(tl.cdiv(end - begin, SPLITS), RUN) * RUN, 1)
    live = begin + split * run < end
    one = b * heads + head
    at = stats + one * 2 * SPLITS + split
    part_at = parts + (one * SPLITS + split)[:, None] * DV + dv[None, :]
    if EARLY:
        tl.extra.cuda.gdc_wait()
    largest = tl.load(at, mask=live, other=-1e30)
    total = tl.load(at + SPLITS, mask=live, other=0.0)
    mixed = tl.load(part_at, mask=live[:, None] & (dv < DV)[None, :], other=0.0)
    peak = tl.max(largest, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        peak = tl.maximum(peak, sink)
    fade = tl.where(live, tl.exp2(largest - peak), 0.0)
    total = tl.sum(total * fade, 0)
    if SINKS:
        total += tl.exp2(sink - peak)
    # A dead row has no runs, and its total is 0.
    mixed = tl.sum(mixed * fade[:, None], 0) / tl.where(end > begin, total, 1.0)
    tl.store(out + one * DV + dv, mixed.to(out.dtype.element_ty), mask=dv < DV)
