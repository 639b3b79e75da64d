"""Alarms: in the order of their times, on one thread that ends with them."""

from __future__ import annotations

import threading
import time

import pytest

from djinn_fx.runtime import alarm as module
from djinn_fx.runtime.alarm import AlarmClock


def threads() -> int:
    return sum(thread.name == "djinn_fx alarms" for thread in threading.enumerate())


def test_order_of_times_on_one_thread() -> None:
    clock, rung = AlarmClock(), list[int]()
    before = threads()
    alarms = [clock.after(seconds, lambda n=number: rung.append(n)) for number, seconds in enumerate((0.2, 0.1, 0.15))]  # type: ignore[misc]
    assert threads() == before + 1
    for each in alarms:
        each.join(30)
    assert rung == [1, 2, 0]


def test_an_earlier_one_wakes_the_thread_and_a_cancelled_one_does_nothing() -> None:
    clock, rung = AlarmClock(), list[str]()
    late = clock.after(3600, lambda: rung.append("late"))
    soon = clock.after(0.0, lambda: rung.append("soon"))
    soon.join(30)
    late.cancel()
    late.join(30)
    assert rung == ["soon"] and late.spent


def test_the_thread_ends_and_another_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER", 0.01)
    clock = AlarmClock()
    for _ in range(2):
        clock.after(0.0, lambda: None).join(30)
        thread = clock._thread
        if thread is not None:
            thread.join(30)
        deadline = time.monotonic() + 30
        while clock._thread is not None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert clock._thread is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_one_that_fails_does_not_keep_the_others_from_being_done() -> None:
    clock, rung = AlarmClock(), list[int]()
    clock.after(0.0, lambda: 1 // 0).join(30)  # type: ignore[arg-type]
    clock.after(0.0, lambda: rung.append(1)).join(30)
    assert rung == [1]


def test_where_no_thread_can_be_had_the_next_one_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rung = AlarmClock(), list[int]()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        first = clock.after(0.0, lambda: rung.append(1))
    clock.after(0.0, lambda: rung.append(2)).join(30)
    first.join(30)
    assert rung == [1, 2]


def test_cancelled_ones_do_not_pile_up() -> None:
    clock = AlarmClock()
    kept = [clock.after(3600, lambda: None) for _ in range(3)]
    for _ in range(5000):
        clock.after(3600, lambda: None).cancel()
    assert len(clock._waiting) < 3 * module.FEW and sum(not each[2].spent for each in clock._waiting) == len(kept)
    for each in kept:
        each.cancel()
