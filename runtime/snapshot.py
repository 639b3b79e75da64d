"""Snapshots: a session's state at one moment, apart from its engine and its KV."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from djinn_fx.errors import SessionBusy
from djinn_fx.runtime.breakpoints import ArmedBreakpoint
from djinn_fx.runtime.flight import Flight, same_bits
from djinn_fx.runtime.results import StepRecord
from djinn_fx.runtime.run import Run, RunOptions
from djinn_fx.runtime.steering import Armed
from djinn_fx.runtime.steps import Steering, Step

if TYPE_CHECKING:
    from djinn_fx.runtime.session import Session


@dataclass(frozen=True, eq=False)
class StopState:
    """Where a run stood.

    Attributes:
        site: the site after which it stood.
        value: the stop's value then, ``[tokens, *feature_shape]``.
        changed: whether the user had changed it.
        fired: positions where a breakpoint had held.
    """

    site: str
    value: torch.Tensor
    changed: bool
    fired: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class FlightState:
    """A step that was in the air; ``passed`` and ``stop`` say how far its run had come in it."""

    step: Step
    passed: int
    stop: StopState | None


@dataclass(frozen=True, eq=False)
class RunState:
    """A run's fields, without its callback."""

    options: RunOptions
    span: tuple[int, int, int]
    first_step: int
    breakpoints: tuple[ArmedBreakpoint, ...]
    capture: tuple[str, ...]
    records: tuple[StepRecord, ...]
    finished: bool
    finish_reason: str | None
    stopped_early: bool
    flight: FlightState | None


@dataclass(frozen=True, eq=False)
class SessionState:
    """A session's fields, and those of its newest run."""

    seed: int
    tokens: tuple[int, ...]
    sampled: tuple[bool, ...]
    length: int
    last_logits: torch.Tensor | None
    steering: Steering
    journal: tuple[Step, ...]
    run: RunState | None

    def steps(self) -> Iterable[Step]:
        """Every step, the one in the air last."""
        yield from self.journal
        if self.run is not None and self.run.flight is not None:
            yield self.run.flight.step

    def edits(self) -> Iterable[Armed]:
        """Every edit in force now or in some step; one in force in many steps comes many times."""
        yield from self.steering.values()
        for step in self.steps():
            for _, edits in step.steering:
                yield from edits.values()

    def sites(self) -> set[str]:
        """Every site at which something of this session acts, stops or is kept."""
        found = {armed.edit.site for armed in self.edits()}
        for step in self.steps():
            found.update(step.injections)
        if self.run is not None:
            found.update(self.run.capture)
            for point in self.run.breakpoints:
                found.update(point.sites)
            if self.run.flight is not None and self.run.flight.stop is not None:
                found.add(self.run.flight.stop.site)
        return found


def snapshot(session: Session) -> SessionState:
    """The state of a session; the caller holds the engine's lock.

    Tensors that nothing mutates are shared, a stop's value is copied.

    Raises:
        SessionBusy: its run is being driven just now.
    """
    run = session.run
    if run is not None and run.driving and run.stop is None:
        raise SessionBusy(
            "cannot checkpoint: a thread is in the middle of a step of this session's run. Wait until the run stops "
            "or pauses; inside a loop over its stops a checkpoint is always possible, in a callback it is not."
        )
    return SessionState(
        seed=session.seed,
        tokens=tuple(session.token_list),
        sampled=tuple(session.sampled),
        length=session.length,
        last_logits=session.last_logits,
        steering=session.steering,
        journal=tuple(session.journal),
        run=None if run is None else _run_state(run),
    )


def _run_state(run: Run) -> RunState:
    return RunState(
        options=run.options,
        span=(run.begin, run.prompt_start, run.prompt_end),
        first_step=run.first_step,
        breakpoints=tuple(run.breakpoints),
        capture=tuple(site.name for site in run.capture),
        records=tuple(run.records),
        finished=run.finished,
        finish_reason=run.finish_reason,
        stopped_early=run.stopped_early,
        flight=None if run.flight is None else _flight_state(run, run.flight),
    )


def _flight_state(run: Run, flight: Flight) -> FlightState:
    stop = run.stop
    if stop is None:
        return FlightState(flight.step, flight.passed, None)
    site = run.session.engine.table.get(stop.site)
    value = stop.checked_value()
    changed = not same_bits(value, flight.value(site))
    state = StopState(site.name, value.clone(), changed, stop.fired)
    return FlightState(flight.step, flight.passed, state)
