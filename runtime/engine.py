"""The engine: brings runs to their next stop, one batched step at a time.

Everything that touches the arena or a session's state happens under one re-entrant lock; predicates and callbacks of
the user run outside it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from djinn_fx.errors import CapacityError, SessionBusy
from djinn_fx.runtime import moves, planner
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.breakpoints import arm_breakpoints
from djinn_fx.runtime.executor import Executor
from djinn_fx.runtime.fingerprint import Identity
from djinn_fx.runtime.flight import Flight, same_bits
from djinn_fx.runtime.inputs import one_prompt
from djinn_fx.runtime.programs import ProgramCache
from djinn_fx.runtime.results import Result, StepRecord
from djinn_fx.runtime.run import Run, RunOptions
from djinn_fx.runtime.sampling import sample
from djinn_fx.runtime.session import Session
from djinn_fx.runtime.steering import Armed
from djinn_fx.runtime.stop import Stop
from djinn_fx.runtime.tables import BatchRow
from djinn_fx.sites import Site, SiteTable
from djinn_fx.specs import Breakpoint


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer: Hugging Face's have it."""

    def __call__(self, text: str) -> Any:
        """Encode a text to a mapping with ``input_ids``."""

    def decode(self, ids: list[int]) -> str:
        """Decode ids to text."""


@dataclass(frozen=True)
class EngineOptions:
    """Fixed choices of one compiled model.

    Attributes:
        max_sessions: KV rows.
        max_length: positions per session.
        prefill_chunk: prompt tokens per chunk.
        edit_rank: directions an edit may have.
        batch_invariant: decode always in the program of ``max_sessions`` rows.
        eos: tokens that end generation.
        vocab_size: tokens are below this.
        max_bucket: rows of the largest decode program.
    """

    max_sessions: int = 8
    max_length: int = 1024
    prefill_chunk: int = 512
    edit_rank: int = 4
    batch_invariant: bool = False
    eos: frozenset[int] = frozenset()
    vocab_size: int = 0
    max_bucket: int = 64


