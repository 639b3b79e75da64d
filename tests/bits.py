"""Bitwise comparison of tensors: -0.0 is not 0.0, a NaN equals itself."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers of the same width, on the CPU."""
    return tensor.detach().cpu().contiguous().view(_INTEGERS[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether shape, dtype and every bit are equal."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def assert_same_bits(a: Tensor | None, b: Tensor | None, what: str = "") -> None:
    """Fail, with the number of elements that differ, unless both are tensors of the same bits."""
    assert a is not None and b is not None, f"{what}: {a} and {b}"
    assert a.shape == b.shape and a.dtype == b.dtype, f"{what}: {a.shape} {a.dtype} and {b.shape} {b.dtype}"
    differ = int((bits(a) != bits(b)).sum())
    assert not differ, f"{what}: {differ} of {a.numel()} differ, by {(a - b).abs().max()}"
