"""The part of the state machine in which several sessions are driven together."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

import djinn_fx as djinn
from tests.families import WIDTH, prompt
from tests.oracle import Call, Change, Script
from tests.runtime import acts
from tests.runtime.live import Against
from tests.runtime.machine import Stage, busy, some
from tests.session_script import Shadow


class Crowd(Stage):
    """``results``, ``as_stopped`` and ``dj.generate``."""

    batches = 0

    @some(busy)
    @rule(mask=st.integers(0, 63), flip=st.booleans())
    def results(self, mask: int, flip: bool) -> None:
        lives = self.group(mask)[:: -1 if flip else 1]
        with self.acting(*lives):
            for live in lives:
                live.shadow.to_end(self.world)
            for live, result in zip(lives, self.dj.results([live.run for live in lives]), strict=True):
                live.check_result(self.world, result)

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
                if not live.take_waiting(stop):
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

    @precondition(lambda self: self.batches < 2)
    @rule(
        prompts=st.lists(st.integers(0, 9), min_size=1, max_size=5),
        call=acts.calls(1),
        points=st.lists(acts.breakpoints(), max_size=1),
        edit=st.none() | acts.edits(),
    )
    def generate_all(
        self, prompts: list[int], call: Call, points: list[djinn.Breakpoint], edit: dict[str, Any] | None
    ) -> None:
        """``dj.generate``: more prompts than there are free rows wait for one."""
        self.batches += 1
        prompts = prompts if self.setup.invariant else prompts[:1]
        made = [] if edit is None else [acts.make_edit("resid_post.0", WIDTH, **edit)]
        shared: dict[str, Any] = {"edits": made, "breakpoints": points, "capture": ("attn_q.1",), "seeds": prompts}
        shared |= {"max_new_tokens": call.new or 2, "output_logits": True, **vars(call.sampling)}
        texts = [list(prompt(seed, seed + 1)) for seed in prompts]
        if not self.free:
            self.refused(lambda: self.dj.generate(texts, **shared))
            return
        with self.acting():
            results = self.newcomer(1, lambda: self.dj.generate(texts, **shared)) or []
        if not results:
            return
        for seed, text, result in zip(prompts, texts, results, strict=True):
            changes = tuple(Change((0, -1), edit.site, edit) for edit in made)
            shadow = Shadow(Script(seeds=((0, seed),), changes=changes))
            own = Call("generate", tuple(text), call.new or 2, call.sampling)
            shadow.begin(self.world, own, self.armed(points), ("attn_q.1",))
            shadow.advance(self.world)
            Against(f"prompt {seed} of dj.generate", shadow).check_result(self.world, result)
