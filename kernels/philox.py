"""Philox4x32-10, a counter-based random generator, in integer operations of torch.

Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11. Each block of
four words is a function of a counter and a key alone, so a draw has no state to carry, copy or
restore, and every row of a batch draws what it would draw by itself, on every device.

Words are 32 bits in int64. A product of two words may exceed int64: it wraps, which keeps all its
64 bits, and the masks cut the words out of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """The random block of each counter.

    Args:
        counter: int64 ``[4, ...]``, words in ``[0, 2**32)``.
        key: int64 ``[2, ...]``, likewise; the rest of its shape is the counter's.

    Returns:
        int64 ``[4, ...]``, words in ``[0, 2**32)``.
    """
    shape = (2, *(1,) * (key.dim() - 1))
    multipliers = _constant(MULTIPLIERS, shape, key.device)
    rounds = torch.arange(ROUNDS, device=key.device).view(-1, *(1,) * key.dim())
    keys = (key + rounds * _constant(KEY_STEPS, shape, key.device)) & WORD
    even, odd = counter[0::2], counter[1::2]  # words 0 and 2, words 1 and 3
    for round_key in keys.unbind():
        # Each product's halves go to the other pair of words.
        product = (even * multipliers).flip(0)
        even = ((product >> 32) & WORD) ^ odd ^ round_key
        odd = product & WORD
    return torch.stack((even, odd), dim=1).flatten(0, 1)


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """One uniform number for each pair of seed and position.

    The seed is the key, the position is the low half of the counter; both count as 64 bits, so
    negative seeds are as good as others. The number is made of 53 bits: 27 of the block's first
    word above 26 of its second.

    Args:
        seed: int64 ``[B]``.
        position: int64 ``[B]``.

    Returns:
        fp64 ``[B]`` in ``[0, 1)``.
    """
    zero = torch.zeros_like(position)
    counter = torch.stack((position & WORD, (position >> 32) & WORD, zero, zero))
    words = philox(counter, torch.stack((seed & WORD, (seed >> 32) & WORD)))
    bits = ((words[0] >> 5) << 26) | (words[1] >> 6)
    return bits.to(torch.float64) * 2.0**-53


def _constant(words: tuple[int, int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Two words as ``[2, 1...]``, filled on the device: nothing is copied from the host."""
    parts = [torch.full((), word, dtype=torch.int64, device=device) for word in words]
    return torch.stack(parts).view(shape)
