"""Writing a step's keys and values into the arena: the torch side of ``djinn::kv_write``."""

from __future__ import annotations

import torch
from torch import Tensor


def kv_write(
    k_arena: Tensor,
    v_arena: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    positions: Tensor,
    lengths: Tensor,
) -> None:
    """See :class:`djinn_fx.kernels.signatures.KvWrite`. Never waits for the device."""
    where = targets(positions, lengths, spare=k_arena.shape[2] - 1)
    index = rows[:, None]
    # Indexing on both sides of a slice puts the indexed axes first: [B, T, Hkv, D].
    k_arena[index, :, where] = k.transpose(1, 2)
    v_arena[index, :, where] = v.transpose(1, 2)


def targets(positions: Tensor, lengths: Tensor, spare: int) -> Tensor:
    """Where each query token is written: int64 ``[B, T]``; its own position, or ``spare``.

    The ``t``-th token of a row is valid if its position, counted from the row's first, lies below
    the row's length; in a dead row, whose length is 0, none is.
    """
    step = torch.arange(positions.shape[1], device=positions.device)
    return torch.where(positions[:, :1] + step < lengths[:, None], positions, spare)
