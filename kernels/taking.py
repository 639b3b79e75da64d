"""A user's value on its way into a step: a copy of it that nobody else writes, and whether it differs at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from djinn_fx.kernels import triton_taking
from djinn_fx.kernels.backend import uses_triton
from djinn_fx.kernels.words import words


class Taking:
    """Takes values over; a kernel is looked up once for tensors that lie alike, which costs more than to launch it."""

    def __init__(self) -> None:
        self._kernels: dict[object, Any] = {}

    def __call__(self, value: Tensor, before: Tensor, own: Tensor, differs: Tensor) -> None:
        """Copy a value, and say whether it differs from what was there; never waits for the device.

        Args:
            value: of any shape and dtype.
            before: as ``value``, or contiguous and longer: then it is compared with as much of it.
            own: takes the copy, bit for bit: as ``value``, contiguous, or bytes ``[value.nbytes]``, pinned ones too.
            differs: int32 ``[1]``, 0 before, on the CPU or pinned; 1 if a bit differs.
        """
        if value.is_cuda and uses_triton():
            if value.is_complex():
                value, before = torch.view_as_real(value), torch.view_as_real(before)
                own = torch.view_as_real(own) if own.is_complex() else own
            triton_taking.take(value.contiguous(), before.contiguous(), own, differs, self._kernels)
        else:
            take(value, before, own, differs)


def take(value: Tensor, before: Tensor, own: Tensor, differs: Tensor) -> None:
    """The torch twin of :class:`Taking`."""
    mine, old = words(value), words(before)
    if old.shape != mine.shape:
        old = old.reshape(-1)[: mine.numel()].view(mine.shape)
    if own.dtype != value.dtype or own.shape != value.shape:
        own = own.view(value.dtype).view(value.shape)
    words(own).copy_(mine, non_blocking=True)
    differs.copy_((mine != old).any().view(1), non_blocking=True)
