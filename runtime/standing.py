"""Standing at a stop: how a run comes to stand there, and what it takes over from there when it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import torch

from djinn_fx.runtime.doubt import Doubt, Verdict
from djinn_fx.runtime.flight import Flight
from djinn_fx.runtime.launch import LaunchValues
from djinn_fx.runtime.modes import outside_inference, without_grad
from djinn_fx.runtime.planner import flight_of, wants
from djinn_fx.runtime.poised import Poised, aligned
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.steps import Step
from djinn_fx.runtime.stop import Stop
from djinn_fx.runtime.tables import BatchRow
from djinn_fx.sites import Site

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine


@without_grad
def deliver(
    engine: Engine, run: Run, site: Site, fired: Sequence[int], *, alone: bool = False, waiting: bool = False
) -> Stop:
    """Stop a run after ``site``: the value is copied into a buffer that the stop owns.

    Args:
        engine: the engine.
        run: the run.
        site: the site.
        fired: see :class:`Stop`.
        alone: whether nothing else is driven by this thread, so that the run may go on by :func:`go_on`.
        waiting: whether it is not in the user's hands when this returns.
    """
    flight = flight_of(run)
    flight.settle()
    # Under the lock: another thread's step may want the place where it lies.
    with engine.lock, outside_inference():  # the user may write to it wherever
        value = flight.value(site).clone()
        if flight.chunk is not None:
            flight.chunk.save()
    stop = Stop(run, site, flight.step, value, fired, partial(_poise, engine, run, flight) if alone else None)
    stop.waiting = waiting
    run.come_to(stop, flight)
    return stop


def _poise(engine: Engine, run: Run, flight: Flight) -> Poised | None:
    """Make the step in the air ready to run again with another value where its run stands, if it is a decode step."""
    with engine.lock, outside_inference(), suppress(torch.OutOfMemoryError):
        stop, values, loop = run.stop, flight.values, engine.loop
        if stop is not None and run.flight is flight and loop is not None and isinstance(values, LaunchValues):
            return loop.poise(BatchRow(run.session.row, flight.step), values.launch, stop.place)
    return None


@without_grad
def go_on(engine: Engine, run: Run) -> bool:
    """Let a decode step run on from a stop at once, if a value was written there and nothing else can have changed.

    It is :func:`leave`, and the launch of the step, and looks at nothing that can wait until the device is busy. False:
    nothing was done, and the run goes on as any other.

    Raises:
        InvalidValue: the value was given another shape or dtype through ``.data``.
    """
    with engine.lock:
        stop, flight, session = run.stop, run.flight, run.session
        poised, loop = None if stop is None else stop.poised, engine.loop
        if stop is None or flight is None or poised is None or loop is None or not stop.written:
            return False
        if not loop.fits(poised) or not _undisturbed(engine, run, flight, poised):
            return False
        value = stop.fitting()
        if not aligned(value):
            return False
        question = engine.doubts.question()
        try:
            flight.values = flight.answers = flight.drawn = None  # nobody needs what the step had left
            launch = loop.go(poised, value, question)
            flight.step, flight.doubt = poised.edited, (stop.site, engine.doubts.about(poised.own, question))
            run.stand_at(None)
        except BaseException:
            # It cannot be compared any more: it is an edit.
            flight.replace(stop.place, Doubt(value.clone(), Verdict(True)))
            run.stand_at(None)
            raise
        flight.values = launch.serves(BatchRow(session.row, poised.edited, wants(run)))
    return True


def _undisturbed(engine: Engine, run: Run, flight: Flight, poised: Poised) -> bool:
    """Whether a run stands as it stood when its step was poised."""
    session = run.session
    here = session.resident and session.away is None and engine.arena.still and not (session.closed or engine.closed)
    same = flight.step is poised.step and session.steering is poised.step.steering[0][1]
    values = flight.values
    mine = isinstance(values, LaunchValues) and values.launch is poised.launch and not values.shared
    return here and same and mine and run.vouched and session.row == poised.seat.row.arena_row


@without_grad
def leave(engine: Engine, run: Run, flight: Flight) -> None:
    """Take over what the user changed while the run stood at a stop, and leave the stop."""
    stop, before = run.stop, flight.step
    if stop is None and before.steering[-1][1] is run.session.steering:
        return
    try:
        if stop is not None:
            _take_over(engine, stop, flight)
        # Also of a step left in the air by an error: steering set since then acts on what lies ahead.
        flight.steer(run.session.steering, engine.sites)
        if flight.chunk is not None and flight.chunk.program.sites != engine.sites:
            flight.chunk = None  # sites were compiled in since it began, and may be steered: it begins again
        elif flight.chunk is not None:
            row = BatchRow(run.session.row, flight.step)
            engine.executor.refresh(flight.chunk, row)
        run.stand_at(None)
    except BaseException:
        if flight.step is not before:
            # An interrupt: what was changed is in the step, perhaps not yet in what it left. So that runs again.
            flight.values = flight.chunk = None
            run.stand_at(None)
        raise


def _take_over(engine: Engine, stop: Stop, flight: Flight) -> None:
    """Make the value at a stop part of the step in the air, where it may have been changed."""
    if stop.untouched:
        return
    doubt = engine.doubts.raised(stop.checked_value(), flight.value(stop.place))
    # To ask waits for the device: for others' step, if one was launched ahead.
    if (stop.written and doubt.known is None) or doubt.holds():
        flight.replace(stop.place, doubt)


@without_grad
def step_there(engine: Engine, run: Run) -> Step:
    """The step in the air of a run, with what the user changed at the stop where it stands; nothing changes by it."""
    flight, stop = flight_of(run), run.stop
    flight.settle()
    step = flight.step
    if stop is None:
        return step
    if not stop.untouched:
        doubt = engine.doubts.raised(stop.checked_value(), flight.value(stop.place))
        if doubt.holds():
            step = step.edited(stop.site, doubt.own)
    return step.steered(flight.reached, run.session.steering)
