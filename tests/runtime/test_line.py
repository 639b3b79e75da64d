"""More threads than rows: whoever finds every row in use waits, in turn and not for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

import djinn_fx as djinn
from djinn_fx.runtime.results import Result
from tests.runtime.live import check_memory
from tests.runtime.tiny import another_dj, assert_same, generated, guarded, prompt

NEW = 6


@pytest.fixture(scope="module")
def made() -> Iterator[djinn.Dj]:
    """Two rows, and a minute's patience."""
    with another_dj("llama", max_sessions=2, row_wait=60.0) as dj:
        yield dj


@pytest.fixture
def dj(made: djinn.Dj) -> Iterator[djinn.Dj]:
    """The same, clean afterwards."""
    yield from guarded(made)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads."""
    with ThreadPoolExecutor(8) as threads:
        yield threads


class Busy:
    """Two sessions in the middle of a step, each driven by a thread of its own, until :meth:`release`."""

    def __init__(self, dj: djinn.Dj, pool: ThreadPoolExecutor) -> None:
        self.free, inside = threading.Event(), threading.Barrier(3)

        def hold(_: int) -> None:
            if not self.free.is_set():
                inside.wait(60)
                self.free.wait(60)

        self.sessions = [dj.session(seed) for seed in range(2)]
        self.runs = [
            s.generate(prompt(9, seed), max_new_tokens=NEW, output_logits=True, on_token=hold)
            for seed, s in enumerate(self.sessions)
        ]
        self.results = [pool.submit(run.result) for run in self.runs]
        inside.wait(60)

    def release(self, dj: djinn.Dj) -> None:
        """Let them go on, and compare what they come to."""
        self.free.set()
        for seed, result in enumerate(self.results):
            found = result.result(60)
            self.sessions[seed].close()
            assert_same(found, generated(dj, prompt(9, seed), NEW))


def in_line(dj: djinn.Dj, act: Callable[[], Any], pool: ThreadPoolExecutor) -> Future[Any]:
    """Begin something in a thread that has to wait for a row."""
    begun = pool.submit(act)
    deadline = time.monotonic() + 60
    while dj.engine.tiers.line.empty and not begun.done() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not begun.done()
    return begun


ACTS: dict[str, Callable[[djinn.Dj], Any]] = {
    "session": lambda dj: dj.session().close(),
    "generate": lambda dj: dj.generate([prompt(5), prompt(6)], max_new_tokens=2),
}


@pytest.mark.parametrize("name", ACTS)
def test_a_newcomer_waits_for_a_row(dj: djinn.Dj, pool: ThreadPoolExecutor, name: str) -> None:
    busy = Busy(dj, pool)
    found = in_line(dj, lambda: ACTS[name](dj), pool)
    busy.release(dj)
    found.result(60)


def test_one_who_was_sent_away_waits_for_a_row(dj: djinn.Dj, pool: ThreadPoolExecutor) -> None:
    wanted = generated(dj, prompt(7), NEW)
    with dj.session() as away:
        run = away.generate(prompt(7), max_new_tokens=NEW, output_logits=True, breakpoints=["resid_post.0"])
        next(run)
        away.offload()
        busy = Busy(dj, pool)
        found = in_line(dj, run.result, pool)
        busy.release(dj)
        assert_same(found.result(60), wanted)


def test_nobody_waits_for_ever_nor_in_a_callback(pool: ThreadPoolExecutor) -> None:
    for patience, at_least in ((0.0, 0.0), (0.3, 0.3)):
        with another_dj("llama", max_sessions=2, row_wait=patience) as dj:
            busy = Busy(dj, pool)
            begun = time.monotonic()
            with pytest.raises(djinn.CapacityError, match=r"other threads are driving sessions .* row_wait"):
                dj.session()
            assert time.monotonic() - begun >= at_least
            busy.release(dj)
            assert dj.engine.tiers.line.empty


def test_a_callback_does_not_wait(dj: djinn.Dj, pool: ThreadPoolExecutor) -> None:
    """Its own run keeps its row meanwhile: two that wait in callbacks would wait for each other."""
    said: list[str] = []
    meet = threading.Barrier(2)

    def another(_: int) -> None:
        meet.wait(60)
        try:
            dj.session().close()
        except djinn.CapacityError as error:
            said.append(str(error))
        meet.wait(60)

    sessions = [dj.session(seed) for seed in range(2)]
    runs = [s.generate(prompt(5), max_new_tokens=2, on_token=another) for s in sessions]
    for each in [pool.submit(run.result) for run in runs]:
        each.result(60)
    assert len(said) == 4 and all("in a callback, at once" in text for text in said)
    for session in sessions:
        session.close()


def test_pinned_rows_are_not_waited_for(dj: djinn.Dj) -> None:
    sessions = [dj.session() for _ in range(2)]
    for session in sessions:
        session.pin()
    with pytest.raises(djinn.CapacityError, match="pinned or driven at this moment"):
        dj.session()
    for session in sessions:
        session.close()


TIGHT: dict[str, Any] = {"pinned_bytes": 3 * 6144, "disk_bytes": 1 << 20}


@pytest.mark.parametrize(("backend", "budgets"), [("eager", TIGHT), ("static", {}), ("static", TIGHT)])
def test_twelve_threads_on_three_rows(backend: str, budgets: dict[str, Any]) -> None:
    """Alone, in groups and in queues, with stops, forks and moves: all come to their ends, token for token."""
    with another_dj("llama", max_sessions=3, row_wait=120.0, backend=backend, **budgets) as dj:
        wanted = [generated(dj, prompt(4 + seed, seed), NEW).tokens.tolist() for seed in range(9)]

        def alone(seed: int) -> list[Result]:
            with dj.session(seed) as s:
                run = s.generate(prompt(4 + seed, seed), max_new_tokens=NEW, breakpoints=["resid_post.0"])
                for stop in run:
                    if stop.position == 6:
                        s.offload()
                    elif stop.position == 8:
                        stop.fork(1)[0].run.result()
                run.rewind(4 + seed)
                return [run.result()]

        def group(seed: int) -> list[Result]:
            with dj.session() as a, dj.session() as b, dj.session() as c:
                return dj.results([s.generate(prompt(4 + seed, seed), max_new_tokens=NEW) for s in (a, b, c)])

        def queue(seed: int) -> list[Result]:
            return dj.generate([prompt(4 + seed, seed)] * 5, max_new_tokens=NEW)

        def stopped(seed: int) -> list[Result]:
            with dj.session() as a, dj.session() as b:
                points = ["resid_post.1"]
                runs = [s.generate(prompt(4 + seed, seed), max_new_tokens=NEW, breakpoints=points) for s in (a, b)]
                assert len(list(dj.as_stopped(runs))) >= 2 * NEW - 2
                return dj.results(runs)

        kinds = (alone, group, queue, stopped)
        with ThreadPoolExecutor(12) as threads:
            jobs = [(number % 9, threads.submit(kinds[number % 4], number % 9)) for number in range(24)]
            for seed, job in jobs:
                assert all(result.tokens.tolist() == wanted[seed] for result in job.result(120))
        check_memory(dj)
        assert not dj.sessions and dj.engine.arena.free_rows == 3 and dj.engine.tiers.line.empty


def test_a_session_from_the_disk_is_not_sent_back_to_make_its_own_room() -> None:
    """Host memory for one session: the one that comes back is read, and the one that leaves goes beyond the budget."""
    budgets: dict[str, Any] = {"pinned_bytes": 6144, "disk_bytes": 6144}
    with another_dj("llama", max_sessions=1, **budgets) as dj:
        sessions = [dj.session(seed) for seed in range(3)]
        for seed, session in enumerate(sessions):
            session.generate(prompt(20, seed), max_new_tokens=2).run_to_end()
        assert sorted(s.tier for s in sessions) == ["device", "disk", "host"]
        for _ in range(2):
            for session in sessions:
                session.generate(None, max_new_tokens=1).run_to_end()
        check_memory(dj)
