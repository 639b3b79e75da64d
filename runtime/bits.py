"""Comparing tensors bit for bit."""

from __future__ import annotations

import numpy as np
import torch

from djinn_fx.kernels.words import words


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal bit for bit, NaN and -0.0 included."""
    if a.is_cpu and b.is_cpu:
        # NumPy stays on this thread: to wake torch's many may take milliseconds, longer than any comparison here.
        return np.array_equal(bits(a).detach().numpy(), bits(b).detach().numpy())
    return torch.equal(bits(a), bits(b))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers of the same width."""
    if tensor.dtype == torch.bool:
        return tensor.to(torch.uint8)
    return words(tensor).contiguous()
