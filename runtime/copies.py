"""Copies between tensors, bit for bit, in few launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from djinn_fx.kernels.words import words

#: CUDA's copy of many tensors takes these through fp32, and another NaN comes out than went in.
_NARROW = frozenset((torch.bfloat16, torch.float16))


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


class Inbox:
    """Sends numbers to one place again and again, through pinned memory that is there from the start.

    Args:
        target: the place, contiguous.
    """

    def __init__(self, target: torch.Tensor) -> None:
        cuda = target.is_cuda
        self._target, self._turn = target, 0
        hosts = [torch.empty(target.shape, dtype=target.dtype, pin_memory=cuda) for _ in range(2)]
        self._slots = [(host, host.numpy(), torch.cuda.Event() if cuda else None) for host in hosts]

    def send(self, write: Callable[[npt.NDArray[np.int64]], None]) -> None:
        """Have numbers written and send them; waits only for what was sent the time before the last."""
        self._turn = 1 - self._turn
        host, numbers, passed = self._slots[self._turn]
        if passed is not None:
            passed.synchronize()
        write(numbers)
        self._target.copy_(host, non_blocking=True)
        if passed is not None:
            passed.record()
