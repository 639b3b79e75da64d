"""Ctrl-C in the middle of an act: no edit is lost, in the journal neither, and nobody is driven for ever."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime import driver, riders, standing
from djinn_fx.runtime.claims import claimed, quiet
from djinn_fx.runtime.copystream import Current
from djinn_fx.runtime.doubt import Doubts, Question
from djinn_fx.runtime.executor import Executor
from djinn_fx.runtime.flight import Flight
from djinn_fx.runtime.lock import EngineLock
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.steps import Step
from tests.bits import assert_same_bits
from tests.runtime.checkpoint_cases import assert_same, close_all, finish, run_of, shared, start
from tests.runtime.tiny import another_dj, prompt, some

SITE = "resid_post.0"


@pytest.fixture
def dj() -> Iterator[djinn.Dj]:
    made = shared("gpt2")
    yield made
    close_all(made)


class Cut(deque[Question]):
    """A queue whose user is interrupted right after he put something into it."""

    def append(self, item: Question) -> None:
        super().append(item)
        raise KeyboardInterrupt


def test_an_answer_that_was_interrupted_is_not_that_of_the_next_question() -> None:
    doubts = Doubts(torch.device("cpu"))
    doubts._free = free = Cut()
    question = doubts.question()
    question.word.fill_(1)
    doubt = doubts.about(torch.zeros(1), question)
    with pytest.raises(KeyboardInterrupt):
        doubt.holds()
    doubts._free = deque(free)
    next_one = doubts.question()
    assert next_one is question
    assert doubt.holds()
    assert not doubts.about(torch.zeros(1), next_one).holds()
    assert list(doubts._free) == [question], "two doubts would share it"


def edit(stop: djinn.Stop) -> None:
    stop.value.mul_(-1.5)


def at_a_stop(dj: djinn.Dj, at: str, act: Callable[[djinn.Stop], None] = edit) -> Run:
    """A run at a stop, its value written."""
    run = start(dj.session(seed=4), [djinn.break_at(SITE, positions=at, times=1)])
    act(next(run))
    return run


def injected(run: Run) -> list[tuple[int, list[str]]]:
    """Where the journal has edits."""
    return [(step.start, sorted(step.injections)) for step in run.session.journal if step.injections]


@pytest.mark.parametrize(
    ("at", "owner", "name"),
    [
        ("prompt", Flight, "steer"),
        ("prompt", Executor, "refresh"),
        ("prompt", Executor, "advance"),
        ("generated", Flight, "steer"),
        ("generated", Executor, "decode"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_an_edit_that_is_being_taken_over_stays_one(dj: djinn.Dj, at: str, owner: type, name: str) -> None:
    run, twin = at_a_stop(dj, at), at_a_stop(dj, at)
    expected, places = finish(twin), injected(twin)
    with mock.patch.object(owner, name, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        next(run)
    taken = run.session.checkpoint()
    assert_same(finish(run), expected)
    assert injected(run) == places != []
    with dj.restore(taken) as again:
        assert_same(finish(run_of(again)), expected)


def test_a_chunk_whose_edit_was_half_taken_over_begins_again(dj: djinn.Dj) -> None:
    """The step has the value, what it left has not."""
    run, twin = at_a_stop(dj, "prompt"), at_a_stop(dj, "prompt")
    expected = finish(twin)
    with (
        mock.patch("djinn_fx.runtime.stages.Chunk.put", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        next(run)
    assert_same(finish(run), expected)
    assert injected(run) == injected(twin) != []


def test_a_rewind_that_is_interrupted_leaves_the_stop_as_it_was(dj: djinn.Dj) -> None:
    run, twin = at_a_stop(dj, "generated"), at_a_stop(dj, "generated")
    stop = some(run.stop)
    with mock.patch.object(Step, "until", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        run.rewind(stop.position, "resid_post.1")
    assert run.stop is stop
    with dj.restore(stop.checkpoint()) as again:
        assert_same_bits(some(run_of(again).stop).value, stop.value)
    assert_same(finish(run), finish(twin))
    assert injected(run) == injected(twin) != []


class Once(list[Run]):
    """Runs; whoever goes through them for the ``count``-th time is interrupted behind the first."""

    def __init__(self, runs: Sequence[Run], count: int) -> None:
        super().__init__(runs)
        self.left = count

    def __iter__(self) -> Iterator[Run]:
        for run in super().__iter__():
            yield run
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


@pytest.mark.parametrize("count", range(1, 12))
@pytest.mark.parametrize("kind", ["claimed", "driving", "quiet"])
def test_nobody_is_driven_for_ever(dj: djinn.Dj, kind: str, count: int) -> None:
    runs = [start(dj.session(), []) for _ in range(2)]
    once = Once(runs, count)
    with suppress(KeyboardInterrupt):
        if kind == "driving":
            driver.iterate(dj.engine, once)
        else:
            with (claimed if kind == "claimed" else quiet)(once):
                pass
    assert [(run.driver, run.owner, run.silent) for run in runs] == [(None, None, False)] * 2


def test_a_clock_that_is_interrupted_leaves_nobody_driven(dj: djinn.Dj) -> None:
    run = start(dj.session(seed=2), [SITE])
    with mock.patch.object(driver, "time") as clock, pytest.raises(KeyboardInterrupt):
        clock.monotonic.side_effect = [KeyboardInterrupt, 1.0]
        next(run)
    assert run.driver is None and run.owner is None
    run.result()


def test_a_way_onto_the_stream_that_is_interrupted_leaves_nothing_locked() -> None:
    lock, found = EngineLock(torch.device("cpu")), list[bool]()
    lock._device = torch.device("cuda", 0)
    with mock.patch.object(EngineLock, "_come", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt), lock:
        pass
    thread = threading.Thread(target=lambda: found.append(lock._lock.acquire(blocking=False)))
    thread.start()
    thread.join()
    assert found == [True] and lock._depth == 0


def test_a_copy_stream_that_is_interrupted_is_not_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: Any = SimpleNamespace(device_index=0)
    before: Any = SimpleNamespace(device_index=0)
    current = [before]

    def set_stream(stream: object) -> None:
        current[0] = stream
        if stream is copies:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    with pytest.raises(KeyboardInterrupt), Current(copies, before):
        pass
    assert current == [before]


def test_moves_do_not_change_what_stands(dj: djinn.Dj) -> None:
    """What a stop's step would be is told without making it so."""
    run = at_a_stop(dj, "prompt")
    flight, stop = some_flight(run), some(run.stop)
    step, value = flight.step, flight.value(stop.place).clone()
    assert set(standing.step_there(dj.engine, run).injections) == {SITE}
    assert flight.step is step and flight.doubt is None
    assert_same_bits(flight.value(stop.place), value)


