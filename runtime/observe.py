"""Whole-prompt calls that need no session: forward, caches, hooks, logit lens, the first NaN.

They run the same segments as sessions do, over a scratch arena of their own, all prompts of a call as one batch. Any
site works, compiled in or not: a program with the wanted cuts is made for the call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from djinn_fx.errors import InvalidValue
from djinn_fx.program import LOGITS, KVSpec, Program
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.inputs import PromptBatch, require_lengths
from djinn_fx.runtime.kept import SLAB, Kept
from djinn_fx.runtime.pinned import HostPool
from djinn_fx.runtime.programs import SMALLEST_CHUNK, ProgramCache, bucket
from djinn_fx.runtime.scratch import Scratch
from djinn_fx.runtime.segments import Env, run_segments
from djinn_fx.runtime.steps import Step
from djinn_fx.runtime.tables import BatchRow, steering_inputs, step_inputs, variant_for
from djinn_fx.sites import Site, SiteTable
from djinn_fx.specs import ProgramShape, Variant

Found = TypeVar("Found")

#: A hook as TransformerLens calls it: ``fn(value, hook)``; a one-argument ``fn(value)`` works too.
Hook = Callable[..., torch.Tensor | None]


@dataclass(frozen=True)
class HookPoint:
    """What a hook is told about its place."""

    name: str
    layer: int | None


@dataclass(frozen=True)
class Sweep:
    """What one pass over a batch of prompts shall do.

    Attributes:
        sites: sites to cut at, in execution order.
        logits: trailing positions whose logits are wanted; None for all, 0 for none.
        chunk: prompt tokens per program.
        last: the last site needed, after which the pass may end; None to run to the end.
    """

    sites: tuple[Site, ...]
    logits: int | None
    chunk: int
    last: Site | None = None


#: Called at each site of each chunk with ``(site, env, rows)``: ``rows`` are the steps of the chunk.
Visit = Callable[[Site, Env, Sequence[Step]], None]


@dataclass
class Observer:
    """Runs whole prompts through programs over scratch arenas.

    Attributes:
        programs: where programs come from.
        table: all sites of the model.
        kv: what each layer keeps.
        dtype: the model's dtype.
        device: the model's device.
        chunk: prompt tokens per program.
        max_length: longest prompt.
        windows: sliding window of each layer, None where it sees everything.
        rank: directions an edit may have.
        host_bytes: most pinned host memory for values on their way from a GPU, and for those that somebody holds.
    """

    programs: ProgramCache
    table: SiteTable
    kv: Sequence[KVSpec]
    dtype: torch.dtype
    device: torch.device
    chunk: int
    max_length: int
    windows: tuple[int | None, ...] = ()
    rank: int = 0
    host_bytes: int = 0
    scratch: Scratch = field(init=False, repr=False)
    values: HostPool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.scratch = Scratch(self.dtype, self.device)
        self.values = HostPool(self.host_bytes, pinned=self.device.type == "cuda", slab=SLAB)

    @torch.no_grad()
    def sweep(self, batch: PromptBatch, plan: Sweep, visit: Visit | None = None) -> list[torch.Tensor]:
        """Run a batch of prompts; returns each row's logits ``[kept, vocab]`` (nothing if none are wanted)."""
        if not batch.rows:
            raise InvalidValue("no prompt was given; give at least one.")
        require_lengths(batch.rows, self.max_length)
        lengths = [len(row) for row in batch.rows]
        logits: list[list[torch.Tensor]] = [[] for _ in lengths]
        cuts, variant = self._program_for(batch, plan)
        longest = max([*lengths, *(step.stop for step in batch.steps or ())])
        scratch = self.scratch.arena(self._kv_until(plan.last), bucket(len(lengths)), longest)
        with scratch as arena:
            _give(arena, batch)
            for steps in self._chunks(batch, plan):
                program = self.programs.get(steps[0].shape, variant, cuts)
                env = self._run(program, steps, arena, plan, visit)
                if LOGITS not in env:
                    continue
                for index, step in enumerate(steps):
                    count = min(len(step.tokens), step.shape.keep)
                    if count:
                        logits[index].append(env[LOGITS][index, :count].clone())
        kept = [torch.cat(parts) for parts in logits if parts]
        return [row[-plan.logits :] for row in kept] if plan.logits else kept

    def _kv_until(self, last: Site | None) -> Sequence[KVSpec]:
        """What the layers keep that run in a pass which ends behind a site."""
        return self.kv if last is None or last.layer is None else self.kv[: last.layer + 1]

    def _chunks(self, batch: PromptBatch, plan: Sweep) -> Iterator[list[Step]]:
        """What runs together, one after another: a session's own steps, or a chunk of every prompt."""
        if batch.steps is not None:
            yield from ([step] for step in batch.steps)
            return
        for start in range(0, max(len(row) for row in batch.rows), plan.chunk):
            yield self._steps(batch, start, plan)

    def _program_for(self, batch: PromptBatch, plan: Sweep) -> tuple[tuple[Site, ...], Variant]:
        """Where the programs of a sweep are cut, and which variant has all that acts in the steps of a session."""
        steps = batch.steps or ()
        acting = {name for step in steps for name in step.injections}
        acting.update(name for step in steps for _, edits in step.steering for name in edits)
        cuts = {site.name: site for site in (*plan.sites, *map(self.table.get, acting))}
        sites = tuple(sorted(cuts.values(), key=lambda site: site.order))
        return sites, variant_for([BatchRow(0, step) for step in steps], sites)

    def _steps(self, batch: PromptBatch, start: int, plan: Sweep) -> list[Step]:
        width = min(plan.chunk, max(len(row) for row in batch.rows) - start)
        query = min(plan.chunk, bucket(width, SMALLEST_CHUNK)) if plan.chunk > 1 else 1
        keep = query
        if plan.logits is not None and all(len(row) <= plan.chunk for row in batch.rows):
            keep = min(query, max(1, plan.logits))
        shape = ProgramShape(bucket(len(batch.rows)), query, keep)
        return [
            Step(
                start=start if len(row) > start else 0,
                tokens=tuple(row[start : start + plan.chunk]),
                sampled=(False,) * len(row[start : start + plan.chunk]),
                last_prompt=len(row) - 1,
                shape=shape,
                steering=(),
            )
            for row in batch.rows
        ]

    def _run(self, program: Program, steps: Sequence[Step], arena: KVArena, plan: Sweep, visit: Visit | None) -> Env:
        rows = [BatchRow(index, step) for index, step in enumerate(steps)]
        shape = program.shape
        env = step_inputs(rows, shape, arena.spare_row, self.device) | arena.env
        env |= steering_inputs(rows, shape, program.variant, program.sites, self.dtype, self.device, self.rank)
        done = 0
        for site in plan.sites:
            segment = program.segment_of(site.name)
            run_segments(program, env, done, segment)
            done = segment + 1
            if visit is not None:
                visit(site, env, steps)
            if plan.last is not None and site.name == plan.last.name:
                return env
        run_segments(program, env, done, len(program.segments) - 1)
        return env

    # -- the calls -----------------------------------------------------------------------------

    def capture(
        self, batch: PromptBatch, plan: Sweep, finish: Callable[[Site, Kept], Found]
    ) -> tuple[list[torch.Tensor], dict[str, Found]]:
        """Run a batch and keep every site's value.

        Args:
            batch: the prompts.
            plan: what to do.
            finish: called with each site's values as soon as all are there; what it returns is kept. No segment writes
                into a value that another one made.

        Returns:
            each row's logits, and what ``finish`` returned, by site.
        """
        growing = {site.name: Kept() for site in plan.sites}
        found: dict[str, Found] = {}
        longest = max((len(row) for row in batch.rows), default=0)
        chunks = -(-longest // plan.chunk) if batch.steps is None else len(batch.steps)

        def keep(site: Site, env: Env, steps: Sequence[Step]) -> None:
            kept = growing[site.name]
            kept.chunks.append((env[site.name], [len(step.tokens_of(site)) if step.tokens else 0 for step in steps]))
            if len(kept.chunks) == chunks:
                found[site.name] = finish(site, growing.pop(site.name))

        return self.sweep(batch, plan, keep), found

    def with_hooks(
        self, batch: PromptBatch, hooks: Sequence[tuple[Site, Hook]], logits: int | None
    ) -> list[torch.Tensor]:
        """Run a batch with hooks that see and may change ``[B, width, *feature_shape]``; returns logits by row.

        The whole prompt is one chunk, so that each hook is called once.

        Raises:
            InvalidValue: a hook returned another shape or dtype.
        """
        chosen = {site.name: site for site, _ in hooks}
        sites = tuple(sorted(chosen.values(), key=lambda site: site.order))

        grad = torch.is_grad_enabled()

        def call(site: Site, env: Env, steps: Sequence[Step]) -> None:
            value = batch.spread([env[site.name][i, : len(step.tokens)] for i, step in enumerate(steps)])
            for place, hook in hooks:
                if place.name == site.name:
                    with torch.set_grad_enabled(grad):  # a hook is the caller's code
                        value = _call_hook(hook, value, place).detach()
            whole = env[site.name].clone()
            for index, step in enumerate(steps):
                whole[index, : len(step.tokens)] = batch.gather(value, index)
            env[site.name] = whole

        longest = max((len(row) for row in batch.rows), default=1)
        needs_all = any(site.axis == "kept" for site in sites)
        plan = Sweep(sites, None if needs_all else logits, bucket(longest, SMALLEST_CHUNK))
        rows = self.sweep(batch, plan, call)
        return [row[-logits:] for row in rows] if logits else rows

    def first_nonfinite(self, batch: PromptBatch, sites: Sequence[Site]) -> tuple[Site, list[tuple[int, int]]] | None:
        """The first site with a NaN or Inf and its ``(row, position)`` pairs; None if all is finite."""
        found: dict[str, list[tuple[int, int]]] = {}

        def look(site: Site, env: Env, steps: Sequence[Step]) -> None:
            for index, step in enumerate(steps):
                count = len(step.tokens)
                bad = ~torch.isfinite(env[site.name][index, :count].flatten(1)).all(-1)
                found.setdefault(site.name, []).extend(
                    (index, step.start + int(token)) for token in bad.nonzero()[:, 0]
                )

        self.sweep(batch, Sweep(tuple(sites), None, self.chunk), look)
        return next(((site, found[site.name]) for site in sites if found.get(site.name)), None)

    @torch.no_grad()
    def unembed(self, h: torch.Tensor) -> torch.Tensor:
        """Final norm, head, softcap and scale on residuals ``[..., width]``; returns ``[..., vocab]``.

        Raises:
            InvalidValue: another width.
        """
        last = [site for site in self.table.sites if site.role == "resid_post"][-1]
        if h.dim() == 0 or h.shape[-1] != last.width:
            raise InvalidValue(f"unembed: expected [..., {last.width}], got {tuple(h.shape)}.")
        flat = h.to(self.device, self.dtype).reshape(1, -1, last.width)
        pieces = []
        for start in range(0, flat.shape[1], self.chunk):
            piece = flat[:, start : start + self.chunk]
            count = piece.shape[1]
            query = min(self.chunk, bucket(count, SMALLEST_CHUNK)) if self.chunk > 1 else 1
            program = self.programs.get(ProgramShape(1, query, query), "plain", (last,))
            env: Env = {last.name: piece.new_zeros(1, query, last.width)}
            env[last.name][:, :count] = piece
            done = program.segment_of(last.name) + 1
            run_segments(program, env, done, len(program.segments) - 1)
            pieces.append(env[LOGITS][0, :count])
        return torch.cat(pieces).reshape(*h.shape[:-1], -1)


def _give(arena: KVArena, batch: PromptBatch) -> None:
    """Write what a batch is given of the positions before."""
    for ours, given in zip(arena.layers, batch.before, strict=False):
        for part, known in zip(ours, given, strict=True):
            part[0, :, : known.shape[1]] = known


def placed(table: SiteTable, fwd_hooks: Iterable[tuple[str, Hook]]) -> list[tuple[Site, Hook]]:
    """The hooks and their sites, a glob's one by one.

    Raises:
        UnknownSite, InvalidValue: no such site; or an entry that is no pair of a site and a hook.
    """
    found: list[tuple[Site, Hook]] = []
    for entry in fwd_hooks:
        given: Any = entry
        if not isinstance(given, Sequence) or len(given) != 2 or not callable(given[1]):
            raise InvalidValue(f"fwd_hooks: {given!r} is no pair of a site's name and a function (value, hook).")
        found += [(site, given[1]) for site in table.select(given[0])]
    return found


def _call_hook(hook: Hook, value: torch.Tensor, site: Site) -> torch.Tensor:
    returned = _bound(hook, value, HookPoint(site.name, site.layer))()
    if returned is None:
        return value
    given: Any = returned
    if not isinstance(given, torch.Tensor):
        raise InvalidValue(f"the hook at {site.name!r} returned {type(given).__name__}; expected a tensor, or None.")
    if returned.shape != value.shape or returned.dtype != value.dtype:
        raise InvalidValue(
            f"the hook at {site.name!r} returned {tuple(returned.shape)} {returned.dtype}; expected "
            f"{tuple(value.shape)} {value.dtype}, or None."
        )
    return returned


def _bound(hook: Hook, value: torch.Tensor, point: HookPoint) -> Callable[[], torch.Tensor | None]:
    """A hook with what it takes: the value and ``hook=``, the value alone, or two things in that order.

    Raises:
        InvalidValue: it takes something else.
    """
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):  # some builtins have none
        return partial(hook, value)
    for call in (partial(hook, value, hook=point), partial(hook, value), partial(hook, value, point)):
        try:
            signature.bind(*call.args, **call.keywords)
        except TypeError:
            continue
        return call
    raise InvalidValue(
        f"the hook at {point.name!r} has the signature {signature}; it is called as hook(value, hook=point) or "
        "hook(value)."
    )
