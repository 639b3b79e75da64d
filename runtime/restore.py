"""Restoring: a fresh session, whose KV is in place, is made what a checkpoint says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from djinn_fx.errors import CapacityError, CheckpointError
from djinn_fx.runtime import moves
from djinn_fx.runtime.bits import same_bits
from djinn_fx.runtime.breakpoints import ArmedBreakpoint
from djinn_fx.runtime.flight import Flight
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.snapshot import SessionState, StopState
from djinn_fx.runtime.steps import Step
from djinn_fx.sites import require_compiled

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine
    from djinn_fx.runtime.session import Session


def require_fit(engine: Engine, state: SessionState) -> None:
    """Raise unless the engine has the sites, the length and the ranks that a session needs."""
    sites = sorted((engine.table.get(name) for name in state.sites()), key=lambda site: site.order)
    for site in sites:
        require_compiled(site, engine.compiled_names)
    positions = len(state.tokens) - bool(state.sampled and state.sampled[-1])  # a last drawn token may wait outside
    if positions > engine.options.max_length:
        raise CapacityError(
            f"the checkpoint holds {positions} positions, but this model was compiled with "
            f"max_length={engine.options.max_length}. Compile with max_length={positions} or more."
        )
    ranks = [armed.rank.read.shape[0] for armed in state.edits() if armed.rank is not None]
    if max(ranks, default=0) > engine.options.edit_rank:
        raise CapacityError(
            f"the checkpoint holds an edit of {max(ranks)} directions, but this model was compiled with "
            f"edit_rank={engine.options.edit_rank}. Compile with edit_rank={max(ranks)} or more."
        )


def fill(session: Session, state: SessionState, more: Sequence[ArmedBreakpoint], exact: bool) -> None:
    """Give a fresh session, whose KV is in place, everything else."""
    session.token_list, session.sampled = list(state.tokens), list(state.sampled)
    session.length, session.last_logits = state.length, state.last_logits
    session.steering, session.journal = state.steering, list(state.journal)
    saved = state.run
    if saved is None:
        return
    engine = session.engine
    capture = [engine.table.get(name) for name in saved.capture]
    run = Run(session, saved.options, saved.span, [*saved.breakpoints, *more], capture)
    run.first_step, run.records = saved.first_step, list(saved.records)
    run.finished, run.finish_reason = saved.finished, saved.finish_reason
    run.stopped_early = saved.stopped_early
    session.adopt(run)
    if saved.flight is None:
        return
    if saved.flight.stop is None:
        run.flight = Flight(saved.flight.step, saved.flight.passed)
    else:
        _stand(run, saved.flight.step, saved.flight.stop, exact)


def _stand(run: Run, step: Step, saved: StopState, exact: bool) -> None:
    """Run a step again up to the site where the run stood, and let it stand there."""
    engine = run.session.engine
    stop = moves.arrive(engine, run, step, engine.table.get(saved.site), saved.fired)
    if saved.changed:
        stop.value = saved.value
    elif exact and not same_bits(stop.content, saved.value):
        raise CheckpointError(
            f"the step in which this checkpoint was taken gives other bits here at {saved.site!r}, although model and "
            "environment are the same on paper. Were weights changed in place since? Pass exact=False to accept "
            "other bits."
        )
