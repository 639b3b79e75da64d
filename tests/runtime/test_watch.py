"""``session.watch`` where steps are launched ahead: a watched run's stops and tokens are those of any other run."""

from __future__ import annotations

from typing import Any

import pytest

import djinn_fx as djinn
from tests.runtime.tiny import CHUNK, another_dj, generated, prompt, values

LONG, PROMPT = 12, CHUNK  # one chunk: each shape is a compilation


@pytest.fixture(scope="module", params=["static", "inductor"])
def ahead(request: pytest.FixtureRequest) -> Any:
    with another_dj("gpt2", ("resid_post",), backend=request.param) as dj:
        yield dj


def test_a_watched_run_is_an_unwatched_one(ahead: djinn.Dj) -> None:
    whole = generated(ahead, prompt(PROMPT), LONG)
    norm = djinn.break_at("resid_post.1", when=djinn.when.norm_above(0.0), positions="generated")
    with ahead.session() as s:
        wanted = values(s.generate(prompt(PROMPT), max_new_tokens=LONG, breakpoints=[norm]))
    assert len(wanted) == LONG - 1
    with ahead.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=LONG)
        s.watch([norm])
        found = values(run)
        assert run.tokens.tolist() == whole.tokens.tolist()
    assert found.keys() == wanted.keys() and all(found[place].equal(wanted[place]) for place in wanted)


def test_watched_and_unwatched_in_the_middle(ahead: djinn.Dj) -> None:
    whole = generated(ahead, prompt(PROMPT), LONG)
    never = djinn.break_at("resid_post.0", when=djinn.when.norm_above(1e9))
    with ahead.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=LONG)
        s.watch([never, djinn.break_at("resid_post.1", positions=PROMPT + 2)])
        stop = next(run)  # the step after it was launched ahead, or could have been
        assert stop.position == PROMPT + 2
        s.watch([djinn.break_at("resid_post.0", positions=PROMPT + 3)])
        stop = next(run)
        assert (stop.position, stop.site) == (PROMPT + 3, "resid_post.0")
        s.watch([])
        run.interrupt()
        stop = next(run)
        assert (stop.position, stop.site) == (PROMPT + 3, "resid_post.1")
        assert next(run, None) is None
        assert run.tokens.tolist() == whole.tokens.tolist()


def test_one_is_watched_beside_one_that_is_not() -> None:
    ahead = another_dj("gpt2", ("resid_post",), backend="static")
    with ahead.session() as a, ahead.session() as b:
        wanted = [s.generate(prompt(PROMPT, seed), max_new_tokens=LONG) for seed, s in enumerate((a, b))]
        texts = [result.tokens.tolist() for result in ahead.results(wanted)]
    with ahead.session() as a, ahead.session() as b:
        runs = [s.generate(prompt(PROMPT, seed), max_new_tokens=LONG) for seed, s in enumerate((a, b))]
        a.watch([djinn.break_at("resid_post.1", when=djinn.when.norm_above(0.0), positions="generated")])
        stops = list(ahead.as_stopped(runs))
        assert {stop.run for stop in stops} == {runs[0]} and len(stops) == LONG - 1
        assert [run.tokens.tolist() for run in runs] == texts
    ahead.close()
