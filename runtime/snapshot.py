"""Snapshots: a session's state at one moment, apart from its engine and its KV."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from djinn_fx.errors import SessionBusy
from djinn_fx.runtime.breakpoints import ArmedBreakpoint
from djinn_fx.runtime.doubt import Copy, Doubts, Verdict
from djinn_fx.runtime.modes import outside_inference
from djinn_fx.runtime.results import StepRecord
from djinn_fx.runtime.run import Run, RunOptions
from djinn_fx.runtime.steering import Armed
from djinn_fx.runtime.steps import Steering, Step
from djinn_fx.specs import Breakpoint
from djinn_fx.when import CosineAbove, Probe

if TYPE_CHECKING:
    from djinn_fx.runtime.flight import Flight
    from djinn_fx.runtime.session import Session
    from djinn_fx.runtime.stop import Stop


Item = TypeVar("Item")


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


class Frame(NamedTuple):
    """Where a run stood, without the value there: fields of :class:`StopState`.

    Attributes:
        site: as there.
        fired: as there.
        changed: whether the value was changed, where anybody was given it; None: nobody was.
    """

    site: str
    fired: tuple[int, ...]
    changed: Verdict | None


class Snapshot(NamedTuple):
    """A session at one moment, taken without waiting for the device: its parts, put together when somebody asks.

    Attributes:
        session: makes the state, given the run's.
        run: makes the run's, given that of the step in the air; None: no run.
        flight: makes that of the step in the air, given the stop's; None: no such step.
        frame: the stop, if there was one.
    """

    session: Callable[[RunState | None], SessionState]
    run: Callable[[FlightState | None], RunState] | None
    flight: Callable[[StopState | None], FlightState] | None
    frame: Frame | None

    def settled(self, values: torch.Tensor | None) -> SessionState:
        """The whole state; ``values`` are those that :func:`snapshot` gave, on the host."""
        stop, frame = None, self.frame
        if frame is not None and values is not None:
            changed = frame.changed is not None and frame.changed.holds()
            stop = StopState(frame.site, values, changed, frame.fired)
        flight = None if self.flight is None else self.flight(stop)
        return self.session(None if self.run is None else self.run(flight))


def snapshot(session: Session, *, between: bool = False) -> tuple[Snapshot, torch.Tensor | None, Copy | None]:
    """A session as it stands; the caller holds the engine's lock. It waits for nothing.

    Tensors that nothing mutates are shared. With ``between`` it may be driven, if no step of it is in the air.

    Returns:
        the snapshot, and for a stop its value, ``[tokens, *feature_shape]``, contiguous and not written from now on. On
        CUDA, where somebody was given the value, it is the value itself, and the third makes the copy; else it is None.

    Raises:
        SessionBusy: its run is being driven just now.
    """
    run = session.run
    flight = None if run is None else run.flight
    if run is not None and run.driving and run.stop is None and not (between and flight is None):
        raise SessionBusy(
            "cannot checkpoint: a thread is in the middle of a step of this session's run. Wait until the run stops "
            "or pauses; inside a loop over its stops a checkpoint is always possible, in a callback it is not."
        )
    # What changes is noted now; the rest of the work is done when somebody looks at the checkpoint.
    made = partial(
        _session_state,
        session.seed,
        _so_far(session.token_list),
        _so_far(session.sampled),
        session.length,
        session.last_logits,
        session.steering,
        _so_far(session.journal),
    )
    if run is None:
        return Snapshot(made, None, None, None), None, None
    ran = _run_state(run)
    if flight is None:
        return Snapshot(made, ran, None, None), None, None
    flight.settle()
    flown, stop = partial(FlightState, flight.step, flight.passed), run.stop
    if stop is None:
        return Snapshot(made, ran, flown, None), None, None
    lent = stop.lend()
    if lent is not None:
        return Snapshot(made, ran, flown, Frame(stop.site, stop.fired, None)), lent, None
    verdict, value, copy = _doubted(session.engine.doubts, stop, flight)
    return Snapshot(made, ran, flown, Frame(stop.site, stop.fired, verdict)), value, copy


def _doubted(doubts: Doubts, stop: Stop, flight: Flight) -> tuple[Verdict, torch.Tensor, Copy | None]:
    """The value at a stop that somebody was given: whether it was changed, itself, and what copies it."""
    value = stop.fitting()
    if value.is_cuda:
        verdict, copy = doubts.carried(value, flight.memory(stop.place))
        return verdict, value, copy
    with outside_inference():
        own, verdict = doubts.raised(value.detach(), flight.value(stop.place))
    return verdict, own, None


def _so_far(items: list[Item]) -> tuple[list[Item], int]:
    """A list that only grows, as it is now: see :class:`Session`."""
    return items, len(items)


def _then(noted: tuple[list[Item], int]) -> tuple[Item, ...]:
    """What :func:`_so_far` noted."""
    items, count = noted
    return tuple(items[:count])


def _session_state(
    seed: int,
    tokens: tuple[list[int], int],
    sampled: tuple[list[bool], int],
    length: int,
    last_logits: torch.Tensor | None,
    steering: Steering,
    journal: tuple[list[Step], int],
    run: RunState | None,
) -> SessionState:
    return SessionState(seed, _then(tokens), _then(sampled), length, last_logits, steering, _then(journal), run)


def _run_state(run: Run) -> Callable[[FlightState | None], RunState]:
    return partial(
        RunState,
        run.options,
        (run.begin, run.prompt_start, run.prompt_end),
        run.first_step,
        tuple([ArmedBreakpoint(_own(point.spec), point.sites, point.left) for point in run.breakpoints]),
        tuple([site.name for site in run.capture]) if run.capture else (),
        tuple(run.records),
        run.finished,
        run.finish_reason,
        run.stopped_early,
    )


def _own(spec: Breakpoint) -> Breakpoint:
    """A breakpoint whose predicate, if it is one of ours, has tensors of its own: the user may change his."""
    when = spec.when
    if when is None:
        return spec
    if isinstance(when, Probe):
        return replace(spec, when=replace(when, w=when.w.clone()))
    if isinstance(when, CosineAbove):
        return replace(spec, when=replace(when, d=when.d.clone()))
    return spec
