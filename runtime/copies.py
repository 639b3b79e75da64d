"""Copies between tensors, bit for bit, in few launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: CUDA's copy of many tensors takes these through fp32, and another NaN comes out than went in.
_NARROW = frozenset((torch.bfloat16, torch.float16))


def words(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor so that a copy of it keeps every bit."""
    return tensor.view(torch.int16) if tensor.dtype in _NARROW else tensor


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy many tensors bit for bit with few launches, those of one dtype together."""
    by_dtype: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        if target.dtype in _NARROW and source.dtype == target.dtype:
            target, source = words(target), words(source)
        pair = by_dtype.setdefault(target.dtype, ([], []))
        pair[0].append(target)
        pair[1].append(source)
    for some, values in by_dtype.values():
        if len(some) == 1:
            some[0].copy_(values[0])  # a launch less dear to the host
        else:
            torch._foreach_copy_(some, values)


def send(host: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a small host tensor to the device without waiting; ``host`` may be changed right away."""
    if target.device.type == "cpu":
        target.copy_(host)
        return
    staged = torch.empty(host.shape, dtype=host.dtype, pin_memory=True)
    staged.copy_(host)
    target.copy_(staged, non_blocking=True)
