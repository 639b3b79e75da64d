"""Attention of steps wider than one token on a GPU: the Triton side of ``djinn::attention``.

Flash attention (Dao, 2023) over the row's own prefix, read through ``rows``: a program takes a
block of queries of one head, counted from the step's first, and walks over the keys that they see.
Rows, positions and lengths stay on the device, so nothing waits for it, and a row's bits depend on
its own tokens, positions and keys. (Torch's SDPA would have to be told the lengths by the host, knows
neither softcap nor sinks, and reads hidden values.)

A hidden key has weight 0, but 0 times Inf is NaN. Where a result is not finite, its block walks
once more: over the finite values alone, while the others are counted for the queries that see them.

The weights meet bf16 and fp16 values in two halves, as in :mod:`djinn_fx.kernels.triton_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from djinn_fx.kernels.backend import jit, next_power_of_2, tl

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Tiles:
    """How a wide step is cut; a function of head sizes and dtype alone.

    Attributes:
        queries: query tokens of a program.
        keys: how many keys are looked at together.
        warps: warps of a program.
        stages: depth of the software pipeline over the keys.
    """

    queries: int
    keys: int
    warps: int
    stages: int


def tiles(depth: int, itemsize: int, shared: int) -> Tiles:
    """The cut that was fastest on an H200, or one that fits less shared memory.

    Args:
        depth: the larger of ``D`` and ``Dv``.
        itemsize: bytes of an element.
        shared: bytes of shared memory that a program may have: 227 KiB on Hopper, 99 on others.
    """
    if itemsize > 2:
        return Tiles(queries=32, keys=32 if depth <= 128 else 16, warps=4, stages=1)
    if depth <= 64:
        return Tiles(queries=64, keys=64, warps=4, stages=3)
    if shared < 220 * 1024:
        return Tiles(queries=64 if depth <= 128 else 32, keys=32, warps=4, stages=2)
    if depth <= 128:
        return Tiles(queries=128, keys=64, warps=8, stages=3)
    return Tiles(queries=64, keys=64, warps=4, stages=2)


def prefill(
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
    """See :class:`djinn_fx.kernels.signatures.Attention`; not for fp64.

    Positions at or beyond the arena's spare one, which would be an error of ours, are not read.
    ``cut`` replaces :func:`tiles`, for measurements.
    """
    batch, heads, query, depth = q.shape
    groups, room, value_depth = v_arena.shape[1], v_arena.shape[2] - 1, v_arena.shape[3]
    device = torch.cuda.get_device_properties(q.device) if q.is_cuda else None
    shared = getattr(device, "shared_memory_per_block_optin", 0)
    cut = cut or tiles(max(depth, value_depth), q.itemsize, shared)
    out = q.new_empty(batch, query, heads, value_depth)
    with torch.cuda.device_of(q):
        _prefill[-(-query // cut.queries), heads, batch](
            q, k_arena, v_arena, out, rows, positions, lengths, sinks if sinks is not None else q,
            rows.stride(0), positions.stride(0), lengths.stride(0), window or room, room, query,
            scale * (LOG2E if softcap is None else 1.0 / softcap),
            softcap * LOG2E if softcap is not None else 0.0,
            *q.stride(), *k_arena.stride(), *v_arena.stride(), heads // groups,
            WINDOWED=window is not None, CAPPED=softcap is not None, SINKS=sinks is not None,
            # The interpreter multiplies bf16 as integers.
            EXACT=q.dtype == torch.float32 or not q.is_cuda,
            D=depth, D_PAD=max(16, next_power_of_2(depth)),
            DV=value_depth, DV_PAD=max(16, next_power_of_2(value_depth)),
            QUERIES=cut.queries, KEYS=cut.keys, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
    return out


@jit(do_not_specialize=("rows_stride", "positions_stride", "lengths_stride", "window", "room", "width", "share"))
def _prefill(  # type: ignore[no-untyped-def]
    q, k, v, out, rows, positions, lengths, sinks,
    rows_stride, positions_stride, lengths_stride, window, room, width, scale, cap,
    q_batch, q_head, q_token, q_dim, k_row, k_head, k_key, k_dim, v_row, v_head, v_key, v_dim, share,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, EXACT: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head of one row; grid ``[blocks, H, B]``."""
    # The last blocks see the most keys: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = tl.load(positions + b * positions_stride).to(tl.int32)
    end = tl.minimum(tl.load(lengths + b * lengths_stride).to(tl.int32), room)
    token = block * QUERIES + tl.arange(0, QUERIES)
    place = first + token
    alive = (place < end) & (token < width)
    d, dv = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    out_at = out + ((b * width + token[:, None]) * tl.num_programs(1) + head) * DV + dv[None, :]
    inside = (token < width)[:, None] & (dv < DV)[None, :]
    # A key that the block's first query sees, and the one after the last that its last query sees.
    last = tl.minimum(tl.minimum(first + block * QUERIES + QUERIES, first + width), end)
    if first + block * QUERIES >= last:
        tl.store(out_at, tl.zeros((QUERIES, DV_PAD), out.dtype.element_ty), mask=inside)
        return
    begin = 0
    if WINDOWED:
        begin = tl.maximum(first + block * QUERIES - window + 1, 0)
    row = tl.load(rows + b * rows_stride).to(tl.int64)
    q_at = q + b * q_batch + head * q_head + token[:, None].to(tl.int64) * q_token + d[None, :] * q_dim
    query = tl.load(q_at, mask=alive[:, None] & (d < D)[None, :], other=0.0)
    if EXACT:
        query = query.to(tl.float32)
    k_at = k + row * k_row + head // share * k_head + d[:, None] * k_dim
    v_at = v + row * v_row + head // share * v_head + dv[None, :] * v_dim
    largest, total, mixed, up, down = _walk(
        query, k_at, v_at, k_key, v_key, place, begin, last, window, scale, cap,
        WINDOWED, CAPPED, EXACT, False, D, D_PAD, DV, DV_PAD, QUERIES, KEYS,
    )  # fmt: skip
    finite = tl.where(alive[:, None], tl.abs(mixed) < float("inf"), True)
    if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:
        largest, total, mixed, up, down = _walk(
            query, k_at, v_at, k_key, v_key, place, begin, last, window, scale, cap,
            WINDOWED, CAPPED, EXACT, True, D, D_PAD, DV, DV_PAD, QUERIES, KEYS,
        )  # fmt: skip
        mixed += tl.where(up > 0, float("inf"), 0.0) + tl.where(down > 0, float("-inf"), 0.0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        peak = tl.maximum(largest, sink)
        fade = tl.exp2(largest - peak)
        total = total * fade + tl.exp2(sink - peak)
        mixed *= fade[:, None]
    mixed = tl.where(alive[:, None], mixed / tl.where(alive, total, 1.0)[:, None], 0.0)
    tl.store(out_at, mixed.to(out.dtype.element_ty), mask=inside)


@jit
def _walk(  # type: ignore[no-untyped-def]
    query, k_at, v_at, k_key, v_key, place, begin, end, window, scale, cap,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr, CAREFUL: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Softmax and weighted sum over the keys ``[begin, end)``, not yet divided.

    Returns largest logit and sum of weights ``[n]``, weighted sum of values ``[n, Dv]``, and with
    ``CAREFUL`` how many values of +Inf or NaN, and of -Inf or NaN, each query sees; all fp32.
    """
    d, dv = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    largest = tl.full((QUERIES,), -1e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, DV_PAD), tl.float32)
    up, down = mixed, mixed
    for start in range(begin, end, KEYS):
        t = start + tl.arange(0, KEYS)
        live, far = t < end, t.to(tl.int64)
        keys = tl.load(k_at + far[None, :] * k_key, mask=live[None, :] & (d < D)[:, None], other=0.0)
        values = tl.load(v_at + far[:, None] * v_key, mask=live[:, None] & (dv < DV)[None, :], other=0.0)
        if EXACT:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        logits = tl.dot(query, keys, input_precision="ieee") * scale
        if CAPPED:
            fall = tl.exp2(-2.0 * 1.4426950408889634 * tl.abs(logits))
            logits = tl.where(logits < 0, -cap, cap) * ((1.0 - fall) / (1.0 + fall))
        seen = t[None, :] <= place[:, None]
        if WINDOWED:
            seen = seen & (t[None, :] > place[:, None] - window)
        logits = tl.where(seen, logits, float("-inf"))
        new = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - new[:, None])
        fade = tl.exp2(largest - new)
        total = total * fade + tl.sum(weights, 1)
        mixed *= fade[:, None]
        if CAREFUL:
            eyes = seen.to(tl.float16)
            up = tl.dot(eyes, ((values != values) | (values == float("inf"))).to(tl.float16), up)
            down = tl.dot(eyes, ((values != values) | (values == float("-inf"))).to(tl.float16), down)
            values = tl.where(tl.abs(values) < float("inf"), values, 0.0).to(values.dtype)
        if EXACT:
            mixed = tl.dot(weights, values, mixed, input_precision="ieee")
        else:
            rough = weights.to(values.dtype)
            mixed = tl.dot(rough, values, mixed)
            mixed = tl.dot((weights - rough.to(tl.float32)).to(values.dtype), values, mixed)
        largest = new
    return largest, total, mixed, up, down
