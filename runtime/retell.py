"""A session as it stands, told as steps that may run again elsewhere: for whoever looks at it and changes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from djinn_fx.errors import InvalidValue
from djinn_fx.runtime.inputs import PromptBatch
from djinn_fx.runtime.planner import make_step
from djinn_fx.runtime.programs import chunk_size
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.steps import Step
from djinn_fx.specs import ProgramShape

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine
    from djinn_fx.runtime.session import Session
    from djinn_fx.runtime.stop import Stop


def retold(engine: Engine, session: Session) -> PromptBatch:
    """A session's tokens, and the steps in which it computed them or would, if it went on now.

    These are its journal, with every edit and every steering as it acted; the step in the air, with the value at the
    stop and the steering of this moment; then what is not forwarded yet, such as the last token of a finished run.
    Each runs alone, and all its positions are kept.

    Raises:
        InvalidValue: another model's session, or one without tokens.
        SessionClosed: it was closed.
        SessionBusy: another thread is driving its run.
    """
    if session.engine is not engine:
        raise InvalidValue("the session belongs to another compiled model; ask its own.")
    with engine.lock:
        session.require_open()
        session.require_still()
        run = session.run
        tokens = session.token_list[: engine.options.max_length]
        if run is None or not tokens:
            raise InvalidValue("the session holds no tokens yet; begin a run first.")
        steps = [*session.journal, *_in_the_air(run)]
        steps += _ahead(run, steps[-1].stop if steps else 0, len(tokens))
    return PromptBatch([tokens], None, len(tokens), tuple(map(_alone, steps)))


def retold_step(engine: Engine, stop: Stop) -> PromptBatch:
    """The step in which a run stands at a stop, as :func:`retold` has it, after the session's own keys and values.

    Raises:
        InvalidValue: another model's stop.
        StaleStop: the run went on from here.
        CapacityError: the session is off the device and there is no row for it.
    """
    session = stop.session
    if session.engine is not engine:
        raise InvalidValue("the stop belongs to another compiled model; ask its own.")

    def take() -> PromptBatch:
        stop.require_current("look at its step")
        session.require_still()
        engine.bring_back(session)
        (step,) = map(_alone, _in_the_air(stop.run))
        row, start = session.row, step.start
        kept = [(keys[row, :, :start].clone(), values[row, :, :start].clone()) for keys, values in engine.arena.layers]
        count = len(step.tokens)
        return PromptBatch([list(step.tokens)], None, count, (step,), kept)

    return engine.tiers.roomy(take)


def _in_the_air(run: Run) -> list[Step]:
    flight, stop = run.flight, run.stop
    if flight is None:
        return []
    flight.settle()
    step = flight.step
    if stop is not None:
        step = step.edited(stop.site, stop.checked_value().clone())
    if step.steering[-1][1] is not run.session.steering:
        step = step.steered(flight.reached, run.session.steering)
    return [step]


def _ahead(run: Run, start: int, end: int) -> list[Step]:
    options, steps = run.session.engine.options, []
    while start < end:
        stop = min(start + options.prefill_chunk, end)
        alone = stop - start == 1 and run.session.sampled[start]
        query = 1 if alone else chunk_size(stop - start, options.prefill_chunk, options.chunk_step)
        steps.append(make_step(run, start, stop, ProgramShape(1, query, query)))
        start = stop
    return steps


def _alone(step: Step) -> Step:
    query = step.shape.query
    return replace(step, shape=ProgramShape(1, query, query))
