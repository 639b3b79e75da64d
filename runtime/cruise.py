"""Cruising: many decode steps in a row of runs that nothing but their own end can interrupt.

Where nobody watches a site, wants logits or draws tokens on the host, a step needs nothing from the host but that it is
launched. Some steps are kept in flight, and what is done per token is what history needs. A token that ends its run
makes the steps in flight behind it worthless to that run, and to no other; what they wrote lies behind its length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from djinn_fx.runtime import planner
from djinn_fx.runtime.results import StepRecord
from djinn_fx.runtime.steps import Step
from djinn_fx.runtime.tables import BatchRow

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine
    from djinn_fx.runtime.launch import Launch
    from djinn_fx.runtime.loop import DecodeLoop
    from djinn_fx.runtime.run import Run

#: Steps in flight.
DEPTH = 3


def fits(engine: Engine, runs: Sequence[Run]) -> bool:
    """Whether these runs may cruise together; the caller holds the lock."""
    loop = engine.executor.loop
    if loop is None or not runs or len(runs) > engine.options.max_bucket:
        return False
    return all(
        run.flight is None
        and run.options.kind == "generate"
        and planner.next_is_decode(run)
        and planner.wants(run) == "token"
        and planner.left(run, engine.options) > 1
        and all(_steady(armed.edit.positions) for armed in run.session.steering.values())
        for run in runs
    )


def cruise(engine: Engine, runs: Sequence[Run]) -> None:
    """Decode until the first run ends, or something else happens to one of them."""
    loop = engine.executor.loop
    assert loop is not None
    shape = planner.decode_shape(len(runs), engine.options)
    with engine.lock:
        steps = [planner.make_step(run, run.session.length, run.session.length + 1, shape) for run in runs]
        rows = [BatchRow(run.session.row, step, "token") for run, step in zip(runs, steps, strict=True)]
        flying = deque([loop.launch_for(rows)])
        lanes = [loop.lane_of(row) for row in rows]
        left = min(planner.left(run, engine.options) for run in runs) - 1
    steering = [run.session.steering for run in runs]
    going = [True] * len(runs)
    while flying:
        with engine.lock:
            if any(run.halting or run.session.steering is not now for run, now in zip(runs, steering, strict=True)):
                return
            left = _launch_more(loop, flying, left if all(going) else 0)
            tokens = flying.popleft().tokens()
            for index, run in enumerate(runs):
                if going[index]:
                    going[index] = _commit(engine, run, steps[index], tokens[lanes[index]])
        for index, run in enumerate(runs):
            if run.options.on_token is not None and (going[index] or run.finished):
                going[index] = _tell(run) and going[index]
        if not any(going):
            return


def _launch_more(loop: DecodeLoop, flying: deque[Launch], left: int) -> int:
    """Keep some steps in flight, as long as nobody else used the loop; returns how many are left."""
    while left and flying and len(flying) < DEPTH:
        following = loop.repeat(flying[-1])
        if following is None:
            return 0
        flying.append(following)
        left -= 1
    return left


def _commit(engine: Engine, run: Run, first: Step, token: int) -> bool:
    """Make one step of a run history; False if it was its last one."""
    session = run.session
    start = session.length
    step = Step(start, (session.token_list[start],), (True,), first.last_prompt, first.shape, first.steering)
    session.journal.append(step)
    run.records.append(StepRecord(start))
    session.length, session.last_logits = start + 1, None
    session.token_list.append(token)
    session.sampled.append(True)
    planner.conclude(run, token, engine.options)
    return not run.finished


def _tell(run: Run) -> bool:
    """Tell the user of a new token; False if that ended the run. The caller holds no lock."""
    assert run.options.on_token is not None
    run.options.on_token(run.session.token_list[-1])
    return not run.finished


def _steady(spec: object) -> bool:
    """Whether positions that an edit speaks of stay the same for all generated tokens."""
    return all(isinstance(word, str) for word in (spec if isinstance(spec, tuple) else (spec,)))
