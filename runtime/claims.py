"""Before runs are driven: one thread has each, the weights are those compiled, breakpoints are passed over if asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from djinn_fx.errors import CaptureError
from djinn_fx.runtime.planner import next_is_decode

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine
    from djinn_fx.runtime.run import Run


class claimed:
    """A context that keeps other threads from driving some runs; one thread may nest.

    A class, since a generator costs the host more than all else that is done to go on from a stop.

    Args:
        runs: of one engine.

    Raises:
        SessionBusy: another thread drives one of them.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        self._before: list[int | None] = []

    def __enter__(self) -> None:
        runs, me = self._runs, threading.get_ident()
        if not runs:
            return
        try:
            with runs[0].session.engine.lock:
                for run in runs:
                    if run.owner not in (None, me):
                        run.require_still()
                self._before = [run.owner for run in runs]
                for run in runs:
                    run.owner = me
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *failure: object) -> None:
        try:
            self._give_back()
        except BaseException:  # an interrupt must not leave them claimed for ever
            self._give_back()
            raise

    def _give_back(self) -> None:
        for run, owner in zip(self._runs, self._before, strict=False):  # none where they were refused
            run.owner = owner
        if self._runs:
            self._runs[0].session.engine.tiers.line.call()


@contextmanager
def quiet(runs: Sequence[Run]) -> Iterator[None]:
    """While entered, runs pass over their breakpoints, and no other thread drives them."""
    with claimed(runs):
        for run in runs:
            run.require_still()
        try:
            for run in runs:
                run.silent = True
            yield
        finally:
            try:
                _heed(runs)
            except BaseException:  # an interrupt must not leave them silent for ever
                _heed(runs)
                raise


def _heed(runs: Sequence[Run]) -> None:
    """Let runs stop at their breakpoints again."""
    for run in runs:
        run.silent = False


def vouch(engine: Engine, runs: Sequence[Run]) -> None:
    """Look at the model's weights, once for all runs that have not begun: where there are hundreds it takes a while.

    Where graphs run and all runs begin with a prompt, the device need not wait for all of it: a glance at the tensors
    that were compiled is enough to launch, whatever the modules hold now, and :func:`confirm` does the rest.

    Raises:
        CaptureError: they were moved or replaced since the model was compiled; every run stays where it was.
    """
    fresh = [run for run in runs if not run.vouched]
    if not fresh:
        return
    if engine.glance is not None and all(map(_begins, runs)):
        engine.glance()
        return
    engine.guard()
    for run in fresh:
        run.vouched = True


def _begins(run: Run) -> bool:
    """Whether a run has not begun, and a prompt's first chunk is what it begins with."""
    session = run.session
    fresh = not run.vouched and run.flight is None and run.stop is None
    return fresh and session.length < len(session.token_list) and not next_is_decode(run)


def confirm(engine: Engine, runs: Sequence[Run]) -> None:
    """Look at what :func:`vouch` put off, now that the device has work, and before anybody is shown any of it.

    Raises:
        CaptureError: as there; what the runs had begun is dropped.
    """
    try:
        engine.guard()
    except CaptureError:
        with engine.lock:
            for run in runs:
                run.flight = None  # computed, perhaps, from weights in another form
        raise
    for run in runs:
        run.vouched = True
