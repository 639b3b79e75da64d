"""The part of the state machine in which a process dies: what autosave left goes on in another compiled model."""

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
from tests.runtime.machine import Stage, anyone, has_run, some
from tests.runtime.setups import compiled


class Recovery(Stage):
    """Autosave, and recovery elsewhere."""

    deaths = 0

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
                assert session.saved_path is not None
                self.compare(session, names[session.saved_path.name], ends)

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
