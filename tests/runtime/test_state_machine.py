"""Sessions in any order of acts, each compared bit for bit with an oracle that knows no engine (DESIGN 9.5).

After every act the sessions it touched are compared (tokens, stop, value, KV, steering), no other session's KV may have
changed by a bit, and free rows are zero. When an example ends, every run is taken to its end and compared again.

More examples, new ones each time, and on a GPU:

    DJINN_STATE_EXAMPLES=2000 HYPOTHESIS_PROFILE=explore nice python -m pytest tests/runtime/test_state_machine.py
    DJINN_TEST_DEVICE=cuda DJINN_TEST_BACKEND=inductor python -m pytest tests/runtime/test_state_machine.py -n 7 \
        --dist loadscope

The models called tight have two rows, host memory for a session or two and a disk for as much. Poisoned ones fill what
nobody owns with NaN. ``HYPOTHESIS_PROFILE=seek`` looks for new examples and shows a failure as it was found.
``DJINN_STATE_SECONDS`` bounds a process's time; ``-rP`` shows how many examples there were.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

import djinn_fx as djinn
from tests.oracle import Call
from tests.runtime import acts
from tests.runtime.crowd import Crowd
from tests.runtime.machine import MOST, anyone, busy, has_run, some, steered, stopped
from tests.runtime.machines import machine
from tests.runtime.recovery import Recovery
from tests.session_script import Target


class Sessions(Recovery, Crowd):
    """What users do."""

    # -- calls ---------------------------------------------------------------------------------

    @initialize(seed=acts.SEEDS, call=acts.calls(1), points=st.lists(acts.breakpoints(), min_size=1, max_size=2))
    def start(self, seed: int, call: Call, points: list[djinn.Breakpoint]) -> None:
        self.open(seed)
        self.begin(self.lives[0], call, points, ("resid_post.1", "logits"))
        self.advance(0, False)

    @some(anyone)
    @rule(
        who=acts.PICK,
        call=acts.calls(),
        points=st.lists(acts.breakpoints(), max_size=3),
        capture=st.sampled_from(((), ("resid_post.1", "logits"), ("attn_q.1",))),
        then=acts.THEN,
    )
    def call(self, who: int, call: Call, points: list[djinn.Breakpoint], capture: tuple[str, ...], then: str) -> None:
        idle = any(not busy(live) for live in self.lives)
        live = self.pick(who, (lambda live: not busy(live)) if idle else anyone)
        if live.session.length == len(live.session.tokens) > 0 and who % 2 and call.kind == "generate":
            call = replace(call, tokens=())  # the first token is drawn from what was computed before
        if self.begin(live, call, points, capture):
            self.then(live, then)

    @some(busy)
    @rule(who=acts.PICK, fails=st.booleans())
    def advance(self, who: int, fails: bool) -> None:
        self.advance_one(self.pick(who, busy), fails)

    @some(busy)
    @rule(who=acts.PICK, abandon=st.booleans(), again=st.booleans())
    def end_run(self, who: int, abandon: bool, again: bool) -> None:
        live = self.pick(who, busy)
        if abandon:
            with self.acting(live):
                live.run.close()
                live.shadow.close_run(self.world)
            self.refused(lambda: next(live.run, None), live, error=djinn.SessionClosed)
            if again and self.begin(live, Call("generate", (), 2), [], ()):
                self.finish(live)
        else:
            self.finish(live)

    # -- at a stop -----------------------------------------------------------------------------

    @rule(who=acts.PICK, kind=acts.WRITES, seed=acts.SEEDS, then=acts.THEN)
    def write(self, who: int, kind: str, seed: int, then: str) -> None:
        live = self.at_a_stop(who)
        self.touch(live, kind, seed)
        self.then(live, then)

    @rule(who=acts.PICK, tokens=st.integers(0, 3))
    def step(self, who: int, tokens: int) -> None:
        live = self.at_a_stop(who)
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

    @rule(
        who=acts.PICK,
        seeds=st.lists(acts.SEEDS, min_size=1, max_size=2),
        own=st.booleans(),
        touch=acts.TOUCH,
        then=acts.THEN,
    )
    def fork(self, who: int, seeds: list[int], own: bool, touch: str | None, then: str) -> None:
        live = self.at_a_stop(who)
        self.touch(live, touch)
        given = seeds if own else None
        if self.free < len(seeds) + (not live.session.pinned):
            self.refused(lambda: live.stop.fork(len(seeds), given), live)
        elif len(self.lives) + len(seeds) <= MOST:
            with self.acting(live) as touched:
                count = len(seeds) + (not live.session.resident)
                stops = self.newcomer(count, lambda: live.stop.fork(len(seeds), given), live)
                for seed, stop in zip(seeds, stops or (), strict=stops is not None):
                    child = self.adopt(stop.session, live.shadow.fork(self.world, seed if own else None))
                    child.equal("the fork's stop", stop, child.run.stop)
                    live.children.append(child)
                    touched.append(child)
            self.then(live.children[-1] if stops else live, then)

    @some(lambda live: len(live.stale) > 1)
    @rule(who=acts.PICK)
    def use_stale(self, who: int) -> None:
        live = self.pick(who, lambda live: len(live.stale) > 1)
        stop, shown = live.stale[-1]
        with self.acting(live):
            stop.value.neg_()
            live.stale[:] = [(stop, -shown)]
            for act in (lambda: setattr(stop, "value", shown), stop.step, stop.fork, stop.checkpoint, stop.hold):
                with pytest.raises(djinn.StaleStop):
                    act()

    @some(has_run)
    @rule(who=acts.PICK, back=st.integers(0, 12), site=st.sampled_from((*acts.NAMES, None, None)), then=acts.THEN)
    def rewind(self, who: int, back: int, site: str | None, then: str) -> None:
        live = self.pick(who, has_run)
        played = live.shadow.look(self.world)
        steps = played.steps[played.first :]
        if not steps:
            self.refused(lambda: live.run.rewind(played.length), live, error=djinn.InvalidValue)
            return
        first, last = steps[0].start, steps[-1].stop - 1
        position = last - (back if site else back // 4) % (last - first + 1)
        named = site or (live.stop.site if stopped(live) else self.world.sites[0].name)
        if self.homeless(live):
            self.refused(lambda: live.run.rewind(position, site), live)
            return
        with self.acting(live):
            live.shadow.rewind(self.world, position, self.dj.sites.get(named))
            live.equal("what rewind() gives", live.run.rewind(position, site), live.run.stop)
        self.then(live, then)

    # -- steering ------------------------------------------------------------------------------

    @rule(
        who=acts.PICK,
        site=st.sampled_from((*acts.NAMES, *acts.NAMES, *acts.MORE)),
        edit=acts.edits(),
        again=st.sampled_from((False, False, True)),
        touch=acts.TOUCH,
        then=acts.THEN,
    )
    def steer(self, who: int, site: str, edit: dict[str, Any], again: bool, touch: str | None, then: str) -> None:
        live = self.at_a_stop(who) if who % 2 or not self.lives else self.pick(who, anyone)
        self.touch(live, touch)
        made = acts.make_edit(site, self.dj.sites.get(site).width, **edit)
        if site not in self.dj.compiled_sites:
            self.refused(lambda: live.session.steer(made), live, error=djinn.SiteNotCompiled)
        elif again and self.homeless(live):
            self.refused(lambda: live.session.steer(made, kv="recompute"), live)
        else:
            with self.acting(live):
                key, waits = next(self.keys), live.waits
                live.handles.append((live.session.steer(made, kv="recompute" if again else "keep"), key))
                live.unseen = live.run.stop if waits else None
                (live.shadow.recompute if again else live.shadow.steer)(self.world, site, made, key)
            self.then(live, then)

    @some(steered)
    @rule(who=acts.PICK, which=acts.PICK, strength=st.sampled_from((None, 0.0, 0.5, 1.0, -1.0)), then=acts.THEN)
    def change(self, who: int, which: int, strength: float | None, then: str) -> None:
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
        self.then(live, then)

    # -- residence -----------------------------------------------------------------------------

    @rule(
        who=acts.PICK,
        act=st.sampled_from(("open", "open", "close", "offload", "offload", "pin", "hint", "add sites", "add sites")),
        seed=acts.SEEDS,
    )
    def house(self, who: int, act: str, seed: int) -> None:
        if act == "open" or not self.lives:
            self.open(seed)
            return
        live = self.pick(who, anyone)
        if act == "add sites":
            with self.acting():
                self.dj.add_sites(acts.MORE)
            self.step(5 * (who // 5), 0)
        elif act == "pin":
            if self.homeless(live):
                self.refused(live.session.pin, live)
            else:
                with self.acting(live):
                    live.session.pin(not live.session.pinned)
        elif act == "hint":
            with self.acting(live):
                live.session.idle_hint = (None, 0.0, 60.0, 3600.0)[seed]
        elif act == "offload" and live.session.pinned:
            self.refused(live.session.offload, live, error=djinn.InvalidValue)
        elif act == "offload":
            size = live.session.extent * self.dj.engine.arena.bytes_per_position
            with self.acting(live):
                left = self.roomy(size, partial(offloaded, live.session))
                live.equal("resident", live.session.resident, left is None)
        else:
            self.close(live)


def offloaded(session: djinn.Session) -> djinn.Session:
    """The session, moved off."""
    session.offload()
    return session


TestGPT2 = machine(Sessions, "gpt2", 10)
TestGPT2Static = machine(Sessions, "gpt2", 10, backend="static")
TestGPT2Invariant = machine(Sessions, "gpt2", 5, invariant=True)
TestGPT2InvariantStatic = machine(Sessions, "gpt2", 10, invariant=True, backend="static")
TestGPT2TokenByToken = machine(Sessions, "gpt2", 5, chunk=1)
TestGPT2Tight = machine(Sessions, "gpt2", 10, tight=True, poison=True)
TestGPT2TightStatic = machine(Sessions, "gpt2", 10, backend="static", tight=True)
TestLlama = machine(Sessions, "llama-bf16", 5, backend="static", poison=True)
TestLlamaInvariant = machine(Sessions, "llama", 5, invariant=True, chunk=20)
TestLlamaTight = machine(Sessions, "llama", 10, invariant=True, backend="static", tight=True, poison=True)
TestMistral = machine(Sessions, "mistral", 5)
TestMistralInvariant = machine(Sessions, "mistral", 5, invariant=True, backend="static", poison=True)
TestMistralTight = machine(Sessions, "mistral", 10, tight=True)
