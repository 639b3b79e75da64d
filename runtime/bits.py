"""Comparing tensors bit for bit."""

from __future__ import annotations

import numpy as np
import torch


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal bit for bit, NaN and -0.0 included."""
    if a.is_cpu and b.is_cpu:
        # NumPy stays on this thread: to wake torch's many may take milliseconds, longer than any comparison here.
        return np.array_equal(bits(a).detach().numpy(), bits(b).detach().numpy())
    return torch.equal(bits(a), bits(b))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers of the same width."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dtype == torch.bool:
        return tensor.to(torch.uint8)
    return tensor.contiguous().view(kinds[tensor.element_size()])