@dataclass
class Engine:
    """The machine behind one compiled language model.

    Attributes:
        programs: where programs come from.
        arena: the KV of all sessions.
        table: all sites of the model.
        sites: the compiled sites, in execution order.
        options: fixed choices.
        dtype: the model's dtype.
        device: the model's device.
        identity: what makes this model itself, for checkpoints.
        guard: raises if the model's weights were moved or replaced.
        tokenizer: for prompts given as text; or None.
    """

    programs: ProgramCache
    arena: KVArena
    table: SiteTable
    sites: tuple[Site, ...]
    options: EngineOptions
    dtype: torch.dtype
    device: torch.device
    identity: Identity
    guard: Callable[[], None]
    tokenizer: Tokenizer | None = None
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    sessions: list[Session] = field(default_factory=list, repr=False)
    closed: bool = False
    _keys: Iterator[int] = field(default_factory=itertools.count, repr=False)

    @property
    def compiled_names(self) -> tuple[str, ...]:
        """Names of the compiled sites."""
        return tuple(site.name for site in self.sites)

    @property
    def executor(self) -> Executor:
        """An executor for the sites compiled now."""
        return Executor(
            self.programs, self.arena, self.sites, self.dtype, self.device, self.options.edit_rank
        )

    def next_key(self) -> int:
        """A fresh identity for a steering handle."""
        return next(self._keys)

    # -- sessions ------------------------------------------------------------------------------

    def open_session(self, seed: int) -> Session:
        """Open a session on a free row.

        Raises:
            CapacityError: no row is free.
        """
        with self.lock:
            session = Session(self, self.arena.take()[0], seed)
            self.sessions.append(session)
            return session

    def forget(self, session: Session) -> None:
        """Drop a closing session: its row is zeroed and free again."""
        if session.resident:
            self.arena.release(session.row)
        session.host = None
        self.sessions.remove(session)

    def offload(self, session: Session) -> None:
        """Move a session's KV to the host and free its row."""
        if session.resident:
            session.host = self.arena.read(session.row, session.extent)
            self.arena.release(session.row)

    def bring_back(self, session: Session) -> None:
        """Give an offloaded session a row again and its KV back.

        Raises:
            CapacityError: no row is free.
        """
        if session.host is not None:
            session.row = self.arena.take()[0]
            self.arena.write(session.row, session.host)
            session.host = None

    def new_run(
        self,
        session: Session,
        inputs: object,
        options: RunOptions,
        capture: Iterable[str],
        breakpoints: Iterable[str | Breakpoint],
    ) -> Run:
        """Check a call and make its run; tokens are appended now, nothing is computed yet."""
        self.guard()
        watch = arm_breakpoints(breakpoints, self.table, self.sites, self.dtype, self.device)
        sites = planner.capturable(self.table, self.compiled_names, capture)
        prompt = [] if inputs is None else one_prompt(inputs, self.tokenizer, self.options.vocab_size)
        known = len(session.token_list)
        room = self.options.max_length - known
        if len(prompt) > room:
            raise CapacityError(
                f"the prompt has {len(prompt)} tokens, but this session has room for {room} "
                f"(max_length={self.options.max_length}, {known} used). Shorten it, or compile with "
                "a larger max_length."
            )
        planner.require_tokens(session, prompt, options.kind)
        session.token_list += prompt
        session.sampled += [False] * len(prompt)
        span = (session.length, known, len(session.token_list))
        return Run(session, options, span, watch, sites)

    # -- driving -------------------------------------------------------------------------------

    def iterate(self, runs: Sequence[Run]) -> list[Stop]:
        """Bring every run to its next stop, or one step further; returns the stops, in order.

        Raises:
            SessionBusy: another thread is driving one of them.
            InvalidPredicate: a predicate failed; its run stays where it was.
        """
        with self._driving(runs), torch.no_grad():
            with self.lock:
                for run in runs:
                    run.session.require_open()
                    self.bring_back(run.session)
                    self._settle(run)
            for run in runs:
                self._draw_first(run)
            stops = {id(run): self._seek(run) for run in runs if run.flight is not None}
            moving = [run for run in runs if not run.finished and not stops.get(id(run))]
            with self.lock:
                self._launch(moving)
            for run in moving:
                stops[id(run)] = self._seek(run)
        return [stop for run in runs if (stop := stops.get(id(run))) is not None]

    @contextmanager
    def _driving(self, runs: Sequence[Run]) -> Iterator[None]:
        with self.lock:
            if any(run.driving for run in runs):
                raise SessionBusy("another thread is driving this run right now; wait for it.")
            for run in runs:
                run.driving = True
        try:
            yield
        finally:
            for run in runs:
                run.driving = False

    def _settle(self, run: Run) -> None:
        """Take over what the user changed while the run stood at a stop, and leave the stop."""
        stop, flight = run.stop, run.flight
        if stop is None or flight is None:
            return
        site = self.table.get(stop.site)
        if not same_bits(stop.value, flight.value(site)):
            flight.replace(site, stop.value)
        flight.steer(run.session.steering, self.sites)
        if flight.chunk is not None:
            row = BatchRow(run.session.row, flight.step)
            self.executor.refresh(flight.chunk, row)
        run.stand_at(None)

    def _launch(self, runs: Sequence[Run]) -> None:
        """Begin the next step of each run and execute what is to be decoded, batched."""
        waiting = []
        for run in runs:
            if run.flight is None and planner.next_is_decode(run):
                waiting.append(run)
            elif run.flight is None:
                run.flight = Flight(planner.next_chunk(run, self.options))
            elif run.flight.step.decodes and run.flight.values is None:
                waiting.append(run)
        for group in planner.decode_groups(waiting, self.options):
            batch = [BatchRow(run.session.row, planner.flight_of(run).step) for run in group]
            for run, values in zip(group, self.executor.decode(batch), strict=True):
                planner.flight_of(run).values = values
        for run in runs:
            flight = run.flight
            if flight is not None and not flight.step.decodes and flight.chunk is None:
                flight.chunk = self.executor.begin(BatchRow(run.session.row, flight.step))

    def _seek(self, run: Run) -> Stop | None:
        """Look at the sites ahead in the step in the air: stop at the first hit, else commit."""
        flight = run.flight
        if flight is None or (flight.values is None and flight.chunk is None):
            return None
        for site in planner.watched(run, flight, self.sites):
            if not self._reach(run, flight, site):
                return None
            fired = planner.fired(run, flight, site)
            if fired is not None:
                return self.deliver(run, site, fired)
            flight.passed = site.order
        if flight.chunk is not None:
            with self.lock:
                self.executor.advance(flight.chunk, None)
        self._announce(run, self._commit(run, flight))
        return None

    def _draw_first(self, run: Run) -> None:
        """Draw a run's first token from what an earlier forward call left, if it gave no tokens."""
        session, token = run.session, None
        with self.lock:
            logits = session.last_logits
            if run.flight is None and session.length == len(session.token_list) and logits is not None:
                kept = logits[None] if run.options.output_logits else None
                run.records.append(StepRecord(session.length, logits=kept, stepped=False))
                token = self._draw(run, logits[None])
                planner.conclude(run, token, self.options)
        self._announce(run, token)

    def _announce(self, run: Run, token: int | None) -> None:
        """Tell the user of a new token; the caller holds no lock."""
        if token is not None and run.options.on_token is not None:
            run.options.on_token(token)

    def _reach(self, run: Run, flight: Flight, site: Site) -> bool:
        """Compute up to ``site``; False if the step has to be executed again for it first."""
        if flight.chunk is not None:
            with self.lock:
                self.executor.advance(flight.chunk, site.name)
            return True
        if flight.values is not None and not flight.values.has(site):
            flight.values = None
            return False
        return True

    def deliver(self, run: Run, site: Site, fired: Sequence[int]) -> Stop:
        """Stop a run after ``site``: the value is copied into a buffer that the stop owns."""
        flight = planner.flight_of(run)
        flight.passed = site.order
        stop = Stop(run, site, flight.step, flight.value(site).clone(), fired)
        run.stand_at(stop)
        return stop

    def _commit(self, run: Run, flight: Flight) -> int | None:
        """Make the step in the air part of the session's history; returns a newly drawn token."""
        with self.lock:
            session, options = run.session, run.options
            record = StepRecord(flight.step.start)
            for site in run.capture:
                record.captured[site.name] = flight.value(site).clone()
            session.journal.append(flight.step)
            session.length = flight.step.stop
            run.flight = None
            token = None
            ends = session.length == len(session.token_list)
            if options.kind == "forward":
                skip = max(0, run.prompt_start - flight.step.start)
                record.logits = flight.logits()[skip:].clone()
                session.last_logits = flight.logits()[-1].clone() if ends else None
            elif ends:
                if options.output_logits:
                    record.logits = flight.logits()[-1:].clone()
                token = self._draw(run, flight.logits()[-1:])
            run.records.append(record)
            if ends:
                planner.conclude(run, token, self.options)
            return token

    def _draw(self, run: Run, logits: torch.Tensor) -> int:
        session = run.session
        seeds = torch.tensor([session.seed], dtype=torch.int64, device=self.device)
        place = torch.tensor([session.length], dtype=torch.int64, device=self.device)
        token = int(sample(logits, run.options.sampling, seeds, place))
        session.token_list.append(token)
        session.sampled.append(True)
        return token

    # -- outcomes and moves --------------------------------------------------------------------

    def result_of(self, run: Run) -> Result:
        """The outcome of a finished run."""
        kept = [record.logits for record in run.records if record.logits is not None]
        return Result(
            tokens=run.tokens,
            logits=torch.cat(kept) if kept else None,
            cache=run.captured(),
            finish_reason=run.finish_reason,
            text=run.text if run.options.kind == "generate" else None,
        )

    def decode_text(self, tokens: list[int]) -> str | None:
        """Decode tokens to text, None without a tokenizer."""
        return None if self.tokenizer is None else self.tokenizer.decode(tokens)

    def rewind(self, run: Run, index: int, site: Site) -> Stop:
        """See :meth:`Run.rewind`."""
        return moves.rewind(self, run, index, site)

    def fork(self, run: Run, n: int, seeds: Sequence[int] | None) -> list[Stop]:
        """See :meth:`Stop.fork`."""
        return moves.fork(self, run, n, seeds)

    def recompute(self, session: Session, armed: Armed) -> None:
        """Run a session again as if an edit had always acted."""
        moves.recompute(self, session, armed)

    def close(self) -> None:
        """Close every session and refuse further work."""
        with self.lock:
            for session in list(self.sessions):
                session.close()
            self.closed = True