def some_flight(run: Run) -> Flight:
    assert run.flight is not None
    return run.flight


def test_a_rewind_that_is_interrupted_behind_its_stop_has_come_there(dj: djinn.Dj) -> None:
    """The edit at the stop lies before the place that it went to."""
    run, twin = at_a_stop(dj, "generated"), at_a_stop(dj, "generated")
    expected, left = finish(twin).result, [KeyboardInterrupt]
    inner = Run.stand_at

    def stand_at(self: Run, stop: djinn.Stop | None) -> None:
        inner(self, stop)
        if left:
            raise left.pop()

    with mock.patch.object(Run, "stand_at", stand_at), pytest.raises(KeyboardInterrupt):
        run.rewind(some(run.stop).position, "resid_post.1")
    assert run.stop is None
    found = run.result()
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert_same_bits(found.logits, expected.logits)
    assert injected(run) == injected(twin) != []


@pytest.mark.parametrize("at", ["prompt", "generated"])
def test_an_interrupt_where_a_stop_is_left_does_not_leave_half_of_it(dj: djinn.Dj, at: str) -> None:
    """The edit is in the step by then; what the step had left is not there any more."""
    run, twin = at_a_stop(dj, at), at_a_stop(dj, at)
    expected, left = finish(twin), [KeyboardInterrupt]
    inner = Run.stand_at

    def stand_at(self: Run, stop: djinn.Stop | None) -> None:
        if left:
            raise left.pop()
        inner(self, stop)

    with mock.patch.object(Run, "stand_at", stand_at), pytest.raises(KeyboardInterrupt):
        next(run)
    assert_same(finish(run), expected)
    assert injected(run) == injected(twin) != []


