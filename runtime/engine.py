"""The engine: the state of one compiled language model, and the one lock that guards it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from djinn_fx.errors import CapacityError, StaleStop
from djinn_fx.runtime import driver, moves, planner
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.berths import park
from djinn_fx.runtime.breakpoints import arm_breakpoints
from djinn_fx.runtime.disk import Disk
from djinn_fx.runtime.doubt import Doubts
from djinn_fx.runtime.executor import Executor
from djinn_fx.runtime.fingerprint import Identity, describe_environment, describe_model
from djinn_fx.runtime.inputs import one_prompt
from djinn_fx.runtime.lanes import Lanes
from djinn_fx.runtime.lock import EngineLock
from djinn_fx.runtime.loop import DecodeLoop
from djinn_fx.runtime.options import EngineOptions, Tokenizer
from djinn_fx.runtime.pinned import HostPool
from djinn_fx.runtime.plain import Plain
from djinn_fx.runtime.programs import ProgramCache, bucket
from djinn_fx.runtime.results import Result
from djinn_fx.runtime.run import Run, RunOptions
from djinn_fx.runtime.sampling import checked_seed
from djinn_fx.runtime.session import Session
from djinn_fx.runtime.stages import Recorder, Stages
from djinn_fx.runtime.steering import Armed
from djinn_fx.runtime.stop import Stop
from djinn_fx.runtime.tiers import Tiers
from djinn_fx.runtime.transfer import Transfer
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
        glance: the part of that without which no graph may be launched; None where there are no graphs.
        tokenizer: for prompts given as text; or None.
        unembed: residuals ``[..., hidden]`` to logits, for what a notebook shows; or None.
        pool: host memory for checkpoints and offloaded sessions.
        transfer: what moves KV there and back.
        tiers: decides what moves.
        doubts: whether values were changed at stops.
        visits: called under the lock before a session's next step, on the thread that drives it; they raise nothing.
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
    glance: Callable[[], None] | None = None
    tokenizer: Tokenizer | None = None
    unembed: Callable[[torch.Tensor], torch.Tensor] | None = None
    lock: EngineLock = field(init=False, repr=False)
    sessions: list[Session] = field(default_factory=list, repr=False)
    closed: bool = False
    pool: HostPool = field(init=False, repr=False)
    transfer: Transfer = field(init=False, repr=False)
    tiers: Tiers = field(init=False, repr=False)
    doubts: Doubts = field(init=False, repr=False)
    visits: dict[Session, Callable[[], None]] = field(default_factory=dict, repr=False)
    _keys: Iterator[int] = field(default_factory=itertools.count, repr=False)
    _loop: DecodeLoop | None = field(init=False, default=None, repr=False)
    _stages: Stages | None = field(init=False, default=None, repr=False)
    _described: tuple[tuple[object, object, object], tuple[object, ...], Mapping[str, Plain]] | None = field(
        init=False, default=None, repr=False
    )

    def __post_init__(self) -> None:
        self.lock = EngineLock(self.device)
        cuda, self.doubts = self.device.type == "cuda", Doubts(self.device)
        self.pool = HostPool(self.options.pinned_bytes, pinned=cuda, ahead=cuda)
        self.transfer = Transfer(self.arena, self.pool)
        self.tiers = Tiers(self, Disk(self.options.disk_bytes, self.options.spill_dir))
        self._stages = Stages(Recorder(self.device), self.arena.env, self.guard) if self.options.static else None

    @property
    def compiled_names(self) -> tuple[str, ...]:
        """Names of the compiled sites."""
        return tuple(site.name for site in self.sites)

    @property
    def executor(self) -> Executor:
        """An executor for the sites compiled now."""
        rank = self.options.edit_rank
        return Executor(self.programs, self.arena, self.sites, self.dtype, self.device, rank, self.loop, self._stages)

    @property
    def loop(self) -> DecodeLoop | None:
        """The decode loop for the sites compiled now; None for eager steps."""
        return self.loop_for(self.sites)

    def _current_loop(self) -> DecodeLoop:
        """The decode loop of the sites compiled now."""
        loop = self._loop
        if loop is None or loop.sites != self.sites:
            if loop is not None:
                loop.retire()
            if self._stages is not None:
                self._stages.keep(self.compiled_names)
            self._loop = loop = self._make_loop(self.sites)
        return loop

    def loop_for(self, sites: tuple[Site, ...]) -> DecodeLoop | None:
        """A decode loop for some sites: the engine's own if they are the compiled ones; None for eager steps."""
        if not self.options.static:
            return None
        return self._current_loop() if sites == self.sites else self._make_loop(sites)

    def _make_loop(self, sites: tuple[Site, ...]) -> DecodeLoop:
        count = max(bucket(self.options.max_sessions), 2)
        rank, spare = self.options.edit_rank, self.arena.spare_row
        lanes = Lanes(sites, count, self.dtype, self.device, rank, spare)
        return DecodeLoop(self.programs, self.arena, lanes)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of static buffers on the device: lanes of decode, stages of prompts."""
        lanes = 0 if self._loop is None else self._loop.lanes.nbytes
        return lanes + (0 if self._stages is None else self._stages.nbytes)

    def described(self) -> Mapping[str, Plain]:
        """``model`` and ``environment`` as they are now, for a checkpoint; made anew only if something changed."""
        identity, known = self.identity, self._described
        rest = torch.get_float32_matmul_precision(), torch.get_num_threads(), tuple(identity.build.items())
        if known is not None and known[1] == rest:
            sites, options, same = known[0]
            if sites is self.sites and options is self.options and same is identity:
                return known[2]
        found = {"model": describe_model(self), "environment": describe_environment(self)}
        self._described = (self.sites, self.options, identity), rest, found
        return found

    def next_key(self) -> int:
        """A fresh identity for a steering handle."""
        return next(self._keys)

    # -- sessions ------------------------------------------------------------------------------

    def open_session(self, seed: int, keep: Sequence[Session] = ()) -> Session:
        """Open a session on a free row, or on that of a paused session, which moves to the host.

        Args:
            seed: of what it draws.
            keep: sessions that stay on the device; whoever has some does not wait for a row, and lets others go first.

        Raises:
            CapacityError: no row can be had, or there is no place for what is in it.
            InvalidValue: a seed that is no integer of 64 bits.
        """
        seed = checked_seed(seed)
        return self.tiers.roomy(lambda: self.seated_session(seed, keep), patient=not keep)

    def seated_session(self, seed: int, keep: Sequence[Session] = ()) -> Session:
        """:meth:`open_session` for callers that :meth:`Tiers.roomy` calls."""
        self.tiers.make_room(1, keep)
        self.pool.prepare()  # or the first checkpoint would wait for it
        rows = self.arena.take()
        try:
            session = Session(self, rows[0], seed)
            self.sessions.append(session)
            return session
        except BaseException:
            self.give_up(rows)
            raise

    def give_up(self, rows: Sequence[int]) -> None:
        """Close the sessions on rows that were just taken for them, and give back those that none had yet."""
        made = [session for session in self.sessions if session.resident and session.row in rows]
        for session in made:
            session.close()
        for row in {*rows} - {session.row for session in made}:
            self.arena.vacated(row)

    def forget(self, session: Session) -> None:
        """Drop a closing session: its row is zeroed and free again."""
        self.tiers.forget(session)
        if session.resident:
            self.vacate(session.row)
        session.host = None
        self.sessions.remove(session)
        self.tiers.line.call()

    def offload(self, session: Session) -> None:
        """Move a session's KV to the host and free its row; on CUDA both are only begun.

        Raises:
            CapacityError: no host memory is left; the session stays where it is.
            Waiting: see :class:`Tiers`.
        """
        if session.resident:
            self.tiers.make_host_room(lambda: park(self, session))

    def drop_ahead(self, row: int | None = None) -> None:
        """What a step launched ahead wrote into a row, or into any, is gone or void, so it cannot serve any more."""
        if self._loop is not None:
            self._loop.drop(row)

    def vacate(self, row: int) -> None:
        """Zero a row and give it back."""
        self.drop_ahead(row)
        self.arena.release(row)

    def bring_back(self, session: Session) -> None:
        """Give a session that was moved off a row and its KV again; the engine's stream waits for it, not the host.

        Raises:
            CapacityError: no row can be had, or no device memory; the session stays where it is.
            Waiting: see :class:`Tiers`.
        """
        self.tiers.bring_back(session)
        self.arena.arrive(session.row)

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
            self.tiers.foresee(session)
            return run

    def watch(self, session: Session, breakpoints: Iterable[str | Breakpoint]) -> None:
        """See :meth:`Session.watch`."""
        armed = arm_breakpoints(breakpoints, self.table, self.sites, self.dtype, self.device)
        with self.lock:
            session.require_open()
            session.require_still()
            run = session.run
            if run is not None:
                kept = {id(point.spec): point for point in run.breakpoints}  # the same one goes on counting its times
                run.breakpoints = [kept.get(id(point.spec), point) for point in armed]
                if run.flight is not None:
                    run.flight.answers = None  # those of the old ones

    def _require_room(self, session: Session, prompt: Sequence[int]) -> None:
        known, most = len(session.token_list), self.options.max_length
        if known > most or (known == most and prompt):
            raise CapacityError(
                f"this session is full: it holds {known} tokens, and keys and values of max_length={most} at most. "
                "Begin another, or compile with a larger max_length."
            )
        if len(prompt) > most - known:
            raise CapacityError(
                f"the prompt has {len(prompt)} tokens, but this session has room for {most - known} "
                f"(max_length={most}, {known} used). Shorten it, or compile with a larger max_length."
            )

    # -- outcomes and moves --------------------------------------------------------------------

    def iterate(self, runs: Sequence[Run]) -> list[Stop]:
        """See :func:`djinn_fx.runtime.driver.iterate`; before it, whoever waits for one of the sessions is let in."""
        for run in runs if self.visits else ():
            with self.lock:
                self.visits.pop(run.session, _nothing)()
        try:
            return driver.iterate(self, runs)
        finally:
            self.tiers.line.call()

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

    def rewind(self, run: Run, position: int, site: Site) -> Stop:
        """See :meth:`Run.rewind`."""
        run.require_alive()  # another thread may have closed it meanwhile: its row is somebody else's then
        run.require_still()
        if run.session.run is not run:
            raise StaleStop("cannot rewind: the session has a newer run; rewind that one.")
        return moves.rewind(self, run, run.step_index(position), site)

    def fork(self, stop: Stop, n: int, seeds: Sequence[int] | None) -> list[Stop]:
        """See :meth:`Stop.fork`."""
        return moves.fork(self, stop, n, seeds)

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
        self.tiers.disk.close()


def _nothing() -> None:
    """In the place of a visit that nobody asked for."""
