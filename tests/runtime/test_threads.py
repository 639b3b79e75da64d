"""Threads side by side; no lock is held while user code runs, and what it may not do meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime.results import Result
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.session import Session
from djinn_fx.runtime.stop import Stop
from tests.bits import assert_same_bits
from tests.runtime.tiny import (
    NEW,
    PROMPT,
    ROWS,
    assert_same,
    compiled,
    direction,
    generated,
    make_dj,
    model_of,
    prompt,
)

V = direction(1)
SECONDS = 60.0


def in_thread(act: Callable[[], Any]) -> Any:
    """What ``act`` returns in a thread of its own; fails if it has to wait for this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result(SECONDS)


# -- side by side --------------------------------------------------------------------------------


def job(dj: djinn.Dj, number: int) -> Result:
    """Something of everything, another thing in each thread."""
    with dj.session(seed=number) as s:
        s.steer("resid_post.0", add=V * number)
        when = djinn.break_at("resid_post.1", lambda h: h[0] > 0)
        options: Any = {"do_sample": True, "output_logits": True, "max_new_tokens": 6}
        run = s.generate(prompt(5 + 7 * number, number), breakpoints=["attn_q.0", when], **options)
        for stop in run:
            if stop.position % 3 == number % 3:
                stop.value.mul_(0.5)
            if stop.position == 8 + 7 * number:
                s.offload()
        run.rewind(5 + 7 * number, "mlp_out.1")
        run.result()
        dj.run_with_cache(prompt(number + 1), ["attn_out.0", "resid_post.1"])
        return s.generate(prompt(3), **options).result()


@pytest.mark.parametrize("name", ["llama"])
def test_threads_side_by_side_are_one_after_the_other(name: str) -> None:
    expected = [job(compiled(name), number) for number in range(ROWS)]
    dj = make_dj(model_of(name))  # fresh, so that they also compile side by side
    for _ in range(2):
        with ThreadPoolExecutor(ROWS) as pool:
            found = list(pool.map(lambda number: job(dj, number), range(ROWS)))
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
    assert dj.engine.sessions == []
    dj.close()


def paused(run: Run, act: Callable[[], Any]) -> list[Any]:
    """Drive a run whose predicate calls ``act`` in another thread, mid-step; what it returned or raised."""
    outcomes: list[Any] = []

    def elsewhere() -> None:
        try:
            outcomes.append(act())
        except djinn.DjinnError as error:
            outcomes.append(error)

    hooks[run] = lambda: in_thread(elsewhere)
    try:
        run.result() if run.stop is None else list(run)
    finally:
        del hooks[run]
    return outcomes


hooks: dict[Run, Callable[[], None]] = {}


def when_hooked(h: torch.Tensor) -> torch.Tensor:
    for hook in list(hooks.values()):
        hook()
    return h[0] != h[0]


@pytest.mark.parametrize("phase", ["prompt", "generated"])
def test_what_another_thread_may_not_do_to_a_run_in_motion(one: djinn.Dj, phase: str) -> None:
    acts: dict[str, Callable[[Session, Run], Any]] = {
        "next": lambda s, run: next(run),
        "result": lambda s, run: run.result(),
        "results": lambda s, run: one.results([run]),
        "rewind": lambda s, run: run.rewind(0, "resid_post.0"),
        "offload": lambda s, run: s.offload(),
        "recompute": lambda s, run: s.steer("resid_post.0", add=V, kv="recompute"),
        "close": lambda s, run: s.close(),
        "abandon": lambda s, run: run.close(),
        "checkpoint": lambda s, run: s.checkpoint(),
    }
    for name, act in acts.items():
        with one.session() as s:
            point = djinn.break_at("resid_post.1", when_hooked, positions=phase)
            run = s.generate(
                prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=[point, "resid_post.0"]
            )
            assert isinstance(next(run), Stop)
            outcomes = paused(run, lambda: act(s, run))  # noqa: B023
            assert outcomes and all(isinstance(error, djinn.SessionBusy) for error in outcomes), (name, outcomes)
            said = (
                "a thread is in the middle of a step" if name == "checkpoint" else "another thread is driving this run"
            )
            assert said in str(outcomes[0]), name
            assert_same(run.result(), generated(one, prompt(PROMPT)))


# -- user code -----------------------------------------------------------------------------------


def test_no_lock_is_held_while_user_code_runs(one: djinn.Dj) -> None:
    """In a predicate, in on_token and in a loop's body another thread can do all of what it can do."""
    plain, busy = generated(one, prompt(PROMPT)), threading.Event()
    seen: list[str] = []

    def elsewhere(where: str) -> None:
        if not busy.is_set():
            busy.set()  # its own run calls predicates, too
            assert_same(in_thread(lambda: generated(one, prompt(PROMPT))), plain)
            busy.clear()
            seen.append(where)

    def when(h: torch.Tensor) -> torch.Tensor:
        elsewhere("predicate")
        return h[0] == h[0]

    with one.session() as s:
        run = s.generate(
            prompt(PROMPT),
            max_new_tokens=NEW,
            output_logits=True,
            on_token=lambda token: elsewhere("on_token"),
            breakpoints=[djinn.break_at("resid_post.1", when, times=3)],
        )
        armed = len(seen)
        for _ in run:
            elsewhere("loop")
        assert armed and set(seen) == {"predicate", "on_token", "loop"}
        assert_same(run.result(), plain)


def test_a_run_may_be_ended_from_on_token(one: djinn.Dj) -> None:
    with one.session() as s:
        told: list[int] = []

        def enough(token: int) -> None:
            told.append(token)
            if len(told) == 2:
                assert s.run is not None
                s.run.close()

        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, on_token=enough)
        assert list(run) == [] and run.finish_reason == "closed"
        assert s.tokens.tolist() == [*prompt(PROMPT).tolist(), *told] and len(told) == 2
        more = s.generate(max_new_tokens=2, output_logits=True).result()
    assert_same_bits(more.logits, generated(one, prompt(PROMPT)).logits[2:])  # type: ignore[index]


def test_what_user_code_may_not_do_to_its_own_run_in_motion(one: djinn.Dj) -> None:
    acts: list[Callable[[Session, Run], Any]] = [
        lambda s, run: next(run),
        lambda s, run: run.result(),
        lambda s, run: run.rewind(0, "resid_post.0"),
        lambda s, run: s.offload(),
        lambda s, run: s.steer("resid_post.0", add=V, kv="recompute"),
    ]
    with one.session() as s:

        def refuse(_: object) -> None:
            for act in acts:
                with pytest.raises(djinn.SessionBusy, match="in the middle of a step, which called your predicate or"):
                    act(s, s.run)  # type: ignore[arg-type]

        def when(h: torch.Tensor) -> torch.Tensor:
            if s.run is not None:
                refuse(h)
                with pytest.raises(djinn.SessionBusy):
                    s.run.close()
            return h[0] != h[0]

        points = [djinn.break_at("resid_post.1", when)]
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, on_token=refuse, breakpoints=points)
        assert list(run) == []
        assert_same(run.result(), generated(one, prompt(PROMPT)))


def test_a_failing_on_token_loses_no_token(one: djinn.Dj) -> None:
    def fail(token: int) -> None:
        raise ZeroDivisionError

    with one.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, on_token=fail)
        for count in range(1, NEW + 1):
            with pytest.raises(ZeroDivisionError):
                next(run)
            assert run.generated == count
        assert run.finished
        assert_same(run.result(), generated(one, prompt(PROMPT)))
