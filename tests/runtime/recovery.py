"""The part of the state machine in which sessions are saved: checkpoints, and autosave when a process dies."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

import djinn_fx as djinn
from tests.runtime import acts
from tests.runtime.live import Live
from tests.runtime.machine import MOST, Stage, anyone, has_run, some, stopped
from tests.runtime.setups import compiled


class Recovery(Stage):
    """Checkpoints and their files; autosave, and recovery elsewhere."""

    deaths = 0

    @precondition(lambda self: self.lives and len(self.saved) < 2)
    @rule(who=acts.PICK, touch=acts.TOUCH)
    def checkpoint(self, who: int, touch: str | None) -> None:
        live = self.at_a_stop(who) if who % 3 else self.pick(who, anyone)
        self.touch(live, touch)
        with self.acting(live):
            take = live.stop.checkpoint if stopped(live) and who % 2 else live.session.checkpoint
            size = live.session.extent * self.dj.engine.arena.bytes_per_position + acts.LARGEST
            made = self.roomy(size, take)
            if made is not None:
                self.saved = [*self.saved, (made, live.shadow.copy(), self.more)]

    @precondition(lambda self: bool(self.saved))
    @rule(which=acts.PICK, through_file=st.booleans(), point=st.none() | acts.breakpoints(), then=acts.THEN)
    def restore(self, which: int, through_file: bool, point: djinn.Breakpoint | None, then: str) -> None:
        made, shadow, had = self.saved[which % len(self.saved)]
        shadow = shadow.copy()
        if not self.free:
            self.refused(lambda: self.dj.restore(made, exact=had == self.more))
            return
        if len(self.lives) >= MOST:
            return
        if through_file:
            made = self.through_file(made, shadow)
        if had != self.more:
            self.refused(lambda: self.dj.restore(made), error=djinn.CheckpointError)
        points = [point] if point and shadow.script.calls else []
        shadow.points += self.armed(points)
        with self.acting() as touched:
            if self.setup.tight:
                made.wait()  # what it still has on a GPU takes host memory too
            back = self.newcomer(1, lambda: self.dj.restore(made, breakpoints=points, exact=had == self.more))
            if back is not None:
                touched.append(self.adopt(back, shadow))
        if touched:
            self.then(touched[0], then)

    @precondition(lambda self: self.deaths < 2)
    @some(anyone)
    @rule(who=acts.PICK, ends=st.booleans())
    def die(self, who: int, ends: bool) -> None:
        """Every session is saved; another model of the same weights has them all, with the same bits."""
        self.deaths += 1
        with tempfile.TemporaryDirectory() as folder, self.other() as other:
            with self.acting(), self.dj.autosave(folder, every=3600) as saver:
                saver.save_now()
                assert saver.errors == [], saver.errors
                names = {saver.name_of(live.session): live for live in self.lives}
            with warnings.catch_warnings(record=True):
                found = other.recover(folder)
            assert len(found) == len(names) == len(self.lives)
            for session in found:
                assert session.saved is not None
                self.compare(session, names[session.saved.path.name], ends)

    def compare(self, session: djinn.Session, dead: Live, ends: bool) -> None:
        """A recovered session beside what it must be, perhaps until its run ends."""
        shadow = dead.shadow.copy()
        shadow.points = [point for point in shadow.points if point.spec.when is not acts.MOODY]
        live = Live(f"recovered {dead.name}", shadow, session)
        live.check(self.world)
        if ends and has_run(live):
            if live.shadow.busy:
                live.shadow.to_end(self.world)
            live.check_result(self.world, live.run.result())
        live.check(self.world)
        session.close()

    @contextmanager
    def other(self) -> Iterator[djinn.Dj]:
        """Another compiled model, with the sites that are compiled now."""
        other = compiled(self.setup, spare=True)
        other.engine.sites = other.engine.table.select(list(self.dj.compiled_sites))
        try:
            yield other
        finally:
            for session in list(other.engine.sessions):
                session.close()
