"""Scratch arenas: the KV of passes that belong to no session."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from djinn_fx.program import KVSpec
from djinn_fx.runtime.arena import KVArena

#: Most host memory that is kept between two passes.
SPARE_BYTES = 1 << 30


@dataclass(frozen=True)
class Scratch:
    """Gives a pass its arena. On the host the last one is kept for the next pass: fresh pages take long to come.

    Attributes:
        dtype: dtype of keys and values.
        device: where they live.
    """

    dtype: torch.dtype
    device: torch.device
    _spare: deque[KVArena] = field(default_factory=partial(deque, maxlen=1), repr=False)

    @contextmanager
    def arena(self, specs: Sequence[KVSpec], rows: int, positions: int) -> Iterator[KVArena]:
        """An arena for one pass, which must read the positions alone that it was given or wrote."""
        try:
            arena = self._spare.pop()  # nobody else has it then
        except IndexError:
            arena = None
        if arena is None or (arena.rows, arena.positions, len(arena.layers)) != (rows, positions, len(specs)):
            arena = KVArena(specs, rows, positions, self.dtype, self.device)
        yield arena
        if self.device.type == "cpu" and arena.nbytes <= SPARE_BYTES:
            self._spare.append(arena)
