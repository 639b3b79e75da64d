"""What comes next for a run: its next step, which rows decode together, what fires, when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from djinn_fx.errors import InternalError, InvalidValue
from djinn_fx.runtime.flight import Flight
from djinn_fx.runtime.programs import bucket, chunk_size
from djinn_fx.runtime.steps import UNKNOWN, Step
from djinn_fx.runtime.tables import BatchRow, Wants
from djinn_fx.sites import Site, SiteTable, require_compiled
from djinn_fx.specs import ProgramShape

if TYPE_CHECKING:
    from djinn_fx.runtime.options import EngineOptions
    from djinn_fx.runtime.run import Run
    from djinn_fx.runtime.session import Session


def flight_of(run: Run) -> Flight:
    """The step in the air of a run that has one."""
    if run.flight is None:
        raise InternalError("a run without a step in the air was asked for it")
    return run.flight


def capturable(table: SiteTable, compiled: Sequence[str], capture: Iterable[str]) -> tuple[Site, ...]:
    """Resolve ``capture=``; raises UnknownSite and SiteNotCompiled."""
    chosen = table.select(capture) if isinstance(capture, str) else table.select(list(capture))
    return tuple(require_compiled(site, compiled) for site in chosen)


def require_tokens(session: Session, prompt: Sequence[int], kind: str) -> None:
    """Raise :class:`InvalidValue` where a call has nothing to forward."""
    if prompt or (kind == "generate" and session.token_list):
        return
    raise InvalidValue(
        "the prompt is empty. Give at least one token"
        + ("; only generate() on a session that holds tokens goes without." if kind == "generate" else ".")
    )


def next_is_decode(run: Run) -> bool:
    """Whether the next step is a decode step: one token is left to forward, and it was sampled."""
    session = run.session
    return session.length == len(session.token_list) - 1 and session.sampled[session.length]


def next_chunk(run: Run, options: EngineOptions) -> Step:
    """The next prompt chunk, on the fixed grid that starts at the call's first position."""
    session, size = run.session, options.prefill_chunk
    start = session.length
    grid = run.begin + ((start - run.begin) // size + 1) * size
    stop = min(grid, len(session.token_list))
    query = chunk_size(stop - start, size, options.chunk_step)
    keep = query if run.options.kind == "forward" else 1
    return make_step(run, start, stop, ProgramShape(1, query, keep))


def make_step(run: Run, start: int, stop: int, shape: ProgramShape) -> Step:
    """A fresh step over positions ``[start, stop)`` under the session's current steering."""
    session = run.session
    return Step(
        start=start,
        tokens=tuple(session.token_list[start:stop]),
        sampled=tuple(session.sampled[start:stop]),
        last_prompt=last_prompt(run),
        shape=shape,
        steering=((-1, session.steering),),
    )


def last_prompt(run: Run) -> int:
    """Position of the call's last prompt token, -1 if it gave none."""
    return run.prompt_end - 1 if run.prompt_end > run.prompt_start else -1


def decode_groups(runs: Sequence[Run], beside: int, options: EngineOptions) -> Iterator[list[Run]]:
    """Group runs into decode batches, giving each fresh one its step.

    A step that was interrupted runs again in the row bucket it first ran in; fresh ones take the bucket of the batch,
    in which ``beside`` others ride.
    """
    redone = [run for run in runs if run.flight is not None]
    fresh = [run for run in runs if run.flight is None]
    shape = decode_shape(len(runs) + beside, options)
    for run in fresh:
        length = run.session.length
        run.flight = Flight(make_step(run, length, length + 1, shape))
    by_rows: dict[int, list[Run]] = {}
    for run in [*redone, *fresh]:
        by_rows.setdefault(flight_of(run).step.shape.rows, []).append(run)
    for rows, group in by_rows.items():
        for first in range(0, len(group), rows):
            yield group[first : first + rows]


def decode_shape(count: int, options: EngineOptions) -> ProgramShape:
    """The program in which ``count`` runs take a fresh step together."""
    invariant = bucket(options.max_sessions)
    return ProgramShape(invariant if options.batch_invariant else min(bucket(count), options.max_bucket), 1, 1)


def wants(run: Run) -> Wants:
    """What may be asked of the step that a run decodes, once it ran."""
    watching = not run.silent and any(point.left != 0 for point in run.breakpoints)
    if run.capture or run.target is not None or run.halting or watching:
        return "taps"
    return "logits" if run.options.output_logits or run.options.sampling.do_sample else "token"


def batch_row(run: Run) -> BatchRow:
    """The step in the air of a run, as a row of a decode batch."""
    return BatchRow(run.session.row, flight_of(run).step, wants(run))


def going(runs: Sequence[Run], options: EngineOptions) -> list[Run]:
    """Of runs that decode, those with another step to come: they have no values yet, or these give no last token."""
    return [run for run in runs if flight_of(run).values is None or not _ends(run, options)]


def following(runs: Sequence[Run], shape: ProgramShape, sites: Sequence[Site]) -> list[BatchRow] | None:
    """What may be decoded next, before it is known what the steps in the air came to.

    Args:
        runs: those that are :func:`going` on: with values their step is launched, without it still has to be.
        shape: of the next step.
        sites: the compiled sites.

    Returns:
        a row for each run that will go on for sure (it may turn out to stop all the same), and for each one without
        values; None where one of these has another shape.
    """
    rows: list[BatchRow] = []
    for run in runs:
        step = flight_of(run).step
        if flight_of(run).values is not None:
            if run.options.sampling.do_sample or _stops(run, sites):
                continue
            step = _next_step(run, step, shape)
        if step.shape != shape:
            return None
        rows.append(BatchRow(run.session.row, step, wants(run)))
    return rows


def drawn_together(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs whose steps' tokens are to be drawn, those drawn alike together."""
    alike: dict[object, list[Run]] = {}
    for run in runs:
        if run.options.sampling.do_sample and flight_of(run).values is not None:
            alike.setdefault(run.options.sampling, []).append(run)
    return list(alike.values())


def joins(run: Run) -> bool:
    """Whether a run that computes a prompt chunk will decode next, if nothing stops it."""
    flight = run.flight
    last = flight is not None and flight.step.stop == len(run.session.token_list)
    return last and run.options.kind == "generate" and run.options.max_new_tokens > 1


def left(run: Run, options: EngineOptions) -> int:
    """How many tokens a run draws at most from here on."""
    tokens, places = _tokens_left(run), options.max_length - run.session.length
    return tokens if tokens < places else places


def _tokens_left(run: Run) -> int:
    """How many tokens a run may still draw, whatever room there is."""
    known = len(run.session.token_list) if run.end is None else run.end
    return run.options.max_new_tokens - (known - run.prompt_end if known > run.prompt_end else 0)


def _ends(run: Run, options: EngineOptions) -> bool:
    """Whether the token of the step in the air is the run's last one, whatever it is."""
    return left(run, options) <= 1


def _stops(run: Run, sites: Sequence[Site]) -> bool:
    """Whether a run stops in the step in the air for sure."""
    flight = flight_of(run)
    if run.target is not None or run.halting:
        return bool(watched(run, flight, sites))
    if run.silent or not run.breakpoints:
        return False
    sure = [p for p in run.breakpoints if p.spec.when is None and any(flight.step.matching(p.spec.positions))]
    return any(point.watches(site) for point in sure for site in sites if site.order > flight.passed)


def _next_step(run: Run, step: Step, shape: ProgramShape) -> Step:
    """The decode step after ``step``, its token unknown."""
    return Step(step.stop, (UNKNOWN,), (True,), step.last_prompt, shape, ((-1, run.session.steering),))


def watched(run: Run, flight: Flight, sites: Sequence[Site]) -> list[Site]:
    """The sites ahead at which the run may stop in this step, in execution order."""
    halting, target = run.halting, run.target
    if target is None and not halting and (run.silent or not run.breakpoints):
        return []
    ahead = [site for site in sites if site.order > flight.passed]
    if halting:
        return ahead[:1]
    if target is not None:
        step = len(run.session.journal)
        due = [s for s in ahead if step > target.step or (step == target.step and s.order >= target.order)]
        return due[:1]
    return [site for site in ahead if any(point.watches(site) for point in run.breakpoints)]


def fired(run: Run, flight: Flight, site: Site, values: Callable[[list[int]], torch.Tensor]) -> tuple[int, ...] | None:
    """Positions at which the run's breakpoints fire at ``site``; None for no stop.

    Each breakpoint that fires counts one delivered stop. Predicates are the user's code: no lock is held, and what
    they look at are copies, ``values`` of some tokens, which no other thread's step overwrites.
    """
    if run.target is not None or run.halting:
        return ()
    answers = flight.answers or {}
    found = [
        (point, point.fired(site, flight.step, values, answers.get((id(point), site.name))))
        for point in run.breakpoints
        if point.watches(site)
    ]
    for point, positions in found:
        if positions:
            point.delivered()
    if len(found) == 1:
        return found[0][1] or None
    return tuple(sorted({position for _, positions in found for position in positions})) or None


def ending(run: Run, token: int | None, length: int, options: EngineOptions) -> tuple[bool, str | None]:
    """Whether a run ends, and why, with a step that is about to become history.

    Args:
        run: the run.
        token: the token that the step draws; None if it draws none and is the last one.
        length: positions that are forwarded then.
        options: the engine's.
    """
    if token is None:
        return True, None
    if token in options.eos:
        return True, "eos"
    if token in run.options.stop_token_ids:
        return True, "stop_token"
    over = _tokens_left(run) <= 1 or length >= options.max_length
    return over, "length" if over else None
