"""The stage of the state machine: compiled models and oracles, shared by all examples, and the checks around an act."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
import unittest
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, precondition

import djinn_fx as djinn
from djinn_fx.runtime.checkpoint import Checkpoint
from djinn_fx.runtime.pinned import ALIGNMENT
from djinn_fx.runtime.sampling import SamplingSpec
from djinn_fx.runtime.session import Session
from djinn_fx.runtime.stop import Stop
from tests.families import LENGTH, prompt
from tests.oracle import Call, Script
from tests.runtime import acts, progress
from tests.runtime.live import Live, check_memory, holds, nothing_else_changes, settle
from tests.runtime.setups import Setup, compiled, fill, oracle_of, poisoned
from tests.session_script import Point, Shadow, World

MOST = 6  # open sessions
#: Seconds after which a process begins no further example.
SECONDS, BEGAN = float(os.environ.get("DJINN_STATE_SECONDS", "inf")), time.monotonic()

Act = TypeVar("Act", bound=Callable[..., None])
Found = TypeVar("Found")


def some(condition: Callable[[Live], bool]) -> Callable[[Act], Act]:
    """A rule's precondition: it needs a session like this."""
    return precondition(lambda self: any(condition(live) for live in self.lives))


def anyone(_: Live) -> bool:
    return True


def busy(live: Live) -> bool:
    """Its run is unfinished."""
    return live.shadow.busy


def stopped(live: Live) -> bool:
    """Its run stands at a stop."""
    return live.shadow.at is not None


def steered(live: Live) -> bool:
    """There is a handle to try."""
    return bool(live.handles or live.session.steering)


def has_run(live: Live) -> bool:
    """It has a run that was not abandoned."""
    return live.session.run is not None and live.session.run.finish_reason != "closed"


class TimeUpError(unittest.SkipTest):
    """The time for examples is over; Hypothesis ends at once, perhaps saying that this one drew less than another."""


