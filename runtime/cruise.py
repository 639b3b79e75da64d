"""Cruising: many decode steps in a row of runs that nothing but their own end can interrupt.

Where nobody watches a site, wants logits or draws tokens on the host, a step needs nothing from the host but that it is
launched. Some steps are kept in flight, and what is done per token is what history needs. A token that ends its run
makes the steps in flight behind it worthless to that run, and to no other; what they wrote lies behind its length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from djinn_fx.runtime import planner, riders
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
    loop = engine.loop
    if loop is None or not runs or len(runs) > engine.options.max_bucket:
        return False
    return all(riders.quiet(run) and planner.left(run, engine.options) > 1 for run in runs)


def cruise(engine: Engine, runs: Sequence[Run]) -> None:
    """Decode until the first run ends, or something else happens to one of them."""
    loop = engine.loop
    assert loop is not None
    shape = planner.decode_shape(len(runs), engine.options)
    with engine.lock:
        steps = [planner.make_step(run, run.session.length, run.session.length + 1, shape) for run in runs]
        rows = [BatchRow(run.session.row, step, "token") for run, step in zip(runs, steps, strict=True)]
        first, lanes = loop.launch_for(rows)
        flying = deque([first])
        left = min(planner.left(run, engine.options) for run in runs) - 1
    steering = [run.session.steering for run in runs]
    going = [True] * len(runs)
    while flying:
        with engine.lock:
            left = _launch_more(loop, flying, left if all(going) else 0)
        tokens = flying.popleft().tokens()  # the device is waited for without the lock, which others want too
        with engine.lock:
            if any(run.halting or run.session.steering is not now for run, now in zip(runs, steering, strict=True)):
                return
            moved = [run for run, goes in zip(runs, going, strict=True) if goes]
            for index, run in enumerate(runs):
                if going[index]:
                    going[index] = riders.commit(engine, run, steps[index], tokens[lanes[index]])
        riders.tell(moved)
        going = [goes and not run.finished for run, goes in zip(runs, going, strict=True)]
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
