"""The compiled language model: what :func:`djinn_fx.compile` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from djinn_fx.keeping import Keeping
from djinn_fx.looking import Looking
from djinn_fx.making import Making, build_choices
from djinn_fx.passes.context import Lower
from djinn_fx.passes.exports import ExportCache
from djinn_fx.passes.inductor import InductorLowering, start_workers
from djinn_fx.passes.lower import lower_eager
from djinn_fx.passes.pipeline import CaptureStore, discover
from djinn_fx.passes.source import Source
from djinn_fx.program import PassRecord, Program
from djinn_fx.runtime import batch as batching
from djinn_fx.runtime.agreement import Agreements
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.engine import Engine
from djinn_fx.runtime.fingerprint import Identity
from djinn_fx.runtime.guard import WeightGuard
from djinn_fx.runtime.inputs import require_lengths
from djinn_fx.runtime.observe import Observer
from djinn_fx.runtime.options import EngineOptions, Tokenizer
from djinn_fx.runtime.programs import ProgramCache, bucket
from djinn_fx.runtime.receipt import Receipt, ReferenceRun, make_receipt, with_agreements
from djinn_fx.runtime.rehearsal import Rehearsal
from djinn_fx.runtime.results import Result
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.session import Session
from djinn_fx.runtime.stop import Stop
from djinn_fx.runtime.streaming import Weights
from djinn_fx.sites import SiteTable
from djinn_fx.specs import Breakpoint, Edit, ProgramShape

if TYPE_CHECKING:
    from djinn_fx.explain import Explanation


class Dj(Looking, Keeping):
    """A compiled language model.

    Attributes:
        engine: the machine behind it.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        options: EngineOptions,
        sites: Sequence[str],
        tokenizer: Tokenizer | None,
        backend: str = "eager",
        exports: ExportCache | None = None,
        weights: Weights | None = None,
    ) -> None:
        lowering: Lower = InductorLowering() if backend == "inductor" else lower_eager
        if backend == "inductor" and source.device.type == "cuda":
            start_workers()
        arena = KVArena(source.kv, options.max_sessions, options.max_length, source.dtype, source.device)
        rehearsal = Rehearsal(arena, source.attention, (1, options.prefill_chunk))
        store = CaptureStore()
        table = discover(source, store, exports)
        guard = WeightGuard(model)
        making = Making(guard, source, store, exports, options.edit_rank, arena, weights, rehearsal)
        programs = ProgramCache(partial(making.build, lowering, pieces=backend == "inductor"))
        if backend == "inductor":
            programs.agreements = Agreements(
                arena, source.dtype, source.device, options.edit_rank, source.vocab_size or 2
            )
        self._receipt: Receipt | None = None
        self._weights = weights
        graphs = options.static and source.device.type == "cuda" and weights is None
        self.observer = Observer(
            ProgramCache(partial(making.build, lower_eager)),
            table,
            source.kv,
            source.dtype,
            source.device,
            options.prefill_chunk,
            options.max_length,
            source.windows,
            options.edit_rank,
            options.pinned_bytes // 2,
        )
        self.engine = Engine(
            programs=programs,
            arena=arena,
            table=table,
            sites=table.select(sites),
            options=options,
            dtype=source.dtype,
            device=source.device,
            tokenizer=tokenizer,
            guard=guard.check,
            glance=guard.glance if graphs else None,
            identity=Identity(guard.tensors, dict(source.config), source.model_type, build_choices(source, backend)),
            unembed=self.observer.unembed,
        )

    # -- sessions ------------------------------------------------------------------------------

    def session(self, seed: int = 0) -> Session:
        """Open a session; close it, or use it in ``with``.

        Raises:
            CapacityError: every KV row is taken.
            SessionClosed: the model was closed.
        """
        self._alive()
        return self.engine.open_session(seed)

    def generate(
        self,
        prompts: object,
        *,
        max_new_tokens: int,
        edits: Edit | Sequence[Edit] | Sequence[Sequence[Edit]] | None = None,
        breakpoints: Iterable[str | Breakpoint] = (),
        seeds: Sequence[int] | None = None,
        capture: Iterable[str] = (),
        on_token: Callable[[int, int], object] | None = None,
        **sampling: Any,
    ) -> list[Result]:
        """Generate for many prompts, batched; those beyond ``max_sessions`` wait for a free row.

        Args:
            prompts: a list of prompts, or ``[B, T]`` token ids with an ``attention_mask``.
            max_new_tokens: tokens to generate at most, per prompt.
            edits: one list of Edits for all prompts, or one list per prompt; at most one Edit a site in each.
            breakpoints: where one fires, its prompt ends with ``finish_reason="breakpoint"``.
            seeds: one per prompt; 0, 1, 2... by default.
            capture: sites whose values the results' caches shall hold.
            on_token: called with the prompt's index and each new token.
            **sampling: ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``stop_token_ids``, ``output_logits`` as
                in :meth:`Session.generate`.

        Returns:
            one result per prompt, in order.

        Raises:
            InvalidValue, CapacityError: a prompt is empty, or longer than ``max_length``; the message says which one.
            CapacityError: no KV row can be had.
            As :meth:`Session.generate`.
        """
        single = isinstance(prompts, str)
        rows = self._batch([prompts] if single else prompts).rows
        require_lengths(rows, self.engine.options.max_length)
        todo = batching.requests(rows, edits, seeds, self.engine.table)
        points = [breakpoints] if isinstance(breakpoints, (str, Breakpoint)) else list(breakpoints)
        sites = [capture] if isinstance(capture, str) else list(capture)
        if sampling.get("stop_token_ids") is not None:
            sampling["stop_token_ids"] = list(sampling["stop_token_ids"])

        def begin(session: Session, request: batching.Request) -> Run:
            tell = None if on_token is None else partial(on_token, request.index)
            return session.generate(
                request.inputs,
                max_new_tokens=max_new_tokens,
                on_token=tell,
                capture=sites,
                breakpoints=points,
                **sampling,
            )

        return batching.generate(self.engine, todo, begin)

    def as_stopped(self, runs: Sequence[Run]) -> Iterator[Stop]:
        """Drive runs together and yield their stops; see :func:`djinn_fx.runtime.batch.as_stopped`."""
        return batching.as_stopped(self.engine, batching.listed(runs))

    def results(self, runs: Sequence[Run]) -> list[Result]:
        """Drive runs together to their ends, passing over breakpoints."""
        return batching.results(self.engine, batching.listed(runs))

    # -- the compiled model --------------------------------------------------------------------

    def add_sites(self, sites: str | Iterable[str]) -> None:
        """Compile more sites in; sessions and stopped runs go on.

        Raises:
            UnknownSite: no such site.
        """
        self._alive()
        with self.engine.lock:
            names = [site.name for site in self.engine.table.select(sites)]
            self.engine.sites = self.engine.table.select([*self.engine.compiled_names, *names])

    def warmup(self, rows: Iterable[int] = (1,)) -> None:
        """Make the programs that decode ``rows`` rows and that take a full prompt chunk now, not when first needed."""
        self._alive()
        engine, chunk = self.engine, self.engine.options.prefill_chunk
        with engine.lock:
            for count in rows:
                engine.programs.get(ProgramShape(bucket(count), 1, 1), "plain", engine.sites)
            engine.programs.get(ProgramShape(1, chunk, 1), "plain", engine.sites)
            engine.transfer.warm()
            engine.doubts.warm(engine.dtype)
            if engine.loop is not None:
                engine.loop.lanes.warm()
            engine.described()

    @property
    def receipt(self) -> Receipt | None:
        """How exact the compiled model was measured to be; None with ``verify=False``.

        The variants of a program are compared when they are made, so the receipt grows; ``pending`` names what waits.
        """
        agreements = self.engine.programs.agreements
        if self._receipt is None or agreements is None:
            return self._receipt
        return with_agreements(self._receipt, agreements)

    def verify(self, reference: ReferenceRun) -> None:
        """Measure the receipt against an eager run of the model.

        Raises:
            CaptureMismatch: the captured model differs from eager beyond tolerance; names the first diverging site.
        """
        self._receipt = make_receipt(self.engine, self.observer, reference)
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()  # what the eager model took

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The open sessions, oldest first; ``session.tier`` says where the KV of each lies."""
        return tuple(self.engine.sessions)

    @property
    def sites(self) -> SiteTable:
        """Every site of the model; ``dj.compiled_sites`` are those compiled in."""
        return self.engine.table

    @property
    def compiled_sites(self) -> tuple[str, ...]:
        """Names of the sites at which runs can stop and be steered."""
        return self.engine.compiled_names

    @property
    def program(self) -> Program:
        """The decode program of one row, armed."""
        with self.engine.lock:
            return self.observer.programs.get(ProgramShape(1, 1, 1), "armed", self.engine.sites)

    @property
    def passes(self) -> tuple[PassRecord, ...]:
        """What each compiler pass did to :attr:`program`."""
        return self.program.records

    def reload_weights(self) -> None:
        """Take over changes of the model's weights that leave no trace, where programs read copies of them.

        It is needed after ``param.data.copy_`` and its like, where ``device=`` or ``weights_bytes=`` was given.
        """
        self._alive()
        with self.engine.lock:
            if self._weights is not None:
                self.engine.drop_ahead()
                self._weights.reload()

    def explain(self) -> Explanation:
        """A summary of the compiled program: a text for ``print``, a table in a terminal, HTML in a notebook."""
        from djinn_fx.explain import explain

        return explain(self.program, self.engine.identity.model_type)

    def close(self) -> None:
        """Close every session and refuse further work; the KV arena goes with the object."""
        self.engine.close()

    def __enter__(self) -> Dj:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        arena = self.engine.arena
        return (
            f"Dj({self.engine.identity.model_type}, {len(self.compiled_sites)} sites compiled, "
            f"{arena.free_rows} of {arena.rows} rows free, max_length={self.engine.options.max_length})"
        )

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a compiled model does not pickle; pickle the model and compile it again.")
