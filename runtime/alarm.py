"""One thread that wakes for many: things to be done at a time, in the order of their times."""

from __future__ import annotations

import heapq
import itertools
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

#: Seconds that the thread outlives its last alarm.
LINGER = 1.0

#: Alarms that may wait before those that were cancelled are looked for.
FEW = 64


class Alarm:
    """Something that is to be done once.

    Attributes:
        interval: seconds from when it was set to when it is due.
    """

    def __init__(self, interval: float, act: Callable[[], None]) -> None:
        self.interval, self.due = interval, time.monotonic() + interval
        self._act: Callable[[], None] | None = act
        self._over, self._mine = threading.Event(), threading.Lock()

    @property
    def spent(self) -> bool:
        """Whether it was done or given up."""
        return self._act is None

    def cancel(self) -> None:
        """Do nothing when it is due, unless that has begun."""
        if self._take() is not None:
            self._over.set()

    def join(self, timeout: float | None = None) -> None:
        """Wait until it was done or cancelled."""
        self._over.wait(timeout)

    def _take(self) -> Callable[[], None] | None:
        with self._mine:
            act, self._act = self._act, None
        return act

    def ring(self) -> None:
        """Do it."""
        act = self._take()
        try:
            if act is not None:
                act()
        finally:
            self._over.set()


class AlarmClock:
    """Rings alarms on one daemon thread, which is there only while there are some.

    A thread for each would cost whoever sets it more than what the alarm is for.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, int, Alarm]] = []
        self._many = FEW  # so many are waiting that it is time to drop those that were cancelled
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None

    def after(self, seconds: float, act: Callable[[], None]) -> Alarm:
        """Do something in so many seconds. It must not raise, and should hold what it is about weakly."""
        alarm = Alarm(seconds, act)
        with self._changed:
            if len(self._waiting) > self._many:  # who comes and goes would leave ever more behind
                self._waiting = [each for each in self._waiting if not each[2].spent]
                heapq.heapify(self._waiting)
                self._many = FEW + 2 * len(self._waiting)
            first = not self._waiting or alarm.due < self._waiting[0][0]
            heapq.heappush(self._waiting, (alarm.due, next(self._numbers), alarm))
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="djinn_fx alarms", daemon=True)
                with suppress(RuntimeError):  # no thread can be had: the next alarm tries again
                    thread.start()
                    self._thread = thread
            elif first:
                self._changed.notify()
        return alarm

    def _run(self) -> None:
        while (alarm := self._next()) is not None:
            try:
                alarm.ring()
            except Exception:  # it must not, but the others are done all the same
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))

    def _next(self) -> Alarm | None:
        """The next alarm, when it is due; None after a while without any."""
        with self._changed:
            while True:
                while self._waiting and self._waiting[0][2].spent:
                    heapq.heappop(self._waiting)
                if not self._waiting:
                    if self._changed.wait(LINGER) or self._waiting:
                        continue
                    self._thread = None
                    return None
                left = self._waiting[0][0] - time.monotonic()
                if left <= 0:
                    return heapq.heappop(self._waiting)[2]
                self._changed.wait(left)
