"""Tensors as integers of their own storage: to move or compare them changes and misses no bit."""

from __future__ import annotations

import torch
from torch import Tensor

#: Integers of each itemsize, whatever the dtype means by them.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def words(tensor: Tensor) -> Tensor:
    """A view of a tensor as integers as wide as its elements; complex numbers as a last axis of two."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_WORDS[tensor.itemsize])
