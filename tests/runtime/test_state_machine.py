"""Sessions in any order of acts, each compared bit for bit with an oracle that knows no engine (DESIGN 9.5).

After every act the sessions it touched are compared (tokens, stop, value, KV, steering), no other session's KV may have
changed by a bit, and free rows are zero. When an example ends, every run is taken to its end and compared again.

More examples, new ones each time, and on a GPU:

    DJINN_STATE_EXAMPLES=2000 HYPOTHESIS_PROFILE=explore nice python -m pytest tests/runtime/test_state_machine.py
    DJINN_TEST_DEVICE=cuda python -m pytest tests/runtime/test_state_machine.py
"""

from __future__ import annotations

import itertools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import djinn_fx as djinn
from djinn_fx.runtime.checkpoint import Checkpoint
from djinn_fx.runtime.stop import Stop
from tests.families import CHUNK, EOS, LENGTH, ROWS, family
from tests.oracle import Call, Oracle
from tests.runtime import acts
from tests.runtime.live import Live, nothing_else_changes
from tests.session_script import Point, Shadow, Target, World

DEVICE = os.environ.get("DJINN_TEST_DEVICE", "cpu")
EXAMPLES = int(os.environ.get("DJINN_STATE_EXAMPLES", "200"))
Act = TypeVar("Act", bound=Callable[..., None])
RANK = 3
MOST = 6  # open sessions


@cache
def compiled(name: str, invariant: bool) -> djinn.Dj:
    dj: djinn.Dj = djinn.compile(
        family(name, DEVICE),
        sites=acts.SITES,
        max_sessions=ROWS,
        max_length=LENGTH,
        prefill_chunk=CHUNK,
        edit_rank=RANK,
        batch_invariant=invariant,
        verify=False,
    )
    return dj


@cache
def oracle_of(name: str) -> Oracle:
    return Oracle(family(name, DEVICE), length=LENGTH, chunk=CHUNK, rank=RANK, eos=[EOS])


def some(condition: Callable[[Live], bool]) -> Callable[[Act], Act]:
    """A rule's precondition: it needs a session like this."""
    return precondition(lambda self: any(condition(live) for live in self.lives))


def busy(live: Live) -> bool:
    return live.shadow.busy


def stopped(live: Live) -> bool:
    return live.shadow.at is not None


def anyone(_: Live) -> bool:
    return True


def steered(live: Live) -> bool:
    return bool(live.handles or live.session.steering)


def has_run(live: Live) -> bool:
    return live.session.run is not None and live.session.run.finish_reason != "closed"


