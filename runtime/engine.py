"""The engine: the state of one compiled language model, and the one lock that guards it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from djinn_fx.errors import CapacityError
from djinn_fx.runtime import driver, moves, planner
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.breakpoints import arm_breakpoints
from djinn_fx.runtime.executor import Executor
from djinn_fx.runtime.fingerprint import Identity
from djinn_fx.runtime.inputs import one_prompt
from djinn_fx.runtime.options import EngineOptions, Tokenizer
from djinn_fx.runtime.programs import ProgramCache
from djinn_fx.runtime.results import Result
from djinn_fx.runtime.run import Run, RunOptions
from djinn_fx.runtime.sampling import checked_seed
from djinn_fx.runtime.session import Session
from djinn_fx.runtime.steering import Armed
from djinn_fx.runtime.stop import Stop
from djinn_fx.runtime.tables import BatchRow
from djinn_fx.sites import Site, SiteTable
from djinn_fx.specs import Breakpoint


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
        return Executor(self.programs, self.arena, self.sites, self.dtype, self.device, self.options.edit_rank)

    def next_key(self) -> int:
        """A fresh identity for a steering handle."""
        return next(self._keys)

    # -- sessions ------------------------------------------------------------------------------

    def open_session(self, seed: int) -> Session:
        """Open a session on a free row.

        Raises:
            CapacityError: no row is free.
            InvalidValue: a seed that is no integer of 64 bits.
        """
        seed = checked_seed(seed)
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
        """Move a session's KV to the host and free its row.

        Raises:
            CapacityError: it would take more host memory than ``pinned_bytes``; the session stays where it is.
        """
        if not session.resident:
            return
        taken = sum(tensor.nbytes for other in self.sessions for tensor in other.host or ())
        needed = self.arena.bytes_per_position * session.extent
        if taken + needed > self.options.pinned_bytes:
            raise CapacityError(
                f"offloading this session needs {needed} bytes of host memory, and {taken} of the "
                f"pinned_bytes={self.options.pinned_bytes} are taken. Close an offloaded session, or compile with a "
                "larger pinned_bytes."
            )
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
            flight = None if session.run is None else session.run.flight
            if flight is not None and flight.chunk is not None:
                self.executor.refresh(flight.chunk, BatchRow(session.row, flight.step))

    def new_run(
        self,
        session: Session,
        inputs: object,
        options: RunOptions,
        capture: Iterable[str],
        breakpoints: Iterable[str | Breakpoint],
    ) -> Run:
        """Check a call and make its run; tokens are appended now, nothing is computed yet.

        Predicates and the tokenizer are the user's code: they run outside the lock.
        """
        self.guard()
        watch = arm_breakpoints(breakpoints, self.table, self.sites, self.dtype, self.device)
        sites = planner.capturable(self.table, self.compiled_names, capture)
        prompt = [] if inputs is None else one_prompt(inputs, self.tokenizer, self.options.vocab_size)
        with self.lock:
            session.require_free()
            self._require_room(session, prompt)
            planner.require_tokens(session, prompt, options.kind)
            known = len(session.token_list)
            session.token_list += prompt
            session.sampled += [False] * len(prompt)
            run = Run(session, options, (session.length, known, known + len(prompt)), watch, sites)
            session.adopt(run)
            return run

    def _require_room(self, session: Session, prompt: Sequence[int]) -> None:
        known, most = len(session.token_list), self.options.max_length
        if known > most or (known == most and prompt):
            raise CapacityError(
                f"this session is full: it holds {known} tokens (max_length={most}). Begin another, or compile with a "
                "larger max_length."
            )
        if len(prompt) > most - known:
            raise CapacityError(
                f"the prompt has {len(prompt)} tokens, but this session has room for {most - known} "
                f"(max_length={most}, {known} used). Shorten it, or compile with a larger max_length."
            )

    # -- outcomes and moves --------------------------------------------------------------------

    def iterate(self, runs: Sequence[Run]) -> list[Stop]:
        """See :func:`djinn_fx.runtime.driver.iterate`."""
        return driver.iterate(self, runs)

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
        """Close every session and refuse further work.

        Raises:
            SessionBusy: a thread is driving one of them; nothing is closed.
        """
        with self.lock:
            for session in self.sessions:
                session.require_endable()
            for session in list(self.sessions):
                session.close()
            self.closed = True
