"""Snapshots: a session's state at one moment, apart from its engine and its KV."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from djinn_fx.errors import SessionBusy
from djinn_fx.runtime.bits import same_bits
from djinn_fx.runtime.breakpoints import ArmedBreakpoint
from djinn_fx.runtime.modes import outside_inference
from djinn_fx.runtime.results import StepRecord
from djinn_fx.runtime.run import Run, RunOptions
from djinn_fx.runtime.steering import Armed
from djinn_fx.runtime.steps import Steering, Step
from djinn_fx.specs import Breakpoint
from djinn_fx.when import CosineAbove, Probe

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


@dataclass(frozen=True, eq=False)
class Frame:
    """Where a run stood, without the value there: fields of :class:`StopState`."""

    site: str
    fired: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A session at one moment, taken without waiting for the device.

    Attributes:
        state: its state; a step in the air lacks its stop.
        frame: that stop, if there was one.
    """

    state: SessionState
    frame: Frame | None

    def settled(self, values: torch.Tensor | None) -> SessionState:
        """The whole state; ``values`` are those that :func:`snapshot` gave, on the host."""
        run = self.state.run
        if self.frame is None or values is None or run is None or run.flight is None:
            return self.state
        touched = len(values) == 2 and not same_bits(*values)
        stop = StopState(self.frame.site, values[0], touched, self.frame.fired)
        return replace(self.state, run=replace(run, flight=replace(run.flight, stop=stop)))


def snapshot(session: Session, *, between: bool = False) -> tuple[Snapshot, torch.Tensor | None]:
    """A session as it stands; the caller holds the engine's lock. It enqueues one copy and waits for nothing.

    Tensors that nothing mutates are shared. With ``between`` it may be driven, if no step of it is in the air.

    Returns:
        the snapshot, and for a stop its value and what the step had left there, ``[2, tokens, *feature_shape]``, the
        latter alone, ``[1, ...]``, where nobody had asked for the value: a copy, on the device.

    Raises:
        SessionBusy: its run is being driven just now.
    """
    run = session.run
    if run is not None and run.driving and run.stop is None and not (between and run.flight is None):
        raise SessionBusy(
            "cannot checkpoint: a thread is in the middle of a step of this session's run. Wait until the run stops "
            "or pauses; inside a loop over its stops a checkpoint is always possible, in a callback it is not."
        )
    if run is not None and run.flight is not None:
        run.flight.settle()
    state = SessionState(
        seed=session.seed,
        tokens=tuple(session.token_list),
        sampled=tuple(session.sampled),
        length=session.length,
        last_logits=session.last_logits,
        steering=session.steering,
        journal=tuple(session.journal),
        run=None if run is None else _run_state(run),
    )
    if run is None or run.flight is None or run.stop is None:
        return Snapshot(state, None), None
    stop, before = run.stop, run.flight.value(run.stop.place)
    with outside_inference():
        if stop.untouched:
            values = before.clone(memory_format=torch.contiguous_format)[None]
        else:
            values = torch.stack((stop.checked_value(), before))
    return Snapshot(state, Frame(stop.site, stop.fired)), values


def _run_state(run: Run) -> RunState:
    return RunState(
        options=run.options,
        span=(run.begin, run.prompt_start, run.prompt_end),
        first_step=run.first_step,
        breakpoints=tuple(ArmedBreakpoint(_own(point.spec), point.sites, point.left) for point in run.breakpoints),
        capture=tuple(site.name for site in run.capture),
        records=tuple(run.records),
        finished=run.finished,
        finish_reason=run.finish_reason,
        stopped_early=run.stopped_early,
        flight=None if run.flight is None else FlightState(run.flight.step, run.flight.passed, None),
    )


def _own(spec: Breakpoint) -> Breakpoint:
    """A breakpoint whose predicate, if it is one of ours, has tensors of its own: the user may change his."""
    when = spec.when
    if isinstance(when, Probe):
        return replace(spec, when=replace(when, w=when.w.clone()))
    if isinstance(when, CosineAbove):
        return replace(spec, when=replace(when, d=when.d.clone()))
    return spec
