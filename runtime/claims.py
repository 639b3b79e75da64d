"""Before runs are driven: one thread has each, the weights are those compiled, breakpoints are passed over if asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine
    from djinn_fx.runtime.run import Run


@contextmanager
def claimed(runs: Sequence[Run]) -> Iterator[None]:
    """Keep other threads from driving these runs; one thread may nest.

    Raises:
        SessionBusy: another thread drives one of them.
    """
    if not runs:
        yield
        return
    with runs[0].session.engine.lock:
        for run in runs:
            if run.owner not in (None, threading.get_ident()):
                run.require_still()
        before = [run.owner for run in runs]
        for run in runs:
            run.owner = threading.get_ident()
    try:
        yield
    finally:
        for run, owner in zip(runs, before, strict=True):
            run.owner = owner
        runs[0].session.engine.tiers.line.call()


@contextmanager
def quiet(runs: Sequence[Run]) -> Iterator[None]:
    """While entered, runs pass over their breakpoints, and no other thread drives them."""
    with claimed(runs):
        for run in runs:
            run.require_still()
        for run in runs:
            run.silent = True
        try:
            yield
        finally:
            for run in runs:
                run.silent = False


def vouch(engine: Engine, runs: Sequence[Run]) -> None:
    """Look at the model's weights, once for all runs that have not begun: where there are hundreds it takes a while.

    Raises:
        CaptureError: they were moved or replaced since the model was compiled; every run stays where it was.
    """
    fresh = [run for run in runs if not run.vouched]
    if fresh:
        engine.guard()
        for run in fresh:
            run.vouched = True
