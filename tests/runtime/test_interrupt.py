"""``run.interrupt``: a run stops at the next site it comes to, from wherever it was asked to, and loses nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import djinn_fx as djinn
from tests.runtime.tiny import PROMPT, another_dj, assert_same, generated, prompt

LONG = 24


@pytest.mark.parametrize("backend", ["eager", "static"])
@pytest.mark.parametrize(
    "points", [[], ["resid_post.1"], [djinn.break_at("resid_post.1", when=djinn.when.norm_above(1e9))]]
)
def test_asked_in_the_middle_of_a_run(backend: str, points: list[Any]) -> None:
    dj = another_dj("llama", backend=backend)
    with dj:
        whole = generated(dj, prompt(PROMPT), LONG)
        with dj.session() as s:
            asked: list[int] = []

            def on_token(token: int) -> None:
                if len(s.tokens) == PROMPT + 7 and not asked:
                    asked.append(token)
                    assert s.run is not None
                    s.run.interrupt()

            run = s.generate(
                prompt(PROMPT), max_new_tokens=LONG, on_token=on_token, output_logits=not points, breakpoints=points
            )
            stops = [stop for stop in run if stop.site == dj.compiled_sites[0]]
            assert [(stop.position, stop.fired) for stop in stops] == [(PROMPT + 6, ())]
            assert run.finished and run.result().tokens.tolist() == whole.tokens.tolist()
            if not points:
                assert_same(run.result(), whole)


def test_asked_by_another_thread(one: djinn.Dj) -> None:
    whole = generated(one, prompt(PROMPT), LONG)
    with one.session() as s:
        begun, asked = threading.Event(), threading.Event()

        def on_token(_: int) -> None:
            begun.set()
            asked.wait(10)

        run = s.generate(prompt(PROMPT), max_new_tokens=LONG, on_token=on_token)
        found: list[Any] = []
        driver = threading.Thread(target=lambda: found.append(next(run, None)))
        driver.start()
        assert begun.wait(10)
        run.interrupt()
        asked.set()
        driver.join(10)
        assert found == [run.stop] and run.stop is not None and not run.finished
        assert run.result().tokens.tolist() == whole.tokens.tolist()


def test_asked_before_a_run_is_advanced(one: djinn.Dj) -> None:
    with one.session() as s:
        run = s.generate(prompt(3), max_new_tokens=2)
        run.interrupt()
        stop = next(run)
        assert stop.site == one.compiled_sites[0] and stop.phase == "prompt"
        assert next(run, None) is None


def test_result_passes_over_it_and_a_finished_run_forgets_it(one: djinn.Dj) -> None:
    with one.session() as s:
        run = s.generate(prompt(3), max_new_tokens=2)
        run.interrupt()
        assert run.result().finish_reason == "length"
        stop = run.rewind(position=2)
        assert not run.interrupted and stop.site == one.compiled_sites[0]


def test_it_goes_before_a_step_to_a_later_place_and_among_many(one: djinn.Dj) -> None:
    with one.session() as a, one.session() as b:
        runs = [s.generate(prompt(3), max_new_tokens=4) for s in (a, b)]
        runs[1].interrupt()
        stopped = list(one.as_stopped(runs))
        assert [stop.run for stop in stopped] == [runs[1]]
        run = a.generate(prompt(3, 1), max_new_tokens=4, breakpoints=[djinn.break_at("resid_post.1", times=1)])
        stop = next(run)
        run.interrupt()
        near = stop.step(tokens=2)
        assert near is not None and near.position == stop.position + 1 and near.site == one.compiled_sites[0]


@pytest.mark.parametrize("backend", ["eager", "static"])
@pytest.mark.parametrize("when", [None, djinn.when.norm_above(0.0)])
def test_breakpoints_behind_it_in_the_same_step_hold(backend: str, when: Any) -> None:
    """What makes a run stop at the first site it comes to does not let it pass over those that follow."""
    with another_dj("llama", backend=backend) as dj, dj.session() as s:
        points = [djinn.break_at("resid_post.1", when=when, positions="generated")]
        run = s.generate(prompt(PROMPT), max_new_tokens=4, breakpoints=points)
        assert next(run).position == PROMPT
        run.interrupt()
        places = [(stop.site, stop.position) for stop in run]
    steps = [("resid_post.1", PROMPT + step) for step in (1, 2)]
    assert places == [(dj.compiled_sites[0], PROMPT + 1), *steps]
