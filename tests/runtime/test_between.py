"""What another thread does between the look at a session and the act on it: nobody else's row is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import djinn_fx as djinn
from djinn_fx.runtime import claims
from djinn_fx.runtime import stop as stops
from tests.runtime.tiny import another_dj, assert_same, compiled, generated, guarded, prompt


@pytest.fixture
def dj() -> Iterator[djinn.Dj]:
    yield from guarded(compiled("llama"))


def meanwhile(monkeypatch: pytest.MonkeyPatch, dj: djinn.Dj, happens: Callable[[], object]) -> None:
    """Let something happen when the next act has been looked at, but does not have the lock yet."""
    tiers, real = dj.engine.tiers, dj.engine.tiers.roomy

    def late(act: Callable[[], Any], *rest: Any, **options: Any) -> Any:
        monkeypatch.setattr(tiers, "roomy", real)
        happens()
        return real(act, *rest, **options)

    monkeypatch.setattr(tiers, "roomy", late)


@pytest.mark.parametrize("end", ["session", "run"])
def test_a_rewind_of_what_was_just_closed(dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """Its row is another session's already, which would lose its keys and values."""
    wanted = generated(dj, prompt(9, 1), 6)
    session, others = dj.session(), []
    run = session.generate(prompt(9), max_new_tokens=6)
    run.run_to_end()
    if end == "run":
        run = session.generate(prompt(3), max_new_tokens=6, breakpoints=["resid_post.0"])
        next(run)
    row = session.row

    def close() -> None:
        session.close() if end == "session" else run.close()
        others.append(dj.session())
        begun = others[0].generate(prompt(9, 1), max_new_tokens=6, output_logits=True, breakpoints=["resid_post.1"])
        for _ in range(4):
            next(begun)

    meanwhile(monkeypatch, dj, close)
    with pytest.raises(djinn.SessionClosed):
        run.rewind(9 if end == "run" else 2)
    assert others[0].row == row or end == "run"
    assert others[0].run is not None
    assert_same(others[0].run.result(), wanted)
    for each in (session, *others):
        each.close()


def test_a_fork_of_a_stop_that_was_just_left(dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch) -> None:
    for happens, error in (("result", djinn.StaleStop), ("__next__", djinn.StaleStop), ("close", djinn.SessionClosed)):
        with dj.session() as session:
            stop = next(session.generate(prompt(9), max_new_tokens=6, breakpoints=["resid_post.0"]))
            meanwhile(monkeypatch, dj, getattr(session if happens == "close" else stop.run, happens))
            with pytest.raises(error):
                stop.fork(1)
            assert len(dj.sessions) == (happens != "close")


def test_a_step_from_a_stop_that_was_just_left(dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch) -> None:
    with dj.session() as session:
        stop = next(session.generate(prompt(9), max_new_tokens=6, breakpoints=["resid_post.0"]))
        real = claims.claimed

        def late(runs: Any) -> Any:
            monkeypatch.setattr(stops, "claimed", real)
            stop.run.result()
            return real(runs)

        monkeypatch.setattr(stops, "claimed", late)
        with pytest.raises(djinn.StaleStop):
            stop.step()


@pytest.mark.parametrize("newcomer", ["session", "restore"])
def test_a_newcomer_to_a_model_that_was_just_closed(monkeypatch: pytest.MonkeyPatch, newcomer: str) -> None:
    dj = another_dj("llama")
    with dj.session() as session:
        session.generate(prompt(5), max_new_tokens=2).run_to_end()
        held = session.checkpoint()
    meanwhile(monkeypatch, dj, dj.close)
    with pytest.raises(djinn.SessionClosed, match="this compiled model was closed"):
        dj.session() if newcomer == "session" else dj.restore(held)
    assert not dj.engine.sessions
