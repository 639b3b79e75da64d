"""The driver: brings runs to their next stop, one batched step at a time.

Everything that touches the arena or a session's state happens under the engine's lock; predicates and callbacks of the
user run outside it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from djinn_fx.runtime import asking, cruise, planner, riders
from djinn_fx.runtime.claims import confirm, vouch
from djinn_fx.runtime.flight import Flight
from djinn_fx.runtime.modes import outside_inference, without_grad
from djinn_fx.runtime.results import StepRecord
from djinn_fx.runtime.riders import Riders
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.sampling import sample
from djinn_fx.runtime.standing import deliver, go_on, leave
from djinn_fx.runtime.steps import Step
from djinn_fx.runtime.stop import Stop
from djinn_fx.runtime.tables import BatchRow
from djinn_fx.sites import Site

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine
    from djinn_fx.runtime.session import Session


def iterate(engine: Engine, runs: Sequence[Run]) -> list[Stop]:
    """Bring every run to its next stop, or one step further; returns the stops, in order.

    Raises:
        SessionBusy: one of them is being driven already.
        CaptureError: the model's weights were moved or replaced before one of them began.
        InvalidPredicate: a predicate failed; its run stays where it was.
        InvalidValue: a stop's value was given another shape or dtype through ``.data``; every run stays where it was.
    """
    # Entered and left by one instruction each: an interrupt cannot leave the runs driven for ever.
    with (held := threading.Lock()), outside_inference():
        _drive(engine, runs, held)
        try:
            return _iterate(engine, runs)
        finally:
            now = time.monotonic()
            for run in runs:
                run.session.paused_at = now


def _iterate(engine: Engine, runs: Sequence[Run]) -> list[Stop]:
    """:func:`iterate` for a thread that drives the runs."""
    again = [list(runs)] if len(runs) == 1 and go_on(engine, runs[0]) else _come_and_leave(engine, runs)
    asking.ask(engine, again)
    for run in runs:
        if run.flight is None and run.session.length == len(run.session.token_list):
            _draw_first(engine, run)
    stops = {id(run): _seek(engine, run, runs) for run in runs if run.flight is not None}
    moving = [run for run in runs if not run.finished and not stops.get(id(run))]
    with engine.lock:
        cruising = len(moving) == len(runs) and cruise.fits(engine, moving)
    if cruising:
        cruise.cruise(engine, moving)
        return []
    with engine.lock:
        groups, riding = _launch(engine, moving)
    asking.ask(engine, groups)
    others = riding.others(moving)
    with engine.lock:
        asking.draw_together(engine, groups)
        _look_ahead(engine, others, groups, riding)
    riders.arrive(engine, riding)
    for run in others:
        stops[id(run)] = _seek(engine, run, runs)
    return [stop for run in runs if (stop := stops.get(id(run))) is not None]


def _come_and_leave(engine: Engine, runs: Sequence[Run]) -> list[list[Run]]:
    """Bring runs back, let them leave their stops, and run again what has to; returns the decode groups of that."""
    vouch(engine, runs)
    engine.tiers.roomy(partial(_come, engine, runs), runs)
    _await_rows(engine, runs)
    with engine.lock:
        for run in runs:
            if run.flight is not None:
                leave(engine, run, run.flight)
        return _run_again(engine, runs)


def _await_rows(engine: Engine, runs: Sequence[Run]) -> None:
    """Wait for KV that is on its way into these runs' rows; the caller holds no lock."""
    arena = engine.arena
    if arena.still:
        return
    for run in runs:
        arriving = arena.on_the_way(run.session.row)
        if arriving is not None:
            arriving.synchronize()  # the host waits, without the lock: the device's steps for others shall not
    with engine.lock:
        for run in runs:
            arena.arrive(run.session.row)


def _come(engine: Engine, runs: Sequence[Run]) -> None:
    """Begin to bring every session back that is away."""
    for run in runs:
        if run.session.closed:
            run.session.require_open()
        stop = run.stop
        if stop is not None:
            stop.checked_value()
    engine.tiers.bring_back(*(run.session for run in runs))


