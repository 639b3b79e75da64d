"""Runs that nobody watches ride along beside one that stops: the same tokens, and failures are one run's alone."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest

import djinn_fx as djinn
from djinn_fx.runtime import riders
from tests.runtime.tiny import another_dj, generated, prompt

NEW = 10
PROMPTS = [prompt(length, seed) for seed, length in enumerate((7, 5, 9, 6))]


@pytest.fixture(scope="module")
def dj() -> Iterator[djinn.Dj]:
    made = another_dj("gpt2", backend="static", batch_invariant=True)
    yield made
    made.close()


def test_they_ride_and_have_their_own_tokens(dj: djinn.Dj) -> None:
    wanted = [generated(dj, ids, NEW).tokens.tolist() for ids in PROMPTS]
    sessions = [dj.session() for _ in PROMPTS]
    points = [[djinn.Breakpoint("resid_post.1", positions="generated")], [], [], []]
    runs = [
        session.generate(ids, max_new_tokens=NEW, breakpoints=point)
        for session, ids, point in zip(sessions, PROMPTS, points, strict=True)
    ]
    with mock.patch.object(riders, "commit", side_effect=riders.commit) as committed:
        stops = sum(1 for _ in dj.as_stopped(runs))
    assert stops == NEW - 1
    assert committed.call_count > NEW, "most steps of the three others need no plan"
    assert [run.result().tokens.tolist() for run in runs] == wanted
    for session in sessions:
        session.close()


def test_one_that_is_steered_on_the_way_gets_off(dj: djinn.Dj) -> None:
    found: list[list[int]] = []
    for beside in (False, True):
        with dj.session() as session, dj.session() as other:
            heard: list[int] = []

            def hear(token: int, session: djinn.Session = session, heard: list[int] = heard) -> None:
                heard.append(token)
                if len(heard) == 4:
                    session.steer("resid_post.0", scale=-1.0)

            runs = [session.generate(PROMPTS[1], max_new_tokens=NEW, on_token=hear)]
            if beside:
                point = djinn.Breakpoint("resid_post.1", positions="generated")
                runs.append(other.generate(PROMPTS[0], max_new_tokens=NEW, breakpoints=[point]))
            for _ in dj.as_stopped(runs):
                pass
            assert runs[0].result().tokens[len(PROMPTS[1]) :].tolist() == heard
            found.append(heard)
    assert found[0] == found[1] != generated(dj, PROMPTS[1], NEW).tokens[len(PROMPTS[1]) :].tolist()


@pytest.mark.parametrize("watched", [False, True], ids=["cruising", "riding"])
def test_a_callback_that_raises_keeps_no_other_from_being_called(dj: djinn.Dj, watched: bool) -> None:
    heard: list[int] = []

    def fails(token: int) -> None:
        raise ZeroDivisionError(token)

    sessions = [dj.session() for _ in range(3)]
    point = [djinn.Breakpoint("resid_post.1", positions="generated")] if watched else []
    runs = [
        sessions[0].generate(PROMPTS[0], max_new_tokens=NEW, on_token=fails),
        sessions[1].generate(PROMPTS[1], max_new_tokens=NEW, on_token=heard.append),
        sessions[2].generate(PROMPTS[2], max_new_tokens=NEW, breakpoints=point),
    ]
    failures = 0
    while not all(run.finished for run in runs):
        try:
            for _ in dj.as_stopped(runs):
                pass
        except ZeroDivisionError:
            failures += 1
    assert failures == NEW
    assert heard == runs[1].result().tokens[len(PROMPTS[1]) :].tolist()
    for session in sessions:
        session.close()
