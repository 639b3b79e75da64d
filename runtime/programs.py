"""Which program runs a step: programs are made when first needed and kept by shape, variant and sites."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from djinn_fx.program import Program
from djinn_fx.runtime.agreement import Agreements
from djinn_fx.sites import Site
from djinn_fx.specs import ProgramShape, Variant

Builder = Callable[[ProgramShape, Variant, Sequence[Site]], Program]

#: Smallest query length a prompt chunk is padded to.
SMALLEST_CHUNK = 16

#: One program is made at a time: exporting a model changes state of the whole process.
_MAKING = threading.RLock()


def bucket(count: int, smallest: int = 1) -> int:
    """The smallest power of two that holds ``count``, at least ``smallest``."""
    size = smallest
    while size < count:
        size *= 2
    return size


def chunk_size(count: int, most: int, step: int = 2) -> int:
    """What ``count`` prompt tokens are padded to.

    Args:
        count: tokens, 1 or more.
        most: tokens of a full chunk.
        step: factor from one size to the next; larger means fewer programs and more padding.
    """
    if most == 1:
        return 1
    size = SMALLEST_CHUNK
    while size < count:
        size *= step
    return min(most, size)


@dataclass
class ProgramCache:
    """Programs by shape, variant and compiled sites.

    Attributes:
        build: makes a program; this is how the compiler's work reaches the runtime.
        agreements: compares each new program with the other variants of its shape; None: they agree as they are built.
    """

    build: Builder
    agreements: Agreements | None = None
    _programs: dict[tuple[ProgramShape, Variant, tuple[str, ...]], Program] = field(default_factory=dict)

    def get(self, shape: ProgramShape, variant: Variant, sites: Sequence[Site]) -> Program:
        """The program of this shape, variant and sites, made now if it is the first time.

        Where variants turned out to differ in their bits, the poorer one is no longer given.
        """
        names = tuple(site.name for site in sites)
        with _MAKING:
            if self.agreements is not None:
                variant = self.agreements.least(shape, variant)
            key = (shape, variant, names)
            if key not in self._programs:
                made = self.build(shape, variant, sites)
                if self.agreements is not None:
                    self.agreements.admit(made)
                self._programs[key] = made
                return self.get(shape, variant, sites)  # it may just have turned out to be too poor
            return self._programs[key]

    def made(self) -> tuple[Program, ...]:
        """All programs made so far, oldest first."""
        return tuple(self._programs.values())