def _drive(engine: Engine, runs: Sequence[Run], held: threading.Lock) -> None:
    """Let this thread drive some runs for as long as ``held`` is locked."""
    with engine.lock:
        for run in runs:
            if run.driver is not None or run.owner is not None:
                run.require_still()
        for run in runs:
            run.drive(held)


@without_grad
def _run_again(engine: Engine, runs: Sequence[Run]) -> list[list[Run]]:
    """Where one run is driven alone and its decode step has to run again, run it at once, before all else is looked at.

    Many are batched with what others decode, by :func:`_launch`.

    Returns:
        the decode group, if there was one.
    """
    run = runs[0]
    flight = run.flight
    if len(runs) > 1 or flight is None or flight.values is not None or not flight.step.decodes:
        return []
    (flight.values,) = engine.executor.decode([planner.batch_row(run)])
    flight.answers = flight.drawn = None
    return [[run]]


@without_grad
def _launch(engine: Engine, runs: Sequence[Run]) -> tuple[list[list[Run]], Riders]:
    """Begin the next step of each run and execute what is to be decoded, batched.

    Returns:
        the decode groups, and those that ride along in the step in the air.
    """
    waiting = [run for run in runs if _decodes(run)]
    riding, executor = riders.board(engine, waiting), engine.executor
    groups = list(planner.decode_groups(riding.others(waiting), len(riding.runs), engine.options))
    for group in groups:
        batch = [planner.batch_row(run) for run in group]
        for run, values in zip(group, executor.decode(batch, riding.launch), strict=True):
            launched = planner.flight_of(run)
            launched.values, launched.answers, launched.drawn = values, None, None
    for run in riding.others(runs):
        flight = run.flight or Flight(planner.next_chunk(run, engine.options))
        begins = not flight.step.decodes and flight.chunk is None
        if begins:
            wanted = [site.name for site in run.capture]
            flight.chunk = executor.begin(BatchRow(run.session.row, flight.step), wanted)
        run.flight = flight  # not before: a run that is refused stays where it was
        if begins and waiting and executor.loop is not None:
            break  # one chunk between two decode steps: nobody who decodes shall wait for all prompts
    return groups, riding


def _decodes(run: Run) -> bool:
    """Whether a run's next step is a decode step, or one in the air that has to be executed."""
    if run.flight is None:
        return planner.next_is_decode(run)
    return run.flight.step.decodes and run.flight.values is None


def _look_ahead(engine: Engine, others: Sequence[Run], groups: Sequence[Sequence[Run]], riding: Riders) -> None:
    """Launch the next decode step before this one's tokens are known, where it is known what it will be."""
    loop = engine.loop
    if loop is None or len(groups) > 1 or not (groups or riding.runs):
        return
    group = groups[0] if groups else []
    decoding = set(map(id, group))
    joining = sum(1 for run in others if id(run) not in decoding and planner.joins(run))
    going, staying = planner.going(group, engine.options), riding.staying(engine)
    shape = planner.decode_shape(len(going) + joining + len(staying), engine.options)
    if riding.launch is not None and riding.launch.shape != shape:
        return
    rows = planner.following(going, shape, engine.sites)
    if rows is not None:
        loop.look_ahead(rows, staying)


def _seek(engine: Engine, run: Run, runs: Sequence[Run]) -> Stop | None:
    """Look at the sites ahead in the step in the air of one of the runs: stop at the first hit, else commit.

    The first one to launch a chunk has the weights confirmed for all of them.
    """
    flight = run.flight
    if flight is None or (flight.values is None and flight.chunk is None):
        return None
    sure = run.target is None and not run.halting and flight.passes
    ahead = [] if sure else planner.watched(run, flight, flight.sites(engine.sites))
    for site in ahead:
        if not _reach(engine, run, flight, site):
            return None
        if not run.vouched:
            confirm(engine, runs)
        fired = planner.fired(run, flight, site, partial(asking.values_at, engine, flight, site))
        if fired is not None:
            return deliver(engine, run, site, fired, alone=len(runs) == 1, waiting=True)
        flight.passed = site.order
    if flight.chunk is not None:
        with engine.lock:
            engine.executor.advance(flight.chunk, None)
    if not run.vouched:
        confirm(engine, runs)
    _announce(run, _commit(engine, run, flight))
    return None