class Stage(RuleBasedStateMachine):
    """Open sessions and their shadows; every act goes through :meth:`acting` or :meth:`refused`."""

    setup: ClassVar[Setup]
    seen: ClassVar[Counter[str]]

    def __init__(self) -> None:
        if time.monotonic() - BEGAN > SECONDS:
            raise TimeUpError("the time for examples is over")
        super().__init__()
        # Threads that wait for each other cost more than tensors of this size, by far where others work beside.
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self.dj, self.oracle = compiled(self.setup), oracle_of(self.setup)
        self.held = ExitStack()
        if self.setup.poison:
            self.held.enter_context(poisoned(self.dj.engine.arena))
        self.lives: list[Live] = []
        self.saved: list[tuple[Checkpoint, Shadow, bool]] = []
        self.numbers, self.keys = itertools.count(), itertools.count()
        self.latest: Live | None = None
        self.sound = True
        self.before = self.dj.memory()["pinned_used"]  # where another example failed, its traceback keeps something
        self.seen["examples"] += 1

    @property
    def world(self) -> World:
        """What the oracle needs to know."""
        return World(self.oracle, self.setup.decode_rows, self.dj.engine.sites)

    @property
    def more(self) -> bool:
        """Whether ``add_sites`` was called."""
        return acts.MORE[0] in self.dj.compiled_sites

    @property
    def free(self) -> int:
        """Rows that can be had: all but those of pinned sessions, since everybody is paused between two acts."""
        return self.setup.rows - sum(live.session.pinned for live in self.lives)

    def pick(self, number: int, condition: Callable[[Live], bool]) -> Live:
        """One of the sessions like this, mostly the one touched last."""
        found = [live for live in self.lives if condition(live)]
        found.sort(key=lambda live: live is not self.latest)
        return found[max(0, number - 3) % len(found)]

    @contextmanager
    def acting(self, *touched: Live) -> Iterator[list[Live]]:
        """Around every act: what it touched is compared, the rest must not change. Sessions it opens are appended."""
        self.sound, all_touched = False, list(touched)
        self.latest = all_touched[-1] if all_touched else self.latest
        left = [live.leaving() for live in touched]
        with nothing_else_changes(self.dj, self.lives, touched, self.setup.unowned):
            yield all_touched
        check_memory(self.dj)
        self.seen.update(f"acts with a session on the {tier}" for tier in {s.tier for s in self.dj.sessions})
        for done in left:
            done()
        self.lives += [live for live in all_touched if live not in self.lives]
        self.lives = [live for live in self.lives if not live.session.closed]
        for live in all_touched:
            if live in self.lives:
                live.check(self.world)
        self.sound = True

    def refused(self, act: Callable[[], object], *lives: Live, error: type[Exception] = djinn.CapacityError) -> None:
        """An act that must fail, and change nothing."""
        with self.acting(*lives), pytest.raises(error):
            act()

    def roomy(self, needed: int, act: Callable[[], Found]) -> Found | None:
        """An act that needs room in a tier below the device; None if it was refused because there is none.

        Args:
            needed: bytes of host memory in one piece that make it certain.
            act: what may be refused.
        """
        settle(self.dj)
        self.dj.engine.pool.used  # noqa: B018 -- it takes back what was dropped
        pool = self.dj.engine.pool
        free = [size for slab in pool._slabs for _, size in slab.free]
        certain = needed + ALIGNMENT <= max([*free, pool.limit - pool.capacity])
        try:
            return act()
        except djinn.CapacityError:
            if certain:
                raise
            self.seen["refusals for want of room"] += 1
            return None

    def newcomer(self, count: int, act: Callable[[], Found], *stays: Live) -> Found | None:
        """An act that needs ``count`` more rows; None if every tier was full."""
        arena = self.dj.engine.arena
        moving = [live.session for live in self.lives if live.session.resident and not live.session.pinned]
        sizes = [s.extent * arena.bytes_per_position for s in moving if s not in {live.session for live in stays}]
        missing = max(0, count - arena.free_rows)
        return self.roomy(sum(sorted(sizes)[-missing:]) if missing else -ALIGNMENT, act)

    def homeless(self, live: Live) -> bool:
        """Whether a session is away and no row can be had for it."""
        return not live.session.resident and not self.free

    def adopt(self, session: Session, shadow: Shadow) -> Live:
        """Follow a session."""
        return Live(f"session {next(self.numbers)}", shadow, session)

    def armed(self, points: list[djinn.Breakpoint]) -> list[Point]:
        """Breakpoints in force."""
        return [Point(p, frozenset(site.name for site in self.dj.sites.select(p.site)), p.times) for p in points]

    def group(self, mask: int) -> list[Live]:
        """Unfinished runs that find rows; one alone unless bits are apart from company."""
        found = [live for index, live in enumerate(filter(busy, self.lives)) if mask >> index & 1]
        found = found or [self.pick(mask, busy)]
        found = found if self.setup.invariant else found[:1]
        return [live for live in found if not self.homeless(live)]

    # -- acts that rules share -----------------------------------------------------------------

    def open(self, seed: int) -> Live | None:
        """A new session; None if there is no room."""
        if not self.free:
            self.refused(self.dj.session)
        elif len(self.lives) < MOST:
            with self.acting() as opened:
                session = self.newcomer(1, lambda: self.dj.session(seed))
                if session is not None:
                    opened.append(self.adopt(session, Shadow(Script(seeds=((0, seed),)))))
            return opened[0] if opened else None
        return None

    def close(self, live: Live) -> None:
        """A session and its forks close."""
        with self.acting(*live.family()):
            live.session.close()
            for member in live.family():
                member.equal("closed", member.session.closed, True)

    def begin(self, live: Live, call: Call, points: list[djinn.Breakpoint], capture: tuple[str, ...]) -> bool:
        """A call; False if it had to be refused."""
        tokens, held = list(call.tokens), len(live.session.tokens)

        def begin() -> None:
            shared: dict[str, Any] = {"breakpoints": points, "capture": capture}
            if call.kind == "forward":
                live.session.forward(tokens, **shared)
            else:
                shared |= {"stop_token_ids": call.ends, "output_logits": True, **vars(call.sampling)}
                live.session.generate(tokens or None, max_new_tokens=call.new, **shared)

        error: type[Exception] | None = djinn.SessionBusy if live.shadow.busy else None
        if error is None and held + len(tokens) > LENGTH:
            error = djinn.CapacityError
        if error is None and not held and not tokens:
            error = djinn.InvalidValue
        if error is not None:
            self.refused(begin, live, error=error)
            return False
        with self.acting(live):
            begin()
            live.shadow.begin(self.world, call, self.armed(points), capture)
        return True

    def advance_one(self, live: Live, fails: bool = False) -> None:
        """A run to its next stop, or to its end; where a predicate ``fails`` once, the run goes on from there."""
        if live.waits:
            with self.acting(live):
                live.equal("next(run) gives the stop that waits", live.take_waiting(next(live.run)), True)
            return
        if self.homeless(live):
            self.refused(lambda: next(live.run, None), live)
            return
        with self.acting(live):
            live.shadow.advance(self.world)
            acts.MOODY.fails = fails
            try:
                stop = next(live.run, None)
            except djinn.InvalidPredicate:
                acts.MOODY.fails = False
                stop = next(live.run, None)
            finally:
                acts.MOODY.fails = False
            live.equal("what next(run) gives", stop, live.run.stop)

    def at_a_stop(self, who: int) -> Live:
        """A session whose run stands at a stop; one is brought there if there is none."""
        if not any(map(stopped, self.lives)):
            while not self.free or len(self.lives) >= MOST or self.open(who) is None:
                self.close(self.lives[who % len(self.lives)])
            live = self.lives[-1]
            call = Call("generate", prompt(who, 9), 5, SamplingSpec(do_sample=bool(who % 2)))
            self.begin(live, call, [djinn.break_at("resid_post.*")], ("logits",))
            for _ in range(1 + who % 5):
                self.advance_one(live)
        return self.pick(who, stopped)

    def touch(self, live: Live, kind: str | None, seed: int = 0) -> None:
        """Change what a stop holds, where the session stands at one."""
        now = live.shadow.look(self.world).stop
        if kind is not None and now is not None:
            with self.acting(live):
                acts.write(live.stop, kind, seed, now[2])
                live.shadow.write(self.world, live.stop.value)

    def then(self, live: Live, what: str) -> None:
        """What follows an act: nothing, the next stop, or the end."""
        if live in self.lives and live.shadow.busy:
            if what == "advance":
                self.advance_one(live)
            elif what == "end":
                self.finish(live)

    def finish(self, live: Live) -> None:
        """Take a session's run to its end."""
        if live.shadow.busy and self.homeless(live):
            self.refused(live.run.result, live)
            return
        with self.acting(live):
            if live.shadow.busy:
                live.shadow.to_end(self.world)
            live.check_result(self.world, live.run.result())

    def catch_up(self, live: Live, seen: Stop | None) -> None:
        """A run that others were driven with may have gone further than the last stop seen."""
        run = live.run
        if run.finished or (run.stop is not None and run.stop is not seen):
            live.shadow.advance(self.world)
            live.unseen = run.stop
        elif run.stop is None:
            live.shadow.paused_at(self.world, live.session.length, len(live.session.tokens))

    def through_file(self, made: Checkpoint, shadow: Shadow) -> Checkpoint:
        """Write a checkpoint and read it again; predicates that no file can hold fall away, with a warning."""
        kept = [point for point in shadow.points if point.spec.when is not acts.MOODY]
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            made = Checkpoint.load(made.save(Path(folder) / "session.safetensors"))
        assert len(said) == len(shadow.points) - len(kept), [str(one.message) for one in said]
        shadow.points = kept
        return made

    def teardown(self) -> None:
        """Every run to its end, every session closed; nothing may stay behind."""
        engine = self.dj.engine
        try:
            if self.sound:
                for live in list(self.lives):
                    self.end(live)
                settle(self.dj)
                assert engine.arena.free_rows == self.setup.rows and not engine.sessions
                assert all(holds(engine.arena, row, self.setup.unowned) for row in range(self.setup.rows))
                self.saved.clear()
                memory = self.dj.memory()
                assert memory["pinned_used"] <= self.before and memory["disk"] == 0, memory
                progress.note(self.setup, self.seen, time.monotonic() - BEGAN)
        finally:
            for session in list(engine.sessions):
                session.close()
            self.held.close()
            for row in range(engine.arena.rows + 1):
                fill(engine.arena, row, 0.0)
            engine.sites = engine.table.select(acts.SITES)
            torch.set_num_threads(self.threads)

    def end(self, live: Live) -> None:
        """Take a session's run to its end, then close it, unless it closed with another."""
        if live not in self.lives:
            return
        live.check(self.world)
        if has_run(live) and not self.homeless(live):
            self.finish(live)
        self.close(live)
