"""Standing in line for a row: threads that wait until another thread is through with one.

A session in the middle of a step keeps its row. Whoever finds all rows taken that way waits, since a step, or the
call that drives it, comes to its end. While a thread waits, the sessions it wants to drive are not in the middle of
anything, so others may have their rows: two threads never wait for each other.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from djinn_fx.errors import CapacityError

if TYPE_CHECKING:
    from djinn_fx.runtime.run import Run

#: Seconds after which a thread in line looks for itself; not everything that frees a row says so.
GLANCE = 0.25


class Crowded(CapacityError):
    """Other threads are driving the sessions in all rows that could be had; users see it as a CapacityError."""


class Line:
    """The threads that wait for a row of one engine.

    Args:
        patience: seconds that a thread waits at most; 0: not at all.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._waiting: dict[int, Sequence[Run]] = {}
        self._called = threading.Condition()
        self._numbers = itertools.count(1)
        self.number = 0  # another one after every call

    @property
    def empty(self) -> bool:
        """Whether nobody waits."""
        return not self._waiting

    def holds(self, run: Run) -> bool:
        """Whether a thread waits for a row to drive this run."""
        return any(run is each for runs in tuple(self._waiting.values()) for each in runs)

    def call(self) -> None:
        """A row may have come free; any thread, with or without the engine's lock."""
        self.number = next(self._numbers)
        if self._waiting:
            with self._called:
                self._called.notify_all()

    def leave(self) -> None:
        """This thread is no longer in line; under the engine's lock, before it does what it waited for."""
        self._waiting.pop(threading.get_ident(), None)

    def wait(self, number: int, deadline: float, runs: Sequence[Run]) -> bool:
        """Stand in line until somebody calls, or for a glance; False if the deadline has passed.

        Args:
            number: of the last call before the thread found no row.
            deadline: by the monotonic clock.
            runs: those that this thread wants to drive; until :meth:`leave` others may have their rows.
        """
        me, left = threading.get_ident(), deadline - time.monotonic()
        if left <= 0:
            return False
        if me not in self._waiting:
            self._waiting[me] = runs
            if runs and self.number == number:
                self.call()
                number = self.number
        with self._called:
            self._called.wait_for(lambda: self.number != number, min(left, GLANCE))
        return True
