"""Moves through a session's history: replay to a place, rewind, fork, recompute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from djinn_fx.runtime.bits import same_bits
from djinn_fx.runtime.driver import execute
from djinn_fx.runtime.flight import Flight
from djinn_fx.runtime.launch import LaunchValues
from djinn_fx.runtime.planner import flight_of
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.scarce import memory_for
from djinn_fx.runtime.session import Session
from djinn_fx.runtime.standing import deliver, step_there
from djinn_fx.runtime.steering import Armed
from djinn_fx.runtime.steps import Steering, Step
from djinn_fx.runtime.stop import Stop
from djinn_fx.runtime.tables import BatchRow
from djinn_fx.sites import Site

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine


def arrive(engine: Engine, run: Run, step: Step, site: Site, fired: Sequence[int] = ()) -> Stop:
    """Put a run into the middle of ``step``, stopped after ``site``; ``fired`` as in :attr:`Stop.fired`."""
    engine.bring_back(run.session)
    engine.arena.settle(run.session.row)  # the step may lie in what a checkpoint is still reading
    with memory_for("the step that runs again", "The run does not stand at the stop, but can go on from there"):
        run.flight = execute(engine, run.session, step, site)
        return deliver(engine, run, site, fired)


def rewind(engine: Engine, run: Run, index: int, site: Site) -> Stop:
    """Go back to the step at journal ``index`` (the journal's length: the one in the air)."""
    session = run.session
    engine.bring_back(session)  # first of all: where there is no row for it, nothing is changed
    # Of the step in the air: the place may lie behind the stop.
    step = session.journal[index] if index < len(session.journal) else step_there(engine, run)
    orders = {known.name: known.order for known in engine.table.sites}
    target = step.until(site.order, orders)
    kept, known = max(0, index - run.first_step) + _drawn_first(run), max(run.prompt_end, target.stop)
    start, steering, flight = target.start, target.steering_at(site.order), Flight(target)
    try:
        # No call but the last: an interrupt comes before all of this, or after it.
        session.journal, run.records = session.journal[:index], run.records[:kept]
        session.token_list, session.sampled = session.token_list[:known], session.sampled[:known]
        session.length, session.last_logits, session.steering = start, None, steering
        run.finished, run.finish_reason = False, None
        run.flight = flight  # where memory runs out now, the run goes on from there
        run.stand_at(None)
    except BaseException:
        run.stand_at(None)
        raise
    return arrive(engine, run, target, site)


def _drawn_first(run: Run) -> int:
    """1 if the run's first record is a token drawn from an earlier call's logits, else 0."""
    return int(bool(run.records) and not run.records[0].stepped)


def fork(engine: Engine, stop: Stop, n: int, seeds: Sequence[int] | None) -> list[Stop]:
    """Copy a stopped session ``n`` times, all or none; each copy stands at the same place."""
    run, session = stop.run, stop.session
    run.require_still()
    stop.require_current("fork")
    value = stop.checked_value()
    engine.bring_back(session)
    engine.tiers.make_room(n, (session,))
    rows = engine.arena.take(n)
    try:
        with memory_for("a fork"):
            children = [_child(engine, session, row) for row in rows]
            for row in rows:
                engine.arena.arrive(row)
            engine.arena.copy(session.row, rows, session.extent)
            site = engine.table.get(stop.site)
            made = []
            for index, child in enumerate(children):
                child.inherit(session, session.seed if seeds is None else int(seeds[index]))
                twin = run.twin(child)
                twin.flight = _copy_flight(engine, flight_of(run), child.row)
                child.adopt(twin)
                copied = deliver(engine, twin, site, stop.fired)
                if not stop.untouched:
                    copied.value = value
                made.append(copied)
    except BaseException:
        engine.give_up(rows)
        raise
    return made


def _child(engine: Engine, parent: Session, row: int) -> Session:
    """A session that closes with its parent, on a row that was taken for it."""
    child = Session(engine, row, parent.seed)
    engine.sessions.append(child)
    parent.children.append(child)
    child.parent = parent
    return child


def _copy_flight(engine: Engine, flight: Flight, row: int) -> Flight:
    """The same step in the air for another row; values are shared, since nothing mutates them."""
    copied = replace(flight, drawn=None, answers=None)  # it may have another seed and other breakpoints
    if isinstance(flight.values, LaunchValues):
        flight.values.shared = True
    if flight.chunk is not None:
        chunk = flight.chunk.twin()
        engine.executor.refresh(chunk, BatchRow(row, flight.step))
        copied.chunk = chunk
    return copied


def recompute(engine: Engine, session: Session, armed: Armed) -> None:
    """Run a session's steps again from its first token, as if ``armed`` had always acted.

    Tokens, the user's edits at stops and all other steering stay. A run that stands at a stop stands at a new stop of
    the same place afterwards; a value the user changed there stays changed.
    """
    engine.bring_back(session)
    engine.arena.settle(session.row)
    session.journal, session.last_logits = recomputed(session.journal, armed), None
    run = session.run
    for index, step in enumerate(session.journal):
        flight = execute(engine, session, step, None)
        if run is None:
            continue
        record = index - run.first_step + _drawn_first(run)  # the first token may stem from the step before
        if record >= 0:
            _record_again(run, record, flight)
    if run is None or run.flight is None:
        return
    flight, stop = run.flight, run.stop
    flight.settle()
    (step,) = recomputed([flight.step], armed)
    if stop is None:
        run.flight = Flight(step)
        return
    site = engine.table.get(stop.site)
    value = stop.checked_value()
    changed = not same_bits(value, flight.value(site))
    fresh = arrive(engine, run, step, site, stop.fired)
    fresh.held, fresh.waiting = stop.held, stop.waiting
    if changed:
        fresh.value = value


def _record_again(run: Run, index: int, flight: Flight) -> None:
    """Take a run's captured values and logits of one step from its recomputation."""
    record = run.records[index]
    captured = {site.name: flight.value(site).clone() for site in run.capture if site.name in record.captured}
    logits = record.logits if record.logits is None else flight.logits()[-record.logits.shape[0] :].clone()
    run.records[index] = replace(record, captured=captured, logits=logits)


def with_edit(steering: Mapping[str, Armed], armed: Armed) -> Steering:
    """``steering`` with one more edit in force."""
    return {**steering, armed.edit.site: armed}


def recomputed(steps: Sequence[Step], armed: Armed) -> list[Step]:
    """The same steps, as if an edit had always acted."""
    return [
        replace(step, steering=tuple((after, with_edit(edits, armed)) for after, edits in step.steering))
        for step in steps
    ]