@without_grad
def execute(engine: Engine, session: Session, step: Step, until: Site | None) -> Flight:
    """Execute a step of a session alone, in its own program shape: whole, or up to ``until``.

    The caller holds the lock; the KV before ``step.start`` is what the step saw the first time, so the bits are too.
    """
    flight, row = Flight(step), BatchRow(session.row, step)
    if step.decodes:
        flight.values = engine.executor.decode_one(row)
    else:
        flight.chunk = engine.executor.begin(row)
        engine.executor.advance(flight.chunk, None if until is None else until.name)
    return flight


def _draw_first(engine: Engine, run: Run) -> None:
    """Draw a run's first token from what an earlier call left, if it gave no tokens and all are forwarded."""
    session, token = run.session, None
    with engine.lock:
        if run.finished:
            return  # another run's on_token ended it
        if run.flight is None and session.length == len(session.token_list):
            logits = session.last_logits
            if logits is None:
                logits = execute(engine, session, session.journal[-1], None).logits()[-1].clone()
            kept = logits[None] if run.options.output_logits else None
            drawn = _drawn(run, logits[None], session.length)
            records, token = [StepRecord(session.length, logits=kept, stepped=False)], drawn
            over, why = planner.ending(run, token, session.length, engine.options)
            # No call until all of it is done: an interrupt comes before, or behind.
            run.records += records
            session.token_list += [token]
            session.sampled += [True]
            run.finished, run.finish_reason, run.interrupted = over, why, run.interrupted and not over
    _announce(run, token)


def _announce(run: Run, token: int | None) -> None:
    """Tell the user of a new token; the caller holds no lock."""
    if token is not None and run.options.on_token is not None:
        run.options.on_token(token)


def _reach(engine: Engine, run: Run, flight: Flight, site: Site) -> bool:
    """Compute up to ``site``; False if the step has to be executed again for it first."""
    if flight.chunk is not None:
        with engine.lock:
            engine.executor.advance(flight.chunk, site.name)
        return True
    if flight.values is not None and not flight.values.has(site):
        flight.values = None
        return False
    return True


def _commit(engine: Engine, run: Run, flight: Flight) -> int | None:
    """Make the step in the air part of the session's history; returns a newly drawn token.

    What may fail comes first: the step is part of it as a whole or not at all.
    """
    with engine.lock:
        session, options = run.session, run.options
        ends = flight.step.stop == len(session.token_list)
        record = _recorded(engine, run, flight, ends=ends)
        last = flight.logits()[-1].clone() if options.kind == "forward" else None
        known = None
        if ends and options.kind == "generate":  # waits for the device, so all else comes first
            known = flight.drawn if options.sampling.do_sample else flight.token
            if known is None:
                known = _drawn(run, flight.logits()[-1:], flight.step.stop)
        flight.settle()  # only now: by here the device has answered
        step, drawn = flight.step, [] if known is None else [known]
        end, sampled, over, why = step.stop, [True] * len(drawn), False, None
        if ends:
            over, why = planner.ending(run, known, end, engine.options)
        # No call until all of it is done: an interrupt comes before, or behind.
        session.journal += [step]
        run.records += [record]
        session.length, session.last_logits, run.flight = end, last, None
        session.token_list += drawn
        session.sampled += sampled
        run.finished, run.finish_reason, run.interrupted = over, why, run.interrupted and not over
        return known


def _recorded(engine: Engine, run: Run, flight: Flight, *, ends: bool) -> StepRecord:
    """What a step gave its run."""
    record = StepRecord(flight.step.start)
    part = len(run.capture) / max(1, len(engine.sites))
    record.captured = flight.own(run.capture, part) if run.capture else {}
    if run.options.kind == "forward":
        skip = max(0, run.prompt_start - flight.step.start)
        record.logits = flight.logits()[skip:].clone()
    elif ends and run.options.output_logits:
        record.logits = flight.logits()[-1:].clone()
    return record


@without_grad
def _drawn(run: Run, logits: torch.Tensor, length: int) -> int:
    """The token that follows ``length`` positions, by logits ``[1, vocab]``."""
    seeds = torch.tensor([run.session.seed], dtype=torch.int64)
    place = torch.tensor([length], dtype=torch.int64)
    return int(sample(logits, run.options.sampling, seeds, place))
