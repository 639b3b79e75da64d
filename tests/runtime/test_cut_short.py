"""Ctrl-C in the middle of an act: no edit is lost, in the journal neither, and nobody is driven for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime import driver, standing
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
from tests.runtime.tiny import some

SITE = "resid_post.0"


@pytest.fixture
def dj() -> Iterator[djinn.Dj]:
    made = shared("gpt2")
    yield made
    close_all(made)


class Cut(list[Question]):
    """A list whose user is interrupted right after he put something into it."""

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
    doubts._free = list(free)
    next_one = doubts.question()
    assert next_one is question
    assert doubt.holds()
    assert not doubts.about(torch.zeros(1), next_one).holds()
    assert doubts._free == [question], "two doubts would share it"


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