@pytest.mark.parametrize("at", ["prompt", "generated"])
@pytest.mark.parametrize("behind", [False, True])
def test_a_stop_that_was_just_come_to_is_not_passed_over(dj: djinn.Dj, at: str, behind: bool) -> None:
    """Ctrl-C while the run is told where it stands, and before whoever drives it knows."""
    run, inner, left = start(dj.session(seed=4), [djinn.break_at(SITE, positions=at)]), Run.come_to, [1]

    def come_to(self: Run, stop: djinn.Stop, flight: Flight) -> None:
        if behind:
            inner(self, stop, flight)
        if left:
            left.pop()
            raise KeyboardInterrupt
        if not behind:
            inner(self, stop, flight)

    twin = start(dj.session(seed=4), [djinn.break_at(SITE, positions=at)])
    expected = [stop.position for stop in twin]
    with mock.patch.object(Run, "come_to", come_to):
        with pytest.raises(KeyboardInterrupt):
            next(run)
        assert [stop.position for stop in run] == expected


def test_a_session_that_never_was_keeps_no_row(dj: djinn.Dj) -> None:
    free = dj.engine.arena.free_rows
    with mock.patch.object(djinn.Session, "__init__", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        dj.session()
    assert dj.engine.arena.free_rows == free and not dj.engine.sessions


@pytest.mark.parametrize("before", range(1, 3))
def test_a_fork_that_is_interrupted_gives_all_rows_back(dj: djinn.Dj, before: int) -> None:
    """Ctrl-C while the second of two children is made, and while the first is given its run."""
    run = start(dj.session(seed=4), [SITE])
    stop, free, inner, calls = next(run), dj.engine.arena.free_rows, djinn.Session.__init__, 0

    def made(session: djinn.Session, *given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        inner(session, *given)

    cut: Any = mock.patch.object(djinn.Session, "__init__", made)
    if before == 2:
        cut = mock.patch("djinn_fx.runtime.moves.deliver", side_effect=KeyboardInterrupt)
    with cut, pytest.raises(KeyboardInterrupt):
        stop.fork(2)
    assert dj.engine.arena.free_rows == free and dj.engine.sessions == [run.session] and not run.session.children
    assert len(stop.fork(2)) == 2


@pytest.mark.parametrize("backend", ["eager", "static"])
def test_a_token_is_history_as_a_whole_or_not_at_all(backend: str) -> None:
    """An interrupt at each of the calls that commits make, of steps that stand alone and of those that cruise."""
    with another_dj("gpt2", backend=backend) as made:
        expected = made.generate(prompt(5), max_new_tokens=4)[0].tokens
        for count in range(1, 200):
            with made.session() as session:
                run = session.generate(prompt(5), max_new_tokens=4)
                with interrupted_in_commit(count) as left, suppress(KeyboardInterrupt):
                    run.run_to_end()
                journal = session.journal
                assert len(session.token_list) == len(session.sampled) and len(journal) == len(run.records)
                assert session.length == (journal[-1].stop if journal else 0)
                result = run.result()
                assert result.finish_reason == "length" and result.tokens.tolist() == expected.tolist()
            if left:
                assert count > 20
                return
    raise AssertionError("commits make more calls than that")


@contextmanager
def interrupted_in_commit(count: int) -> Iterator[list[int]]:
    """Ctrl-C at the ``count``-th call, of whatever, that a commit makes; the list stays empty if it makes that many."""
    left, seen = [count], 0
    codes = {driver._commit.__code__, riders.commit.__code__}

    def trace(frame: Any, event: str, argument: object) -> None:
        nonlocal seen
        caller = frame if event == "c_call" else frame.f_back
        if event in ("c_call", "call") and caller is not None and caller.f_code in codes:
            seen += 1
            if seen == count:
                left.clear()
                raise KeyboardInterrupt

    before = sys.getprofile()
    sys.setprofile(trace)
    try:
        yield left
    finally:
        sys.setprofile(before)
