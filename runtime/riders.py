"""Riding along: runs whose next step is in the air already, and that nothing but their own end can interrupt.

Beside a run that stops, others decode that nobody watches. Their next step was launched ahead, so all that is left to
do for them is what history needs: no plan, no flight, no tables. What a step costs the host for each of them decides
whether the device has to wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from djinn_fx.runtime import planner
from djinn_fx.runtime.launch import Launch, Seat
from djinn_fx.runtime.results import StepRecord
from djinn_fx.runtime.steps import Step
from djinn_fx.specs import ProgramShape

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine
    from djinn_fx.runtime.run import Run


@dataclass(frozen=True)
class Riders:
    """Runs that ride in one launch.

    Attributes:
        runs: the runs.
        seats: the seat of each.
        launch: what runs their step; None where nobody rides.
    """

    runs: tuple[Run, ...] = ()
    seats: tuple[Seat, ...] = ()
    launch: Launch | None = None

    @cached_property
    def _riding(self) -> frozenset[int]:
        return frozenset(map(id, self.runs))

    def others(self, runs: Iterable[Run]) -> list[Run]:
        """Those of some runs that do not ride."""
        riding = self._riding
        return [run for run in runs if id(run) not in riding] if riding else list(runs)

    def staying(self, engine: Engine) -> list[Seat]:
        """The seats of those whose step in the air is not their last one, whatever it comes to."""
        options = engine.options
        return [s for run, s in zip(self.runs, self.seats, strict=True) if planner.left(run, options) > 1]


def quiet(run: Run) -> bool:
    """Whether all that anybody wants of a run's next step is its token, and one of its edits cannot begin to act."""
    return (
        run.flight is None
        and run.options.kind == "generate"
        and planner.wants(run) == "token"
        and planner.next_is_decode(run)
        and all(_steady(armed.edit.positions) for armed in run.session.steering.values())
    )


def board(engine: Engine, waiting: Sequence[Run]) -> Riders:
    """The runs that ride in the step in the air, which is taken then; the caller holds the lock.

    Args:
        engine: the engine.
        waiting: all runs that decode now.
    """
    loop = engine.loop
    launch = None if loop is None else loop.launched
    if loop is None or launch is None or not _suits(launch.shape, waiting, engine):
        return Riders()
    runs, seats, rows = [], [], launch.rows
    for run in waiting:
        seat = run.seat
        if seat is None or rows.get(seat.lane) is not seat or not _goes_on(launch, run, seat):
            seat = _seat(launch, run)
        if seat is not None:
            runs.append(run)
            seats.append(seat)
    return Riders(tuple(runs), tuple(seats), loop.board()) if runs else Riders()


def _suits(shape: ProgramShape, waiting: Sequence[Run], engine: Engine) -> bool:
    """Whether the runs that decode now all do so in one launch of this shape."""
    again = [run.flight.step.shape for run in waiting if run.flight is not None]
    fits = len(waiting) <= shape.rows and planner.decode_shape(len(waiting), engine.options) == shape
    return fits and all(each == shape for each in again)


def _seat(launch: Launch, run: Run) -> Seat | None:
    """The seat of a quiet run in a launch that runs just its next step."""
    session = run.session
    seat = launch.seat_of(session.row)
    if seat is None or not quiet(run):
        return None
    step, place = seat.row.step, session.length
    same = step.steering[-1][1] is session.steering and len(step.steering) == 1 and not step.injections
    if not same or seat.start(launch.number) != place or step.last_prompt != planner.last_prompt(run):
        return None
    if launch.fed(seat) != session.token_list[place]:
        return None
    run.seat = seat
    return seat


def _goes_on(launch: Launch, run: Run, seat: Seat) -> bool:
    """Whether a run that rode on a seat before may go on: only what can have changed since is looked at."""
    session, row = run.session, seat.row
    place = session.length
    return (
        run.flight is None
        and (run.silent or not run.breakpoints)
        and run.target is None
        and not run.interrupted
        and session.row == row.arena_row
        and session.steering is row.step.steering[0][1]
        and place == len(session.token_list) - 1
        and place == row.step.start + launch.number - seat.number
        and launch.fed(seat) == session.token_list[place]
    )


def commit(engine: Engine, run: Run, first: Step, token: int) -> bool:
    """Make a quiet run's step, like ``first`` but further on, history; False if it was its last one.

    The caller holds the lock.
    """
    session = run.session
    start = session.length
    over, why = planner.ending(run, token, start + 1, engine.options)
    steps, records = [first.onward(start, session.token_list[start])], [StepRecord(start)]
    # No call until all of it is done: an interrupt comes before, or behind.
    session.journal += steps
    run.records += records
    session.length, session.last_logits = start + 1, None
    session.token_list += [token]
    session.sampled += [True]
    run.finished, run.finish_reason, run.interrupted = over, why, run.interrupted and not over
    return not over


def arrive(engine: Engine, riders: Riders) -> None:
    """Make the riders' step history, and tell their users; waits for the device. The caller holds no lock."""
    if riders.launch is None:
        return
    tokens = riders.launch.tokens()
    with engine.lock:
        for run, seat in zip(riders.runs, riders.seats, strict=True):
            commit(engine, run, seat.row.step, tokens[seat.lane])
    tell(riders.runs)


def tell(runs: Iterable[Run]) -> None:
    """Tell the users of runs of their newest token, all of them; then raise what the first failure was.

    The caller holds no lock.
    """
    failure: BaseException | None = None
    for run in runs:
        if run.options.on_token is not None:
            try:
                run.options.on_token(run.session.token_list[-1])
            except BaseException as error:  # it is its own run's failure alone
                failure = failure or error
    if failure is not None:
        raise failure


def _steady(spec: object) -> bool:
    """Whether positions that an edit speaks of stay the same for all generated tokens."""
    return all(isinstance(word, str) for word in (spec if isinstance(spec, tuple) else (spec,)))
