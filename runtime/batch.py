"""Driving many runs together: ``as_stopped``, ``results`` and batched generation with a queue."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from djinn_fx.errors import CapacityError, InvalidValue
from djinn_fx.runtime.claims import quiet
from djinn_fx.runtime.results import Result
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.sampling import checked_seed
from djinn_fx.runtime.session import Session
from djinn_fx.runtime.stop import Stop
from djinn_fx.sites import SiteTable
from djinn_fx.specs import Edit

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine


def as_stopped(engine: Engine, runs: Sequence[Run]) -> Iterator[Stop]:
    """Drive runs together; yield every stop of a step, in the order given, before the next step.

    The next step resumes every yielded stop that is not held. No step runs while the caller holds control. Ends when
    every run is finished or held. Left early, another call goes on with the stops not yielded yet.
    """
    _require_one_engine(engine, runs)
    return _stops(engine, runs)


def _stops(engine: Engine, runs: Sequence[Run]) -> Iterator[Stop]:
    while True:
        found = [stop for run in runs if (stop := run.stop) is not None and stop.waiting]
        if not found:
            moving = [run for run in runs if not run.finished and ((stop := run.stop) is None or not stop.held)]
            if not moving:
                return
            seats = _seats(engine, moving)
            if seats >= len(moving):
                found = engine.iterate(moving)
            else:
                waves = [moving[first : first + seats] for first in range(0, len(moving), seats)]
                found = [stop for wave in waves for stop in engine.iterate([run for run in wave if not run.finished])]
        for stop in found:
            if stop.current:
                yield stop.handed_out()


def _seats(engine: Engine, runs: Sequence[Run]) -> int:
    """How many of these runs may take a step together: those that have rows already in any case."""
    if all(run.session.resident for run in runs):
        return len(runs)
    with engine.lock:
        return max(1, engine.tiers.seats({run.session for run in runs}))


def results(engine: Engine, runs: Sequence[Run]) -> list[Result]:
    """Drive runs together to their ends, passing over breakpoints; returns their results in order."""
    _require_one_engine(engine, runs)
    with quiet(runs):
        while moving := [run for run in runs if not run.finished]:
            engine.iterate(moving[: _seats(engine, moving)])  # those beyond the rows come when these are done
    return [engine.result_of(run) for run in runs]


def listed(runs: Iterable[Run]) -> list[Run]:
    """The runs as a list. A run is itself an iterator, of stops, which must not be mistaken for a list of runs.

    Raises:
        InvalidValue: something else than runs.
    """
    if isinstance(runs, Run):
        raise InvalidValue("a list of runs was expected, but this is one run: give [run].")
    found = list(runs)
    for index, run in enumerate(found):
        given: Any = run
        if not isinstance(given, Run):
            hint = " Give its run: stop.run." if isinstance(given, Stop) else ""
            raise InvalidValue(f"a list of runs was expected, but entry {index} is a {type(given).__name__}.{hint}")
    return found


def _require_one_engine(engine: Engine, runs: Sequence[Run]) -> None:
    if len({id(run) for run in runs}) < len(runs):
        raise InvalidValue("a run is named twice; give each run once.")
    if any(run.session.engine is not engine for run in runs):
        raise InvalidValue("a run belongs to another compiled model; drive each model's runs with its own dj.")
    for run in runs:
        if run.finish_reason == "closed":
            run.session.require_open()
            raise InvalidValue("a run was abandoned with close(); leave it out.")


@dataclass(frozen=True)
class Request:
    """One prompt of a batched generation.

    Attributes:
        index: place in the caller's list.
        inputs: the prompt.
        edits: what steers it.
        seed: its session's seed.
    """

    index: int
    inputs: object
    edits: tuple[Edit, ...]
    seed: int


def requests(
    prompts: Sequence[object],
    edits: Edit | Sequence[Edit] | Sequence[Sequence[Edit]] | None,
    seeds: Sequence[int] | None,
    table: SiteTable,
) -> list[Request]:
    """Pair prompts with their edits and seeds.

    Args:
        prompts: one entry a prompt.
        edits: one list for all, or one list per prompt; one Edit for all.
        seeds: one per prompt; 0, 1, 2... if None.
        table: the model's sites.

    Raises:
        InvalidValue: lists of other lengths, something else than Edits, or two at one site.
        UnknownSite: an edit of no such site.
    """
    if seeds is not None and len(seeds) != len(prompts):
        raise InvalidValue(f"{len(seeds)} seeds for {len(prompts)} prompts; give one each.")
    shared: list[Edit] = []
    own: list[Sequence[Edit]] = []
    for item in (edits,) if isinstance(edits, Edit) else edits or ():
        if isinstance(item, Edit):
            shared.append(item)
        else:
            own.append(item)
    if own and (shared or len(own) != len(prompts)):
        raise InvalidValue(f"edits: give one list of Edits for all prompts, or {len(prompts)} lists, one per prompt.")
    for several in own or [shared]:
        _require_one_per_site(several, table)
    return [
        Request(
            index,
            prompt,
            tuple(own[index]) if own else tuple(shared),
            index if seeds is None else checked_seed(seeds[index]),
        )
        for index, prompt in enumerate(prompts)
    ]


def _require_one_per_site(edits: Sequence[Edit], table: SiteTable) -> None:
    sites: set[str] = set()
    for edit in edits:
        given: Any = edit
        if not isinstance(given, Edit):
            raise InvalidValue(f"edits: {given!r} is no djinn.Edit.")
        name = table.single(edit.site).name
        if name in sites:
            raise InvalidValue(
                f"edits: two Edits at {name!r}, of which only one would act. Put both into one Edit({name!r}, ...)."
            )
        sites.add(name)


def generate(
    engine: Engine,
    todo: Iterable[Request],
    begin: Callable[[Session, Request], Run],
) -> list[Result]:
    """Run requests batched, as many at a time as rows can be had; a breakpoint that fires ends its row.

    Args:
        engine: the model's engine.
        todo: the requests.
        begin: starts a request's run on its session.

    Raises:
        CapacityError: no row is free at all.
    """
    queue, live, done = deque(todo), dict[int, Run](), dict[int, Result]()
    try:
        while queue or live:
            _admit(engine, queue, live, begin)
            runs = list(live.values())
            stopped = engine.iterate(runs[: _seats(engine, runs)])
            for stop in stopped:
                stop.run.finish("breakpoint")
            for index in [index for index, run in live.items() if run.finished]:
                run = live.pop(index)
                result = engine.result_of(run)
                done[index] = replace(result, finish_reason=run.finish_reason)
                run.session.close()
    finally:
        for run in live.values():
            run.session.close()
    return [done[index] for index in sorted(done)]


def _admit(
    engine: Engine, queue: deque[Request], live: dict[int, Run], begin: Callable[[Session, Request], Run]
) -> None:
    while queue and len(live) < engine.arena.rows:
        try:
            session = engine.open_session(queue[0].seed, [run.session for run in live.values()])
        except CapacityError:
            break  # the next row that comes free is taken then
        request = queue.popleft()
        try:
            for edit in request.edits:
                session.steer(edit)
            live[request.index] = run = begin(session, request)
            run.owner = threading.get_ident()  # other threads wait for its row, they do not take it between two steps
        except BaseException:
            session.close()
            raise
    if not live:
        raise CapacityError(
            f"no KV row is free: open sessions hold all {engine.arena.rows}, pinned, driven at this moment, or with "
            "no place left to move to. Close or offload() one, or compile with a larger max_sessions, pinned_bytes or "
            "disk_bytes."
        )
