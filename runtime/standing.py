"""Standing at a stop: how a run comes to stand there, and what it takes over from there when it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from djinn_fx.runtime.flight import Flight
from djinn_fx.runtime.modes import outside_inference, without_grad
from djinn_fx.runtime.planner import flight_of
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.stop import Stop
from djinn_fx.runtime.tables import BatchRow
from djinn_fx.sites import Site

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine


@without_grad
def deliver(engine: Engine, run: Run, site: Site, fired: Sequence[int]) -> Stop:
    """Stop a run after ``site``: the value is copied into a buffer that the stop owns."""
    flight = flight_of(run)
    flight.passed = site.order
    # Under the lock: another thread's step may want the place where it lies.
    with engine.lock, outside_inference():  # the user may write to it wherever
        value = flight.value(site).clone()
        if flight.chunk is not None:
            flight.chunk.save()
    stop = Stop(run, site, flight.step, value, fired)
    run.stand_at(stop)
    run.interrupted = False
    return stop


@without_grad
def leave(engine: Engine, run: Run, flight: Flight) -> None:
    """Take over what the user changed while the run stood at a stop, and leave the stop."""
    if run.stop is not None:
        take_over(engine, run, later=True)
    elif flight.step.steering[-1][1] is not run.session.steering:
        # A step left in the air by an error: steering set since then acts on what lies ahead.
        flight.steer(run.session.steering, engine.sites)
    else:
        return
    if flight.chunk is not None and flight.chunk.program.sites != engine.sites:
        flight.chunk = None  # sites were compiled in since it began, and may be steered: it begins again
    elif flight.chunk is not None:
        row = BatchRow(run.session.row, flight.step)
        engine.executor.refresh(flight.chunk, row)
    run.stand_at(None)


@without_grad
def take_over(engine: Engine, run: Run, *, later: bool = False) -> None:
    """Make what the user changed at the stop where a run stands part of its step in the air.

    Args:
        engine: the engine.
        run: the run.
        later: whether a value that was written may stay in doubt until its step is launched (:meth:`Flight.settle`).
    """
    stop, flight = run.stop, run.flight
    if stop is None or flight is None:
        return
    if not stop.untouched:
        doubt = engine.doubts.raised(stop.checked_value(), flight.value(stop.place))
        # To ask waits for the device: for others' step, if one was launched ahead.
        if (later and stop.written and doubt.known is None) or doubt.holds():
            flight.replace(stop.place, doubt)
    flight.steer(run.session.steering, engine.sites)