class Sessions(RuleBasedStateMachine):
    """What users do; ``model`` and ``invariant`` are chosen by the tests below."""

    model: ClassVar[str]
    invariant: ClassVar[bool]

    def __init__(self) -> None:
        super().__init__()
        self.dj, self.oracle = compiled(self.model, self.invariant), oracle_of(self.model)
        self.lives: list[Live] = []
        self.saved: list[tuple[Checkpoint, Shadow, bool]] = []
        self.numbers, self.keys = itertools.count(), itertools.count()
        self.sound = True

    @property
    def world(self) -> World:
        return World(self.oracle, ROWS if self.invariant else 1, self.dj.engine.sites)

    @property
    def more(self) -> bool:
        """Whether ``add_sites`` was called."""
        return acts.MORE[0] in self.dj.compiled_sites

    def pick(self, number: int, condition: Callable[[Live], bool]) -> Live:
        found = [live for live in self.lives if condition(live)]
        return found[number % len(found)]

    @contextmanager
    def acting(self, *touched: Live) -> Iterator[list[Live]]:
        """Around every act: what it touched is compared, the rest must not change. Sessions it opens are appended."""
        self.sound, all_touched = False, list(touched)
        left = [live.leaving() for live in touched]
        with nothing_else_changes(self.dj, self.lives, touched):
            yield all_touched
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

    def homeless(self, live: Live) -> bool:
        """Whether a session is offloaded and no row is free for it."""
        return not live.session.resident and not self.dj.engine.arena.free_rows

    def adopt(self, session: Any, shadow: Shadow) -> Live:
        return Live(f"#{next(self.numbers)}", session, shadow)

    # -- calls ---------------------------------------------------------------------------------

    @initialize(seed=acts.SEEDS, call=acts.calls(), points=st.lists(acts.breakpoints(), max_size=2))
    def start(self, seed: int, call: Call, points: list[djinn.Breakpoint]) -> None:
        self.open(seed)
        self.call(0, call, points, 0)
        if self.lives[0].shadow.busy:
            self.advance(0)

    @rule(seed=acts.SEEDS)
    def open(self, seed: int) -> None:
        if not self.dj.engine.arena.free_rows:
            self.refused(self.dj.session)
        elif len(self.lives) < MOST:
            with self.acting() as opened:
                live = self.adopt(self.dj.session(seed), Shadow())
                live.shadow.script = replace(live.shadow.script, seeds=((0, seed),))
                opened.append(live)

    @some(anyone)
    @rule(who=acts.PICK, call=acts.calls(), points=st.lists(acts.breakpoints(), max_size=3), capture=acts.PICK)
    def call(self, who: int, call: Call, points: list[djinn.Breakpoint], capture: int) -> None:
        live = self.pick(who, anyone)
        names = ((), ("resid_post.1", "logits"), ("attn_q.1",))[capture % 3]
        tokens = list(call.tokens)

        def begin() -> None:
            if call.kind == "forward":
                live.session.forward(tokens, breakpoints=points, capture=names)
                return
            spec = vars(call.sampling)
            live.session.generate(
                tokens or None,
                max_new_tokens=call.new,
                stop_token_ids=call.ends,
                breakpoints=points,
                capture=names,
                output_logits=True,
                **spec,
            )

        held = len(live.session.tokens)
        if live.shadow.busy:
            self.refused(begin, live, error=djinn.SessionBusy)
        elif held + len(tokens) > LENGTH:
            self.refused(begin, live)
        elif not held and not tokens:
            self.refused(begin, live, error=djinn.InvalidValue)
        else:
            armed = [Point(p, frozenset(s.name for s in self.dj.sites.select(p.site)), p.times) for p in points]
            with self.acting(live):
                begin()
                live.shadow.begin(self.world, call, armed, names)

    @some(busy)
    @rule(who=acts.PICK)
    def advance(self, who: int) -> None:
        live = self.pick(who, busy)
        if self.homeless(live):
            self.refused(lambda: next(live.run, None), live)
            return
        with self.acting(live):
            live.shadow.advance(self.world)
            live.equal("what next(run) gives", next(live.run, None), live.run.stop)

    @some(has_run)
    @rule(who=acts.PICK)
    def finish(self, who: int) -> None:
        live = self.pick(who, has_run)
        if live.shadow.busy and self.homeless(live):
            self.refused(live.run.result, live)
            return
        self._finish(live)

    @some(busy)
    @rule(who=acts.PICK)
    def close_run(self, who: int) -> None:
        live = self.pick(who, busy)
        with self.acting(live):
            live.run.close()
            live.shadow.close_run(self.world)
        self.refused(lambda: next(live.run, None), live, error=djinn.SessionClosed)

    # -- at a stop -----------------------------------------------------------------------------

    @some(stopped)
    @rule(who=acts.PICK, kind=acts.WRITES, seed=acts.SEEDS)
    def write(self, who: int, kind: str, seed: int) -> None:
        live = self.pick(who, stopped)
        with self.acting(live):
            now = live.shadow.look(self.world).stop
            assert now is not None
            acts.write(live.stop, kind, seed, now[2])
            live.shadow.write(self.world, live.stop.value)

    @some(stopped)
    @rule(who=acts.PICK, tokens=st.integers(0, 3))
    def step(self, who: int, tokens: int) -> None:
        live = self.pick(who, stopped)
        stop, now = live.stop, live.shadow.look(self.world).stop
        if self.homeless(live):
            self.refused(lambda: stop.step(tokens), live)
            return
        assert now is not None
        with self.acting(live):
            if tokens:
                live.shadow.to_target(self.world, Target(now[0].index + tokens, now[1].order))
            else:
                live.shadow.to_next(self.world)
            live.equal("what stop.step() gives", stop.step(tokens=tokens), live.run.stop)

    @some(stopped)
    @rule(who=acts.PICK, seeds=st.lists(acts.SEEDS, min_size=1, max_size=2), own=st.booleans())
    def fork(self, who: int, seeds: list[int], own: bool) -> None:
        live = self.pick(who, stopped)
        given = seeds if own else None
        if self.dj.engine.arena.free_rows < len(seeds) + (not live.session.resident):
            self.refused(lambda: live.stop.fork(len(seeds), given), live)
        elif len(self.lives) + len(seeds) <= MOST:
            with self.acting(live) as touched:
                for seed, stop in zip(seeds, live.stop.fork(len(seeds), given), strict=True):
                    child = self.adopt(stop.session, live.shadow.fork(self.world, seed if own else None))
                    child.equal("the fork's stop", stop, child.run.stop)
                    live.children.append(child)
                    touched.append(child)

    @some(lambda live: bool(live.stale))
    @rule(who=acts.PICK)
    def use_stale(self, who: int) -> None:
        live = self.pick(who, lambda live: bool(live.stale))
        stop, shown = live.stale[-1]
        with self.acting(live):
            stop.value.neg_()
            live.stale[-1] = (stop, -shown)
            for act in (lambda: setattr(stop, "value", shown), stop.step, stop.fork, stop.checkpoint, stop.hold):
                with pytest.raises(djinn.StaleStop):
                    act()

    @some(has_run)
    @rule(who=acts.PICK, back=st.integers(0, 12), site=st.sampled_from((*acts.NAMES, None)))
    def rewind(self, who: int, back: int, site: str | None) -> None:
        live = self.pick(who, has_run)
        played = live.shadow.look(self.world)
        steps = played.steps[played.first :]
        if not steps:
            self.refused(lambda: live.run.rewind(played.length), live, error=djinn.InvalidValue)
            return
        first, last = steps[0].start, steps[-1].stop - 1
        position = last - back % (last - first + 1)
        if self.homeless(live):
            self.refused(lambda: live.run.rewind(position, site), live)
            return
        with self.acting(live):
            live.shadow.rewind(self.world, position, self.dj.sites.get(site) if site else self.world.sites[0])
            live.equal("what rewind() gives", live.run.rewind(position, site), live.run.stop)

    # -- steering ------------------------------------------------------------------------------

    @some(anyone)
    @rule(who=acts.PICK, site=st.sampled_from((*acts.NAMES, *acts.MORE)), edit=acts.edits(), again=st.booleans())
    def steer(self, who: int, site: str, edit: dict[str, Any], again: bool) -> None:
        live = self.pick(who, anyone)
        made = acts.make_edit(site, self.dj.sites.get(site).width, **edit)
        if site not in self.dj.compiled_sites:
            self.refused(lambda: live.session.steer(made), live, error=djinn.SiteNotCompiled)
        elif again and self.homeless(live):
            self.refused(lambda: live.session.steer(made, kv="recompute"), live)
        else:
            with self.acting(live):
                key = next(self.keys)
                live.handles.append((live.session.steer(made, kv="recompute" if again else "keep"), key))
                (live.shadow.recompute if again else live.shadow.steer)(self.world, site, made, key)

    @some(steered)
    @rule(who=acts.PICK, which=acts.PICK, strength=st.sampled_from((None, 0.0, 0.5, 1.0, -1.0)))
    def change(self, who: int, which: int, strength: float | None) -> None:
        """Change an edit's strength, or remove it."""
        live = self.pick(who, steered)
        now = live.shadow.steering()
        found = [*live.handles, *((handle, now[site][1]) for site, handle in live.session.handles.items())]
        handle, key = found[which % len(found)]
        edit, current = now.get(handle.site, (None, None))
        if current != key or edit is None:
            if strength is not None:
                self.refused(lambda: setattr(handle, "strength", strength), live, error=djinn.InvalidValue)
            handle.remove()
            return
        with self.acting(live):
            if strength is None:
                handle.remove()
                live.shadow.steer(self.world, handle.site, None, key)
            else:
                handle.strength = strength
                live.shadow.steer(self.world, handle.site, replace(edit, strength=strength), key)

    # -- residence -----------------------------------------------------------------------------

    @some(lambda live: live.session.resident)
    @rule(who=acts.PICK)
    def offload(self, who: int) -> None:
        live = self.pick(who, lambda live: live.session.resident)
        with self.acting(live):
            live.session.offload()
            assert not live.session.resident

    @some(anyone)
    @rule(who=acts.PICK)
    def close(self, who: int) -> None:
        live = self.pick(who, anyone)
        with self.acting(*live.family()):
            live.session.close()
            for member in live.family():
                member.equal("closed", member.session.closed, True)

    @some(anyone)
    @rule(who=acts.PICK)
    def checkpoint(self, who: int) -> None:
        live = self.pick(who, anyone)
        with self.acting(live):
            made = live.stop.checkpoint() if stopped(live) and who % 2 else live.session.checkpoint()
            self.saved = [*self.saved[-2:], (made, live.shadow.copy(), self.more)]

    @precondition(lambda self: bool(self.saved))
    @rule(which=acts.PICK, through_file=st.booleans(), point=st.none() | acts.breakpoints())
    def restore(self, which: int, through_file: bool, point: djinn.Breakpoint | None) -> None:
        made, shadow, more_then = self.saved[which % len(self.saved)]
        shadow = shadow.copy()
        if not self.dj.engine.arena.free_rows:
            self.refused(lambda: self.dj.restore(made))
            return
        if len(self.lives) >= MOST:
            return
        if through_file:
            made = self.through_file(made, shadow)
        if more_then != self.more:
            self.refused(lambda: self.dj.restore(made), error=djinn.CheckpointError)
        more = [point] if point and shadow.script.calls else []
        shadow.points += [Point(p, frozenset(s.name for s in self.dj.sites.select(p.site)), p.times) for p in more]
        with self.acting() as touched:
            touched.append(self.adopt(self.dj.restore(made, breakpoints=more, exact=more_then == self.more), shadow))

    def through_file(self, made: Checkpoint, shadow: Shadow) -> Checkpoint:
        """Write a checkpoint and read it again; predicates that no file can hold fall away, with a warning."""
        kept = [point for point in shadow.points if point.spec.when is not acts.first_is_positive]
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            made = Checkpoint.load(made.save(Path(folder) / "session.safetensors"))
        assert len(said) == len(shadow.points) - len(kept)
        shadow.points = kept
        return made

    @precondition(lambda self: not self.more)
    @rule()
    def add_sites(self) -> None:
        self.dj.add_sites(acts.MORE)

    # -- several -------------------------------------------------------------------------------

    def group(self, mask: int) -> list[Live]:
        """Unfinished runs that find rows; one alone unless bits are apart from company."""
        found = [live for index, live in enumerate(filter(busy, self.lives)) if mask >> index & 1 or not index]
        offloaded = [live for live in found if not live.session.resident]
        if len(offloaded) > self.dj.engine.arena.free_rows:
            found = [live for live in found if live.session.resident]
        return found if self.invariant else found[:1]

    @some(busy)
    @rule(mask=st.integers(0, 63), flip=st.booleans())
    def results(self, mask: int, flip: bool) -> None:
        lives = self.group(mask)[:: -1 if flip else 1]
        with self.acting(*lives):
            for live in lives:
                live.shadow.to_end(self.world)
            for live, result in zip(lives, self.dj.results([live.run for live in lives]), strict=True):
                live.check_result(self.world, result, live.shadow.capture)

    @some(busy)
    @rule(mask=st.integers(0, 63), count=st.integers(0, 8), holds=st.integers(0, 255), kind=acts.WRITES)
    def as_stopped(self, mask: int, count: int, holds: int, kind: str) -> None:
        """Take some stops of runs driven together, hold some of them, write to some; leave the loop anywhere."""
        lives = self.group(mask)
        owners = {id(live.run): live for live in lives}
        seen = {live: live.run.stop for live in lives}
        with self.acting(*lives):
            stops = self.dj.as_stopped([live.run for live in lives])
            for number, stop in enumerate(itertools.islice(stops, count)):
                live = owners[id(stop.run)]
                old = seen[live]
                live.equal("a held run went on", old is not None and old.held, False)
                live.shadow.advance(self.world)
                live.check(self.world)
                seen[live] = stop
                if holds >> number & 1:
                    stop.hold()
                    acts.write(stop, kind, number, stop.value)
                    live.shadow.write(self.world, stop.value)
            stops.close()  # type: ignore[attr-defined]
            for live in lives:
                self.catch_up(live, seen[live])

    def catch_up(self, live: Live, seen: Stop | None) -> None:
        """A run that others were driven with may have gone further than the last stop seen."""
        run = live.run
        if run.finished or (run.stop is not None and run.stop is not seen):
            live.shadow.advance(self.world)
        elif run.stop is None:
            live.shadow.paused_at(self.world, live.session.length, len(live.session.tokens))

    # -- the end -------------------------------------------------------------------------------

    def teardown(self) -> None:
        engine = self.dj.engine
        try:
            if self.sound:
                for live in self.lives:
                    live.check(self.world)
                for live in list(self.lives):
                    self.end(live)
                assert not any(bool(t[:-1].any()) for pair in engine.arena.layers for t in pair), "a row is not zero"
                assert engine.arena.free_rows == ROWS and not engine.sessions
        finally:
            for session in list(engine.sessions):
                session.close()
            for pair in engine.arena.layers:
                for tensor in pair:
                    tensor.zero_()
            engine.sites = engine.table.select(acts.SITES)

    def end(self, live: Live) -> None:
        """Take a session's run to its end, then close it."""
        if live not in self.lives:
            return
        if has_run(live) and not self.homeless(live):
            self._finish(live)
        with self.acting(*live.family()):
            live.session.close()

    def _finish(self, live: Live) -> None:
        with self.acting(live):
            if live.shadow.busy:
                live.shadow.to_end(self.world)
            live.check_result(self.world, live.run.result(), live.shadow.capture)


def machine(name: str, invariant: bool, share: int) -> Any:
    """The test of one model; ``share`` of the examples in percent."""
    made = type(f"{name} invariant={invariant}", (Sessions,), {"model": name, "invariant": invariant})
    case: Any = made.TestCase  # type: ignore[attr-defined]
    case.settings = settings(
        max_examples=max(1, EXAMPLES * share // 100),
        stateful_step_count=14,
        suppress_health_check=list(HealthCheck),
    )
    return case


TestGPT2 = machine("gpt2", False, 25)
TestGPT2Invariant = machine("gpt2", True, 30)
TestLlama = machine("llama-bf16", False, 10)
TestLlamaInvariant = machine("llama", True, 10)
TestMistral = machine("mistral", False, 10)
TestMistralInvariant = machine("mistral", True, 15)
