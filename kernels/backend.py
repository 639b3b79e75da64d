"""Triton where it is installed, and who answers on a GPU: Triton or the torch twins.

A CPU-only install has no Triton. The kernel files can still be imported there; their kernels stay
plain functions that nobody launches.
"""

from __future__ import annotations

import os
from typing import Any

import torch

try:
    import triton.language as tl
    from triton import jit
except ImportError:
    tl = None

    def jit(function: Any = None, **options: Any) -> Any:
        """Stand in for ``triton.jit``."""
        return function or jit


__all__ = ["jit", "next_power_of_2", "stream_of", "tl", "uses_triton"]


def uses_triton() -> bool:
    """Whether CUDA tensors go to the Triton kernels: if installed, unless ``DJINN_KERNELS=torch``."""
    return tl is not None and os.environ.get("DJINN_KERNELS") != "torch"


def next_power_of_2(count: int) -> int:
    """The least power of two that is not below ``count``, which is positive."""
    return 1 << (count - 1).bit_length()


def stream_of(tensor: torch.Tensor) -> int:
    """The current stream of a CUDA tensor's device, for a kernel that is at hand: it would look for both itself."""
    return torch._C._cuda_getCurrentRawStream(tensor.get_device())
