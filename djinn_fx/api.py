"""The public API: :func:`compile` and the compiled model it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn

from djinn_fx.errors import InvalidValue, SessionClosed
from djinn_fx.modules import DjModule, compile_module
from djinn_fx.passes.pipeline import CaptureStore, build, discover
from djinn_fx.passes.reference import reference
from djinn_fx.passes.source import Source, prepare
from djinn_fx.passes.support import check
from djinn_fx.program import PassRecord, Program
from djinn_fx.runtime import batch as batching
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.checkpoint import Checkpoint
from djinn_fx.runtime.engine import Engine, EngineOptions, Tokenizer
from djinn_fx.runtime.fingerprint import Identity
from djinn_fx.runtime.guard import WeightGuard
from djinn_fx.runtime.inputs import PromptBatch, prompt_batch
from djinn_fx.runtime.observe import Hook, Observer, Sweep
from djinn_fx.runtime.programs import ProgramCache, bucket
from djinn_fx.runtime.receipt import Receipt, make_receipt
from djinn_fx.runtime.results import Cache, Output, Result
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.session import Session
from djinn_fx.runtime.stop import Stop
from djinn_fx.select import select_positions
from djinn_fx.sites import Site, SiteTable
from djinn_fx.specs import Breakpoint, Edit, Positions, ProgramShape, Variant

#: Most host memory that checkpoints and offloaded sessions may pin.
PINNED_BYTES = 4 << 30


def compile(  # noqa: A001 - the public name
    model: nn.Module,
    *,
    example_inputs: Any = None,
    tokenizer: Tokenizer | None = None,
    sites: str | Iterable[str] | None = None,
    max_sessions: int = 8,
    max_length: int = 1024,
    backend: str = "auto",
    prefill_chunk: int = 512,
    edit_rank: int = 4,
    batch_invariant: bool = False,
    pinned_bytes: int = PINNED_BYTES,
    verify: bool = True,
) -> Any:
    """Compile a model into a program that can be stopped at any layer.

    The model itself is left as it is: weights are shared, never copied.

    Args:
        model: a causal language model of transformers; or any module, together with ``example_inputs``.
        example_inputs: a plain module's arguments, a tuple or a mapping of keyword arguments.
        tokenizer: for prompts given as text.
        sites: where runs can stop and be steered; names, roles and globs. Default ``"resid_post"``, for plain modules
            the outputs of the children of each ModuleList or Sequential, else of the direct children.
        max_sessions: sessions whose KV fits on the device at a time.
        max_length: positions per session.
        backend: ``"eager"`` runs the segments uncompiled; ``"auto"`` picks the best there is.
        prefill_chunk: prompt tokens per chunk.
        edit_rank: directions that one edit may have.
        batch_invariant: decode always in the program of ``max_sessions`` rows, so that a session's bits do not depend
            on who else is there.
        pinned_bytes: most host memory that checkpoints may pin.
        verify: compare the captured model with the eager one before returning.

    Returns:
        :class:`Dj` for a language model, :class:`djinn_fx.modules.DjModule` for a plain module.

    Raises:
        CaptureError: the model cannot be captured; the message says why.
        CaptureMismatch: it was captured, but its numbers differ from eager's beyond tolerance.
        InvalidValue, UnknownSite: an argument is off.
    """
    if backend not in ("auto", "eager"):
        raise InvalidValue(f"backend={backend!r}: choose 'auto' or 'eager'.")
    if example_inputs is not None:
        return compile_module(model, example_inputs, sites)
    for name, value in (
        ("max_sessions", max_sessions),
        ("max_length", max_length),
        ("prefill_chunk", prefill_chunk),
        ("edit_rank", edit_rank),
    ):
        if value < 1:
            raise InvalidValue(f"{name}={value}: give 1 or more.")
    source = prepare(model)
    options = EngineOptions(
        max_sessions=max_sessions,
        max_length=max_length,
        prefill_chunk=prefill_chunk,
        edit_rank=edit_rank,
        batch_invariant=batch_invariant,
        eos=_eos_of(model),
        vocab_size=source.vocab_size or 0,
    )
    chosen = ("resid_post",) if sites is None else (sites,) if isinstance(sites, str) else tuple(sites)
    dj = Dj(model, source, options, chosen, tokenizer)
    if verify:
        dj.receipt = make_receipt(dj.engine, dj.observer, partial(reference, model))
    return dj


class Dj:
    """A compiled language model.

    Attributes:
        engine: the machine behind it.
        receipt: how exact it was measured to be; None with ``verify=False``.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        options: EngineOptions,
        sites: Sequence[str],
        tokenizer: Tokenizer | None,
    ) -> None:
        store = CaptureStore()
        table = discover(source, store)
        arena = KVArena(source.kv, options.max_sessions, options.max_length, source.dtype, source.device)
        programs = ProgramCache(
            partial(_build, source, store, options.edit_rank, arena)
        )
        guard = WeightGuard(model)
        self.receipt: Receipt | None = None
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
            identity=Identity(guard.tensors, dict(source.config), source.model_type),
        )
        self.observer = Observer(
            programs, table, source.kv, source.dtype, source.device, options.prefill_chunk, options.max_length, source.windows
        )

    # -- whole prompts -------------------------------------------------------------------------

    def __call__(self, inputs: object) -> Output:
        """Plain forward of one or many prompts; ``.logits`` is ``[B, T, vocab]`` in the layout given.

        Raises:
            InvalidValue, CapacityError: a prompt that is empty, malformed or too long.
        """
        batch = self._batch(inputs)
        logits = self.observer.sweep(batch, Sweep((), None, self.engine.options.prefill_chunk))
        return Output(batch.spread(logits))

    def run_with_cache(
        self,
        inputs: object,
        sites: str | Iterable[str] = "resid_post",
        *,
        positions: Positions | None = None,
        stop_after: str | None = None,
        logits: bool | int = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor | None, Cache]:
        """Forward one or many prompts and keep the values of sites, compiled in or not.

        Args:
            inputs: one prompt or many.
            sites: which values to keep.
            positions: which positions to keep; negative ints count from each prompt's end; None keeps all, in the
                layout given.
            stop_after: end the pass after this site; no logits then.
            logits: False for none, True for all, an int for that many trailing positions.
            device: move kept values there.
            dtype: convert kept values to it.

        Returns:
            logits ``[B, T, vocab]`` or None, and the cache; values are ``[B, T, *feature_shape]``.

        Raises:
            UnknownSite, InvalidValue, CapacityError.
        """
        batch, table = self._batch(inputs), self.engine.table
        chosen = table.select(sites if isinstance(sites, str) else list(sites))
        last = table.get(stop_after) if stop_after is not None else None
        if last is not None:
            chosen = tuple(site for site in chosen if site.order <= last.order)
        elif not logits and chosen:
            last = chosen[-1]
        cuts = {site.name: site for site in (*chosen, *((last,) if last else ()))}
        wanted = None if logits is True or any(s.axis == "kept" for s in chosen) else int(logits)
        plan = Sweep(
            tuple(sorted(cuts.values(), key=lambda site: site.order)),
            wanted,
            self.engine.options.prefill_chunk,
            last,
        )
        kept_logits, values = self.observer.capture(batch, plan)
        shaped = {
            site.name: select_positions(batch, values[site.name], positions).to(device, dtype)
            for site in chosen
        }
        cache = Cache(table, shaped)
        if not logits or not kept_logits:
            return None, cache
        if logits is True:
            return batch.spread(kept_logits), cache
        return torch.stack([row[-int(logits) :] for row in kept_logits]), cache

    def run_with_hooks(
        self,
        inputs: object,
        fwd_hooks: Sequence[tuple[str, Hook]] = (),
        *,
        logits: bool | int = True,
    ) -> torch.Tensor | None:
        """Forward with hooks, as TransformerLens has them, at any site, compiled in or not.

        Args:
            inputs: one prompt or many.
            fwd_hooks: pairs of a site (name or glob) and ``fn(value, hook)`` (or ``fn(value)``); ``value`` is
                ``[B, T, *feature_shape]`` in the layout given, zeros at pads; return a tensor of the same shape, or
                None to keep it (changes in place count).
            logits: False for none, True for all, an int for that many trailing positions.

        Returns:
            logits ``[B, T, vocab]`` or None.
        """
        batch = self._batch(inputs)
        hooks = [(site, fn) for name, fn in fwd_hooks for site in self.engine.table.select(name)]
        rows = self.observer.with_hooks(batch, hooks, None if logits is True else int(logits) or 1)
        if logits is True:
            return batch.spread(rows)
        return torch.stack(rows) if logits else None

    def unembed(self, h: torch.Tensor) -> torch.Tensor:
        """The tail segment on residuals ``[..., hidden]``: final norm, head, softcap, scale. The logit lens.

        Returns:
            logits ``[..., vocab]``.
        """
        self._alive()
        posts = [site for site in self.engine.table.sites if site.role == "resid_post"]
        return self.observer.unembed(h, posts[-1])

    def first_nonfinite(
        self, inputs: object, sites: str | Iterable[str] = "*"
    ) -> tuple[str, tuple[Any, ...]] | None:
        """The first site, in execution order, with a NaN or an infinity; None if all is finite.

        Returns:
            the site's name and the positions, ints for one prompt, ``(row, position)`` pairs for many.
        """
        batch = self._batch(inputs)
        chosen = self.engine.table.select(sites if isinstance(sites, str) else list(sites))
        found = self.observer.first_nonfinite(batch, chosen)
        if found is None:
            return None
        site, places = found
        alone = len(batch.rows) == 1
        return site.name, tuple(position if alone else (row, position) for row, position in places)

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
        edits: Sequence[Edit] | Sequence[Sequence[Edit]] | None = None,
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
            edits: one list of Edits for all prompts, or one list per prompt.
            breakpoints: where one fires, its prompt ends with ``finish_reason="breakpoint"``.
            seeds: one per prompt; 0, 1, 2... by default.
            capture: sites whose values the results' caches shall hold.
            on_token: called with the prompt's index and each new token.
            **sampling: ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``stop_token_ids``, ``output_logits`` as
                in :meth:`Session.generate`.

        Returns:
            one result per prompt, in order.
        """
        single = isinstance(prompts, str)
        rows = self._batch([prompts] if single else prompts).rows
        todo = batching.requests(rows, edits, seeds)

        def begin(session: Session, request: batching.Request) -> Run:
            tell = None if on_token is None else partial(on_token, request.index)
            return session.generate(
                request.inputs,
                max_new_tokens=max_new_tokens,
                on_token=tell,
                capture=capture,
                breakpoints=breakpoints,
                **sampling,
            )

        return batching.generate(self.engine, todo, begin)

    def as_stopped(self, runs: Sequence[Run]) -> Iterator[Stop]:
        """Drive runs together and yield their stops; see :func:`djinn_fx.runtime.batch.as_stopped`."""
        return batching.as_stopped(self.engine, list(runs))

    def results(self, runs: Sequence[Run]) -> list[Result]:
        """Drive runs together to their ends, passing over breakpoints."""
        return batching.results(self.engine, list(runs))

    def restore(
        self,
        checkpoint: Any,
        breakpoints: Iterable[str | Breakpoint] = (),
        exact: bool = True,
    ) -> Session:
        """Bring a checkpoint (a path or a :class:`Checkpoint`) back as a session.

        Its run, if it had one, is ``session.run``; a run that stood at a stop stands there again.

        Raises:
            CheckpointError: damaged, of another model, or (with ``exact``) of another environment.
            CapacityError, SiteNotCompiled.
        """
        self._alive()
        loaded = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.load(checkpoint)
        return loaded.restore_into(self.engine, breakpoints=breakpoints, exact=exact)

    # -- the compiled model --------------------------------------------------------------------

    def add_sites(self, sites: str | Iterable[str]) -> None:
        """Compile more sites in; sessions and stopped runs go on.

        Raises:
            UnknownSite: no such site.
        """
        self._alive()
        with self.engine.lock:
            names = [site.name for site in self.engine.table.select(sites if isinstance(sites, str) else list(sites))]
            self.engine.sites = self.engine.table.select([*self.engine.compiled_names, *names])

    def warmup(self, rows: Iterable[int] = (1,)) -> None:
        """Make the programs that decode ``rows`` rows and that take a full prompt chunk now, not when first needed."""
        self._alive()
        engine, chunk = self.engine, self.engine.options.prefill_chunk
        with engine.lock:
            for count in rows:
                engine.programs.get(ProgramShape(bucket(count), 1, 1), "plain", engine.sites)
            engine.programs.get(ProgramShape(1, chunk, 1), "plain", engine.sites)

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
            return self.engine.programs.get(ProgramShape(1, 1, 1), "armed", self.engine.sites)

    @property
    def passes(self) -> tuple[PassRecord, ...]:
        """What each compiler pass did to :attr:`program`."""
        return self.program.records

    def memory(self) -> dict[str, int]:
        """Bytes by component: ``weights``, ``kv``, ``host`` (offloaded sessions), ``sessions``."""
        engine = self.engine
        with engine.lock:
            per_position = engine.arena.nbytes // ((engine.arena.rows + 1) * (engine.arena.positions + 1))
            return {
                "weights": sum(tensor.nbytes for tensor in engine.identity.weights.values()),
                "kv": engine.arena.nbytes,
                "kv_used": sum(per_position * session.extent for session in engine.sessions if session.resident),
                "host": sum(sum(t.nbytes for t in session.host or ()) for session in engine.sessions),
            }

    def explain(self) -> str:
        """A summary of the compiled program: passes, segments and what crosses each yield point."""
        from djinn_fx.explain import explain

        return explain(self.program)

    def close(self) -> None:
        """Close every session and free the KV arena."""
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

    def _alive(self) -> None:
        if self.engine.closed:
            raise SessionClosed("this compiled model was closed; compile it again.")
        self.engine.guard()

    def _batch(self, inputs: object) -> PromptBatch:
        self._alive()
        return prompt_batch(inputs, self.engine.tokenizer, self.engine.options.vocab_size)

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a compiled model does not pickle; pickle the model and compile it again.")


def _build(
    source: Source,
    store: CaptureStore,
    rank: int,
    arena: KVArena,
    shape: ProgramShape,
    variant: Variant,
    sites: Sequence[Site],
) -> Program:
    return build(
        source, shape, sites=sites, variant=variant, rank=rank, arenas=arena.layers, store=store
    )


def _eos_of(model: nn.Module) -> frozenset[int]:
    """The EOS tokens of the model's generation_config."""
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else [int(token) for token in eos])


__all__ = ["Dj", "DjModule", "check", "compile"]
