"""Writing a step's keys and values into the arena on a GPU: the Triton side of ``djinn::kv_write``."""

from __future__ import annotations

import torch
from torch import Tensor

from djinn_fx.kernels.backend import jit, next_power_of_2, tl

#: Elements of keys that a program moves at most, and of values.
BLOCK = 2048


def kv_write(
    k_arena: Tensor,
    v_arena: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    positions: Tensor,
    lengths: Tensor,
) -> None:
    """See :class:`djinn_fx.kernels.signatures.KvWrite`; one launch, which never waits.

    Pads write nothing, nor does a position at or beyond the spare one, an error of ours.
    """
    batch, groups, width, depth = k.shape
    value_depth = v.shape[3]
    depths = next_power_of_2(depth), next_power_of_2(value_depth)
    heads = max(1, min(next_power_of_2(groups), BLOCK // max(depths)))
    with torch.cuda.device_of(k):
        _kv_write[batch * width, -(-groups // heads)](
            k_arena, v_arena, k, v, rows, positions, lengths,
            rows.stride(0), positions.stride(0), lengths.stride(0), width, groups, k_arena.shape[2] - 1,
            *k_arena.stride(), *v_arena.stride(), *k.stride(), *v.stride(),
            HEADS=heads, D=depth, D_PAD=depths[0], DV=value_depth, DV_PAD=depths[1], num_warps=4,
        )  # fmt: skip


@jit(do_not_specialize=("rows_stride", "positions_stride", "lengths_stride", "groups", "room"))
def _kv_write(  # type: ignore[no-untyped-def]
    k_arena, v_arena, k, v, rows, positions, lengths,
    rows_stride, positions_stride, lengths_stride, width, groups, room,
    ka_row, ka_head, ka_key, ka_dim, va_row, va_head, va_key, va_dim,
    k_batch, k_head, k_token, k_dim, v_batch, v_head, v_token, v_dim,
    HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """One token's keys and values of some heads; grid ``[B * T, blocks of heads]``."""
    b, token = (tl.program_id(0) // width).to(tl.int64), (tl.program_id(0) % width).to(tl.int64)
    place = tl.load(positions + b * positions_stride) + token
    if place >= tl.minimum(tl.load(lengths + b * lengths_stride), room):
        return
    row = tl.load(rows + b * rows_stride).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)
    d, dv = tl.arange(0, D_PAD)[None, :], tl.arange(0, DV_PAD)[None, :]
    inside = (head < groups) & (d < D)
    moved = tl.load(k + b * k_batch + head * k_head + token * k_token + d * k_dim, mask=inside)
    tl.store(k_arena + row * ka_row + head * ka_head + place * ka_key + d * ka_dim, moved, mask=inside)
    inside = (head < groups) & (dv < DV)
    moved = tl.load(v + b * v_batch + head * v_head + token * v_token + dv * v_dim, mask=inside)
    tl.store(v_arena + row * va_row + head * va_head + place * va_key + dv * va_dim, moved, mask=inside)
