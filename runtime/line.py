"""Standing in line for rows: threads that wait until others are through with some.

A session in the middle of a step keeps its row. Whoever finds too few rows because of that waits, since a step, or the
call that drives it, comes to its end. One after the other: while somebody waits, only the first in line is given rows.
The sessions of those in line are not in the middle of anything, so the first may have their rows too: no two threads
wait for each other.
"""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING

from djinn_fx.errors import CapacityError

if TYPE_CHECKING:
    from djinn_fx.runtime.run import Run

#: Seconds after which a thread in line looks for itself; not everything that frees a row says so.
GLANCE = 0.25


class Crowded(CapacityError):
    """Other threads are driving the sessions in all rows that could be had; users see it as a CapacityError."""


class Line:
    """The threads that wait for rows of one engine, in order.

    Args:
        patience: seconds that a thread waits at most; 0: not at all.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._waiting: dict[int, None] = {}
        self._called = threading.Condition()
        self._numbers = itertools.count(1)
        self.number = 0  # another one after every call

    @property
    def empty(self) -> bool:
        """Whether nobody waits."""
        return not self._waiting

    def first(self) -> bool:
        """Whether no other thread was here before this one."""
        with self._called:
            return next(iter(self._waiting), threading.get_ident()) == threading.get_ident()

    def holds(self, run: Run) -> bool:
        """Whether the thread that drives a run, or has claimed it, stands in line."""
        return run.driver in self._waiting or run.owner in self._waiting

    def call(self) -> None:
        """A row may have come free; any thread, with or without the engine's lock."""
        self.number = next(self._numbers)
        if self._waiting:
            with self._called:
                self._called.notify_all()

    def leave(self) -> None:
        """This thread is not in line any more; under the engine's lock, when it has what it waited for."""
        if self._waiting and threading.get_ident() in self._waiting:
            with self._called:
                del self._waiting[threading.get_ident()]
            self.call()

    def wait(self, number: int, deadline: float) -> bool:
        """Stand in line until it is this thread's turn and somebody calls, or for a glance; False after the deadline.

        Args:
            number: of the last call before the thread found no row.
            deadline: by the monotonic clock.
        """
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        if threading.get_ident() not in self._waiting:
            with self._called:
                self._waiting[threading.get_ident()] = None
            self.call()  # the first may have its rows now
        with self._called:
            self._called.wait_for(lambda: self.number != number and self.first(), min(left, GLANCE))
        return True
