"""Autosave: every session on disk, kept up in the background; a process that dies loses at most the last interval.

A session is saved at a moment at which it is whole: at once if no thread drives it, else between two steps, where the
thread that drives it lets autosave in. A session that has not changed since it was last written is not written again.
Files of sessions that were closed go. The weights are hashed once a round, not once a file.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from djinn_fx.errors import CheckpointError, InvalidValue, SessionBusy
from djinn_fx.runtime.bits import same_bits
from djinn_fx.runtime.checkpoint import Checkpoint
from djinn_fx.runtime.fingerprint import Fingerprints
from djinn_fx.runtime.saved import Look, Saved, look

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine
    from djinn_fx.runtime.session import Session

#: Names of the files: of a session, whole.
PREFIX, SUFFIX = "session-", ".safetensors"

#: Seconds between two looks at a session that a thread is driving, beside being let in.
PATIENCE = 0.05

#: Seconds after which a draft that nobody writes any more is taken for that of a process that is dead.
STALE = 3600.0


class Mark:
    """What a session looked like when it was saved; equal marks mean the same file."""

    def __init__(self, session: Session) -> None:
        run = session.run
        flight = None if run is None else run.flight
        stop = None if run is None else run.stop
        journal = session.journal
        # The objects themselves are kept, so that no other can come in their place.
        self.parts: tuple[object, ...] = (
            run, flight and flight.step, stop, session.steering, journal[-1] if journal else None,
            *(run.breakpoints if run is not None else ()),
        )  # fmt: skip
        self.plain: tuple[object, ...] = (
            len(session.token_list), session.length, len(journal),
            run and (run.finished, len(run.records), tuple(point.left for point in run.breakpoints)),
            stop and (stop.held, stop.waiting), flight and flight.passed,
        )  # fmt: skip
        self.value: torch.Tensor | None = None if stop is None else stop.content.clone()

    def same(self, other: Mark | None) -> bool:
        """Whether nothing has changed."""
        if other is None or self.plain != other.plain:
            return False
        if any(a is not b for a, b in zip(self.parts, other.parts, strict=True)):
            return False
        if self.value is None or other.value is None:
            return self.value is other.value
        return self.value.shape == other.value.shape and same_bits(self.value, other.value)


Taken = tuple[Mark, Checkpoint]


def _fulfil(future: Future[Taken | None], act: Callable[[], Taken | None]) -> None:
    try:
        future.set_result(act())
    except Exception as error:
        future.set_exception(error)


class Autosave:
    """Keeps the sessions of one model in a folder; ``dj.autosave`` makes it. Stop it, or use it in ``with``.

    Attributes:
        folder: where the files are.
        every: seconds between two rounds.
        errors: what went wrong in the last round; its sessions are tried again in the next.
        written: how many files were written so far.
    """

    def __init__(self, engine: Engine, folder: Path, every: float) -> None:
        wanted: object = every
        if not isinstance(wanted, Real) or not 0 < every < threading.TIMEOUT_MAX:
            raise InvalidValue(f"autosave(every={every!r}): give seconds, more than 0.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
        except OSError as error:
            raise CheckpointError(
                f"cannot keep sessions in {str(folder)!r}: {error}. Give a folder that can be made and written."
            ) from error
        self.folder, self.every, self.written = folder, every, 0
        self.errors: list[Exception] = []
        self._engine = engine
        self._names: weakref.WeakKeyDictionary[Session, str] = weakref.WeakKeyDictionary()
        self._files: dict[str, Look | None] = {}  # as they were left here
        self._weights = Fingerprints(engine.identity.weights)
        self._marks: weakref.WeakKeyDictionary[Session, tuple[Mark, object]] = weakref.WeakKeyDictionary()
        self._end, self._round = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._work, name="djinn-autosave", daemon=True)
        self._thread.start()

    def save_now(self) -> None:
        """One round now: every session that has changed is written, files of closed ones go."""
        with self._round:
            errors: list[Exception] = []
            self._weights.forget()
            with self._engine.lock:
                if self._engine.closed:
                    return  # its sessions were closed with it: their files stay
                sessions = list(self._engine.sessions)
            for session in sessions:
                self._adopt(session)
            for session in sessions:
                try:
                    self._save(session)
                except Exception as error:  # whatever it is, the others are saved, and this one is tried again
                    if not session.closed:
                        errors.append(error.with_traceback(None))  # which would keep the session's memory
            for name in self._gone():
                try:
                    if look(self.folder / name) == self._files[name]:  # else somebody else goes on in it
                        (self.folder / name).unlink(missing_ok=True)
                except OSError as error:
                    errors.append(error)
                else:
                    del self._files[name]
            self.errors = errors

    def _gone(self) -> set[str]:
        """Names of the files of sessions that were closed; those that were closed with their model keep theirs."""
        with self._engine.lock:
            if self._engine.closed:
                return set()
            return set(self._files) - {self._names.get(session) for session in self._engine.sessions}

    def name_of(self, session: Session) -> str | None:
        """The name of a session's file in the folder; None if it was not written yet."""
        return self._names.get(session)

    def stop(self) -> None:
        """One last round, then no more. The files stay."""
        if not self._end.is_set():
            self._end.set()
            self._thread.join()
            if not self._engine.closed:
                self.save_now()

    def _work(self) -> None:
        while True:
            begun = time.monotonic()
            if self._engine.closed:
                return
            self.save_now()
            if self._end.wait(max(0.0, self.every - (time.monotonic() - begun))):
                return

    def _adopt(self, session: Session) -> None:
        """Let a recovered session go on in its file, unless somebody else does: another process, or a twin here."""
        saved = session.saved
        if saved is None or not session.settled or session in self._names or saved.path.name in self._files:
            return
        if saved.lies_in(self.folder) and saved.untouched:
            self._names[session], self._files[saved.path.name] = saved.path.name, saved.seen

    def _name_for(self, session: Session) -> str:
        """The name of a session's file: another one, where somebody else goes on in that which it had."""
        known = self._names.get(session)
        if known is not None and look(self.folder / known) in (None, self._files[known]):
            return known
        if known is not None:
            del self._files[known], self._names[session]
        return f"{PREFIX}{uuid.uuid4().hex}{SUFFIX}"

    def _save(self, session: Session) -> None:
        known = self._names.get(session)
        if known is not None and look(self.folder / known) != self._files[known]:
            self._marks.pop(session, None)  # not what was written there: it is written again
        taken = self._taken(session)
        if taken is None:
            return
        mark, checkpoint = taken
        name = self._name_for(session)
        weights = self._weights.lines()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of predicates that no file can hold: said in the docs
            checkpoint.write(self.folder / name, weights)
        self._names[session], self._files[name] = name, look(self.folder / name)
        self._marks[session] = mark, self._weights.mark()
        self.written += 1

    def _taken(self, session: Session) -> Taken | None:
        """A checkpoint at a moment between two steps; None if it is closed or has not changed.

        Raises:
            SessionBusy: nobody who drives it came to the end of a step, for as long as an interval.
        """
        deadline = time.monotonic() + self.every
        while True:
            try:
                with self._engine.lock:
                    return self._take(session)
            except SessionBusy:
                if time.monotonic() > deadline:
                    raise
            let_in: Future[Taken | None] = Future()
            self._engine.visits[session] = partial(_fulfil, let_in, partial(self._take, session))
            with suppress(TimeoutError):
                return let_in.result(PATIENCE)
            with self._engine.lock:
                self._engine.visits.pop(session, None)
                if let_in.done():
                    return let_in.result()

    def _take(self, session: Session) -> Taken | None:
        """:meth:`_taken` now; the caller holds the lock."""
        if session.closed or not session.settled:
            return None
        mark, (known, weights) = Mark(session), self._marks.get(session, (None, None))
        if mark.same(known) and weights == self._weights.mark():
            return None
        return mark, session.checkpoint_between()

    def __enter__(self) -> Autosave:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def recover(engine: Engine, folder: Path, exact: bool) -> list[Session]:
    """Every session that :class:`Autosave` left in a folder, oldest file first; all or none.

    A session that is saved there again goes on in its file.
    """
    found: list[Session] = []
    try:
        for path in _left_in(folder):
            saved = Saved(path, look(path))
            try:
                found.append(Checkpoint.load(path).restore_into(engine, exact=exact, saved=saved))
            except CheckpointError as error:
                if not os.path.lexists(path):
                    continue  # whoever had it has closed it meanwhile
                raise CheckpointError(
                    f"{error} So no session of {str(folder)!r} was recovered, and every file there is as it was; move "
                    "this one elsewhere to recover the others."
                ) from error
    except BaseException:
        for session in found:
            session.close()
        raise
    for session in found:
        session.settled = True
    return found


def _left_in(folder: Path) -> list[Path]:
    """Files of sessions in a folder, oldest first; none if there is no folder yet."""
    try:
        paths = [path for path in folder.iterdir() if path.name.startswith(PREFIX) and path.name.endswith(SUFFIX)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"cannot look for sessions in {str(folder)!r}: {error}. Check the folder.") from error
    return sorted(paths, key=lambda path: ((look(path) or (0, 0))[1], path.name))


def _sweep(folder: Path) -> None:
    """Remove drafts of killed processes: those that nobody has written for a while."""
    for draft in folder.glob(f".{PREFIX}*{SUFFIX}.*.tmp"):
        seen = look(draft)
        if seen is not None and seen[1] / 1e9 < time.time() - STALE:
            draft.unlink(missing_ok=True)
