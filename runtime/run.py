"""Runs: one forward or generate call of a session, an iterator of stops."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch

from djinn_fx.errors import InvalidValue, SessionBusy, SessionClosed
from djinn_fx.notebook import Shown
from djinn_fx.runtime import showing
from djinn_fx.runtime.breakpoints import ArmedBreakpoint
from djinn_fx.runtime.captured import joined
from djinn_fx.runtime.claims import claimed, quiet
from djinn_fx.runtime.flight import Flight
from djinn_fx.runtime.results import Cache, Result, StepRecord
from djinn_fx.runtime.sampling import SamplingSpec
from djinn_fx.sites import Site, require_compiled
from djinn_fx.views import View

if TYPE_CHECKING:
    from djinn_fx.runtime.launch import Seat
    from djinn_fx.runtime.session import Session
    from djinn_fx.runtime.stop import Stop


@dataclass(frozen=True)
class RunOptions:
    """What a call asked for, apart from its sites.

    Attributes:
        kind: ``"forward"`` or ``"generate"``.
        max_new_tokens: tokens to generate at most.
        sampling: how tokens are drawn.
        stop_token_ids: tokens that end the run beside EOS.
        on_token: called with each new token.
        output_logits: whether the result keeps the new tokens' logits.
    """

    kind: Literal["forward", "generate"]
    max_new_tokens: int = 0
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    stop_token_ids: frozenset[int] = frozenset()
    on_token: Callable[[int], object] | None = None
    output_logits: bool = False


@dataclass(frozen=True)
class Target:
    """Where ``stop.step`` goes: the first site with ``order`` or later, from journal index ``step`` on."""

    step: int
    order: int


class Run(Shown):
    """One call, lazily executed. Iterating it yields stops; advancing resumes.

    A run that is not advanced is paused. Leaving the loop leaves it stopped; iterating again goes on.

    Attributes:
        session: the session it belongs to.
        options: what the call asked for.
        begin: session position of the first token it forwards; the prompt's chunk grid starts there.
        prompt_start: index of the first token that the call itself gave.
        prompt_end: index after the last token that the call gave.
    """

    def __init__(
        self,
        session: Session,
        options: RunOptions,
        span: tuple[int, int, int],
        breakpoints: Sequence[ArmedBreakpoint] = (),
        capture: Sequence[Site] = (),
    ) -> None:
        self.session, self.options = session, options
        self.begin, self.prompt_start, self.prompt_end = span
        self.breakpoints, self.capture = list(breakpoints), tuple(capture)
        self.first_step = len(session.journal)
        self.records: list[StepRecord] = []
        self.flight: Flight | None = None
        self.target: Target | None = None
        self.silent = False
        self.interrupted = False
        self.finish_reason: str | None = None
        self.finished = False
        self.end: int | None = None  # where the next call's tokens begin
        self._driven: tuple[int, threading.Lock] | None = None  # by which thread, for as long as that is locked
        self.stopped_early = False
        self.vouched = False  # whether the model's weights were looked at before its first step
        self.owner: int | None = None
        self.seat: Seat | None = None  # on which it rode along last
        self._stop: Stop | None = None

    # -- iteration -----------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Stop]:
        return self

    def __next__(self) -> Stop:
        stop = self._go()
        if stop is None:
            raise StopIteration
        return stop

    def _go(self) -> Stop | None:
        """Go on to the next stop; None at the end. No other thread may drive the run meanwhile."""
        with claimed([self]):
            self.require_alive()
            stop = self._stop
            if stop is not None and stop.waiting and not self.silent and self.target is None:
                return stop.handed_out()
            while not self.finished:
                stops = self.session.engine.iterate([self])
                if stops:
                    return stops[0].handed_out()
            return None

    def result(self) -> Result:
        """Go on to the end without stopping again, and return the outcome.

        Raises:
            SessionClosed: the session was closed or the run abandoned.
            SessionBusy: it is being driven already.
        """
        self.run_to_end()
        return self.session.engine.result_of(self)

    def run_to_end(self) -> None:
        """Go on to the end without stopping again."""
        with self.quiet():
            self._go()

    def quiet(self) -> AbstractContextManager[None]:
        """A context in which the run passes over its breakpoints."""
        return quiet([self])

    def interrupt(self) -> None:
        """Ask the run to stop at the next compiled site that it comes to; callable from any thread and signal handler.

        It returns at once and takes no lock. Who drives the run gets the stop, as that of a breakpoint; nothing of the
        run is lost. A run that nobody drives stops so when it is next advanced. :meth:`result` and its like, which
        pass over breakpoints, pass over this too.
        """
        self.interrupted = True

    @property
    def halting(self) -> bool:
        """Whether it was asked to stop and will."""
        return self.interrupted and not self.silent

    # -- state ---------------------------------------------------------------------------------

    @property
    def stop(self) -> Stop | None:
        """Where the run stands now, or None if it does not stand at a stop."""
        return self._stop

    def stand_at(self, stop: Stop | None) -> None:
        """Record where the run stands; earlier stops become stale."""
        if self._stop is not None:
            self._stop.left()
        self._stop = stop

    def come_to(self, stop: Stop, flight: Flight) -> None:
        """Record that the run came to a stop in its step in the air."""
        order = stop.place.order
        self.stand_at(None)
        # No call: an interrupt comes before all of this, and the step stops here again, or behind it.
        flight.passed, self._stop, self.interrupted = order, stop, False

    @property
    def tokens(self) -> torch.Tensor:
        """The call's prompt and what was generated so far, int64 ``[T]`` on the CPU."""
        return torch.tensor(self.session.token_list[self.prompt_start : self.end], dtype=torch.int64)

    @property
    def generated(self) -> int:
        """Number of tokens sampled so far by this run."""
        end = len(self.session.token_list) if self.end is None else self.end
        return max(0, end - self.prompt_end)

    @property
    def text(self) -> str | None:
        """The generated text so far where the model has a tokenizer, else None."""
        return self.session.engine.decode_text(self.session.token_list[self.prompt_end : self.end])

    def finish(self, reason: str | None) -> None:
        """Mark the run finished."""
        self.finished, self.finish_reason, self.flight, self.interrupted = True, reason, None, False
        self.stand_at(None)

    def close(self) -> None:
        """Abandon the run: what is committed stays, the rest of the prompt is dropped."""
        with self.session.engine.lock:
            self.abandon()

    def abandon(self) -> None:
        """:meth:`close` for callers that hold the lock."""
        if self.finished:
            return
        self.require_endable()
        self.finish("closed")
        session = self.session
        keep = session.length
        if keep < len(session.token_list) and session.sampled[keep]:
            keep += 1
        session.token_list, session.sampled = session.token_list[:keep], session.sampled[:keep]

    @property
    def driver(self) -> int | None:
        """The thread that is driving it, if one is."""
        driven = self._driven
        return driven[0] if driven is not None and driven[1].locked() else None

    def drive(self, held: threading.Lock) -> None:
        """Let this thread drive it for as long as ``held`` is locked; the caller holds the engine's lock."""
        self._driven = threading.get_ident(), held

    @property
    def driving(self) -> bool:
        """Whether a thread is in the middle of a step of it."""
        return self.driver is not None

    def require_still(self) -> None:
        """Raise unless nobody is driving the run; the caller holds the lock.

        Raises:
            SessionBusy: saying who drives it.
        """
        if self.owner not in (None, threading.get_ident()):
            raise SessionBusy("another thread is driving this run right now; wait for it.")
        if self.driver is None:
            return
        if self.driver != threading.get_ident():
            raise SessionBusy("another thread is driving this run right now; wait for it.")
        raise SessionBusy(
            "this run is in the middle of a step, which called your predicate or on_token. Act on the run at a stop or "
            "after the call; in on_token you may end it with run.close()."
        )

    def require_endable(self) -> None:
        """Raise :class:`SessionBusy` where the run cannot be abandoned now; in its own on_token it can."""
        if self.driver != threading.get_ident() or self.flight is not None:
            self.require_still()

    def require_alive(self) -> None:
        """Raise :class:`SessionClosed` if the run was abandoned or its session closed."""
        self.session.require_open()
        if self.finish_reason == "closed":
            raise SessionClosed("this run was abandoned with close(); start another on its session.")

    # -- moving --------------------------------------------------------------------------------

    def step_to_next(self) -> Stop | None:
        """From a stop to the next compiled site."""
        flight = self.flight
        assert flight is not None
        return self._go_to(Target(len(self.session.journal), flight.passed + 1))

    def step_tokens(self, site: Site, steps: int) -> Stop | None:
        """From a stop to the same site some steps on."""
        return self._go_to(Target(len(self.session.journal) + steps, site.order))

    def _go_to(self, target: Target) -> Stop | None:
        self.target = target
        try:
            return self._go()
        finally:
            self.target = None

    def rewind(self, position: int, site: str | None = None) -> Stop:
        """Go back to the step that covers ``position`` and stop there after ``site``.

        What the journal holds before that place is replayed in the same program, what lies behind it is discarded:
        later tokens, edits and steering changes. An edit of ``site`` itself is discarded too.

        Args:
            position: absolute position, within this run.
            site: a compiled site; where the run stands now if None, else the first one.

        Raises:
            InvalidValue: a position outside this run or not computed yet.
            UnknownSite, SiteNotCompiled, SessionClosed.
            StaleStop: the session has a newer run.
            SessionBusy: it is being driven.
        """
        engine = self.session.engine
        self.require_alive()
        if site is None:
            site = self._stop.site if self._stop is not None else engine.sites[0].name
        chosen = engine.table.get(site)
        require_compiled(chosen, engine.compiled_names)
        return engine.tiers.roomy(partial(engine.rewind, self, position, chosen))

    def step_index(self, position: int) -> int:
        """Journal index of the step that covers a position; the journal's length for the one in the air."""
        journal = self.session.journal
        for index in range(self.first_step, len(journal)):
            if journal[index].start <= position < journal[index].stop:
                return index
        flight = self.flight
        if flight is not None and flight.step.start <= position < flight.step.stop:
            return len(journal)
        reached = flight.step.stop if flight is not None else self.session.length
        if reached <= self.begin:
            raise InvalidValue(f"rewind(position={position}): this run has computed nothing yet; advance it first.")
        raise InvalidValue(
            f"rewind(position={position}): this run covers positions {self.begin} to "
            f"{reached - 1} so far; positions are absolute and 0-based."
        )

    def twin(self, session: Session) -> Run:
        """A copy of this run for a fork of its session: no breakpoints, no callbacks."""
        span = (self.begin, self.prompt_start, self.prompt_end)
        run = Run(session, replace(self.options, on_token=None), span, (), self.capture)
        run.first_step, run.records = self.first_step, list(self.records)
        return run

    def captured(self) -> Cache:
        """The values captured so far."""
        parts: dict[str, list[torch.Tensor]] = {site.name: [] for site in self.capture}
        for values in joined(record.captured for record in self.records):
            for name, value in values.items():
                parts[name].append(value)
        found = {name: torch.cat(several) for name, several in parts.items() if several}
        return Cache(self.session.engine.table, found, batched=False)

    def describe(self) -> View:
        """State, tokens and stops; notebooks show it."""
        return showing.run_view(self)

    def __repr__(self) -> str:
        state = f"finished: {self.finish_reason}" if self.finished else f"at {self._stop!r}" if self._stop else "paused"
        return f"Run({self.options.kind}, {self.tokens.numel()} tokens, {state})"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a Run does not pickle; use session.checkpoint().save(path).")
