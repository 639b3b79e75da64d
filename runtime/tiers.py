"""Tiers: where the KV of paused sessions lies when there are more of them than rows.

Device rows, then pinned host memory (``pinned_bytes``), then files (``disk_bytes``). A session that needs a row takes
it from one that is paused: first from those whose user is away longest (:attr:`Session.idle_hint`), then from the
one that paused first. Nothing is lost on the way: a move that fails leaves its session where it was, and
whoever asked for the room gets a :class:`CapacityError`.

Everything here runs under the engine's lock and only begins what takes long. Where the disk has to be waited for,
:class:`Waiting` is raised before anything changed, where rows of sessions that other threads drive would do,
:class:`Crowded`; :meth:`Tiers.roomy` waits without the lock and tries again.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from djinn_fx.errors import CapacityError, CheckpointError, SessionClosed
from djinn_fx.runtime.alarm import AlarmClock
from djinn_fx.runtime.berths import park, seat
from djinn_fx.runtime.disk import Disk, Filed
from djinn_fx.runtime.line import Crowded, Line
from djinn_fx.runtime.parcels import Parked

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine
    from djinn_fx.runtime.run import Run
    from djinn_fx.runtime.session import Session

#: Seconds before its user is expected that a session begins to come back.
LEAD = 0.1

Found = TypeVar("Found")


class Waiting(Exception):
    """Something on the disk has to be waited for, without the lock; never seen by users."""

    def __init__(self, job: Future[Any]) -> None:
        super().__init__("the disk has to be waited for")
        self.job = job


class Tiers:
    """Moves sessions between the tiers of one engine; the caller holds the engine's lock but for :meth:`roomy`.

    Attributes:
        disk: the lowest tier.
        line: of threads that wait for a row.
    """

    def __init__(self, engine: Engine, disk: Disk) -> None:
        self._engine, self.disk, self.line = engine, disk, Line(engine.options.row_wait)
        self._clock = AlarmClock()
        self._writing: dict[Session, tuple[Parked, Future[Filed]]] = {}
        self._reading: dict[Session, tuple[Filed, Future[Parked]]] = {}

    def roomy(self, act: Callable[[], Found], runs: Sequence[Run] = (), *, patient: bool = True) -> Found:
        """Do something that needs rows or host memory, under the lock; what takes long is waited for without it.

        That is the disk, and rows of sessions that other threads are driving: those for ``row_wait`` seconds at most,
        and not in a callback, since the run that called it keeps its own row meanwhile.

        Args:
            act: raises :class:`Waiting` or :class:`Crowded` before it has changed anything that matters.
            runs: the runs that this thread is about to drive.
            patient: whether it may wait for a row.

        Raises:
            CapacityError: there is no room in any tier.
        """
        deadline: float | None = None
        try:
            while True:
                number, job, full = self.line.number, None, ""
                try:
                    with self._engine.lock:
                        found = act()
                        self.line.leave()
                        return found
                except Waiting as waiting:
                    job = waiting.job
                except Crowded as crowded:
                    full = str(crowded)
                if job is not None:
                    wait([job])  # what went wrong there is said by the next try
                    continue
                if deadline is None:
                    deadline = time.monotonic() + self._patience(runs, patient)
                if not self.line.wait(number, deadline):
                    raise CapacityError(full)
        finally:
            self.line.leave()

    def _patience(self, runs: Sequence[Run], patient: bool) -> float:
        """Seconds that this thread may wait for a row."""
        me = threading.get_ident()
        with self._engine.lock:
            driving = [s.run for s in self._engine.sessions if s.run is not None and s.run.driver == me]
        return self.line.patience if patient and all(run in runs for run in driving) else 0.0

    # -- down ----------------------------------------------------------------------------------

    def make_room(self, count: int = 1, keep: Collection[Session] = (), *, ahead: bool = False) -> None:
        """See that ``count`` rows are free, all or none.

        Args:
            count: how many.
            keep: sessions that stay.
            ahead: nobody waits for it yet: take rows only from those that will be away longer.

        Raises:
            CapacityError: too few rows can be had, or what is in them finds no place.
            SessionClosed: the model was closed.
            Waiting: the disk.
        """
        arena = self._engine.arena
        if self._engine.closed:  # while the caller waited for the disk, or for a row
            raise SessionClosed("this compiled model was closed; compile it again.")
        self._settle()
        found, driven = self._movable(keep, ahead)
        missing = count - arena.free_rows - len(found)
        if not self.line.first() or (0 < missing <= driven and not ahead):
            raise Crowded(
                f"{count} KV row(s) needed: other threads are driving sessions in the rows that could be had of "
                f"{arena.rows}, and did not come to an end within row_wait={self.line.patience:g} seconds (in a "
                "callback, at once). Try again, or compile with a larger max_sessions or row_wait."
            )
        if missing > 0:
            arena.require(count)
        if arena.free_rows >= count:
            return
        full: str | None = None  # not the error itself: its traceback would keep what lies in these frames
        for session in found:
            try:
                park(self._engine, session)
            except CapacityError as error:
                full = str(error)  # a shorter one may still fit
            if arena.free_rows >= count:
                return
        self._spill_one(full, keep)

    def make_host_room(self, act: Callable[[], Found]) -> Found:
        """Do something that takes host memory; where there is none left, a parked session is sent to the disk.

        Raises:
            CapacityError: nothing can be sent there.
            Waiting: the disk.
        """
        self._settle()
        try:
            return act()
        except CapacityError:
            self._spill_one(None, ())
            raise

    def seats(self, mine: Collection[Session]) -> int:
        """How many rows these sessions could have at a time: all but those that others cannot leave now."""
        engine = self._engine
        fixed = [s for s in engine.sessions if s.resident and s not in mine and (s.pinned or not self._still(s))]
        return engine.arena.rows - len(fixed)

    def _movable(self, keep: Collection[Session], ahead: bool) -> tuple[list[Session], int]:
        """Paused sessions on the device that may move, the first to move first.

        Returns:
            these, and how many more there will be when other threads are through with what they are doing.
        """
        now, me, driven = time.monotonic(), threading.get_ident(), 0
        found = []
        for session in self._engine.sessions:
            if not session.resident or session.pinned or session in keep:
                continue
            if self._still(session):  # asked once: it may change at any moment
                found.append(session)
            elif session.run is not None and session.run.driver != me:
                driven += 1
        if ahead:
            found = [s for s in found if _left(s, now) > LEAD or (s.idle_hint is None and now - s.paused_at > LEAD)]
        return sorted(found, key=lambda s: _order(s, now)), driven

    def _still(self, session: Session) -> bool:
        """Whether no thread is in the middle of something with a session."""
        run = session.run
        if run is None or self.line.holds(run):
            return True
        return run.driver is None and run.owner in (None, threading.get_ident())

    def _spill_one(self, full: str | None, keep: Collection[Session]) -> None:
        """Begin to write a parked session to the disk and wait for it; the caller has no room else.

        Not one of ``keep``: it may just have been read, and would go there and back for ever.

        Raises:
            Waiting: for the write.
            CapacityError: none can be written; ``full`` if that is why.
        """
        if self._writing:
            raise Waiting(next(iter(self._writing.values()))[1])
        now = time.monotonic()
        parked = [s for s in self._engine.sessions if isinstance(s.host, Parked) and s.host.nbytes]
        parked = [session for session in parked if session not in keep]
        for session in sorted(parked, key=lambda s: _order(s, now)):
            host = session.host
            if isinstance(host, Parked) and self.disk.has_room(host.nbytes):
                job = self.disk.write(host)
                self._writing[session] = host, job
                raise Waiting(job)
        if full is not None:
            raise CapacityError(full)

    def _settle(self) -> None:
        """Take over what the disk is through with.

        Raises:
            CapacityError: it refused to write.
        """
        if not self._writing:
            return
        failed: str | None = None
        for session, (parked, written) in list(self._writing.items()):
            if written.done():
                del self._writing[session]
                if written.exception() is not None:
                    failed = str(written.exception())
                elif session.host is parked and not session.closed:
                    session.host = written.result()
        if failed is not None:
            raise CapacityError(failed)

    # -- up ------------------------------------------------------------------------------------

    def bring_back(self, *sessions: Session, ahead: bool = False) -> None:
        """Give sessions rows and their KV back, all or none; on CUDA that is only begun, see :meth:`KVArena.arrive`.

        Args:
            sessions: wherever they are.
            ahead: as in :meth:`make_room`.

        Raises:
            CapacityError: too few rows can be had, or no device memory; each session stays where it is.
            CheckpointError: a file was damaged.
            Waiting: the disk.
            Crowded: rows that other threads are using.
        """
        for session in sessions:
            if session.away is not None:
                _hush(session)
        away = [session for session in sessions if session.host is not None]
        if not away:
            return
        hosts = [self._from_disk(s, s.host) if isinstance(s.host, Filed) else s.host for s in away]
        try:
            self.make_room(len(away), sessions, ahead=ahead)
        except Crowded:
            raise
        except CapacityError:
            # Every tier is full, or in pieces too small. Whoever is here already goes on all the same: others wait in
            # ordinary memory, beyond the budget by what these leave free there.
            found, missing = self._movable(sessions, ahead)[0], len(away) - self._engine.arena.free_rows
            if ahead or len(found) < missing:
                raise
            for other in found[: max(0, missing)]:
                park(self._engine, other, beyond=True)
        for session, host in zip(away, hosts, strict=True):
            if host is not None:
                seat(self._engine, session, host)

    def _from_disk(self, session: Session, filed: Filed) -> Parked:
        known = self._reading.get(session)
        if known is None or known[0] is not filed:
            self._reading[session] = known = filed, self.disk.read(filed, self._engine.pool)
        if not known[1].done():
            raise Waiting(known[1])
        del self._reading[session]
        session.host = found = known[1].result()
        return found

    def foresee(self, session: Session) -> None:
        """A session will soon go on: begin to bring it back, if that costs nobody anything. Waits for nothing.

        Its user is back, so what was said of the absence is over.
        """
        session.returned()
        with suppress(CapacityError, CheckpointError, Waiting):
            self.bring_back(session, ahead=True)

    def expect(self, session: Session) -> None:
        """See that a session comes back by itself shortly before its user does; called when it left or got a hint."""
        _hush(session)
        if session.idle_hint is None or session.resident:
            return
        wait = max(0.0, _left(session, time.monotonic()) - LEAD)
        session.away = self._clock.after(wait, partial(_due, weakref.ref(self), weakref.ref(session)))

    def forget(self, session: Session) -> None:
        """Drop what is under way for a closing session."""
        _hush(session)
        self._writing.pop(session, None)
        self._reading.pop(session, None)

    def due(self, session: Session) -> None:
        """Bring a session back whose user is expected; on a thread of its own, without the lock."""

        def back() -> None:
            if not session.closed and not self._engine.closed:
                self.bring_back(session, ahead=True)

        with suppress(CapacityError, CheckpointError):
            self.roomy(back, patient=False)


def _due(tiers: weakref.ref[Tiers], session: weakref.ref[Session]) -> None:
    mover, gone = tiers(), session()
    if mover is not None and gone is not None:
        mover.due(gone)


def _hush(session: Session) -> None:
    """Nobody has to bring the session back any more."""
    if session.away is not None:
        session.away.cancel()
        session.away = None


def _left(session: Session, now: float) -> float:
    """Seconds until the user of a session is expected; negative where that is past or nobody said."""
    return -1.0 if session.idle_hint is None else session.paused_at + session.idle_hint - now


def _order(session: Session, now: float) -> tuple[int, float]:
    """Who moves first: the longest absence ahead; then without a hint, oldest first; last those who are due."""
    if session.idle_hint is None:
        return 1, session.paused_at
    left = _left(session, now)
    return (0, -left) if left > LEAD else (2, -left)
