"""Predicates that fail and sites that come late: the step in the air stays where it was, and goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime import driver
from tests.bits import assert_same_bits
from tests.runtime.mistakes import begin, beside_another, fails
from tests.runtime.tiny import (
    CHUNK,
    NEW,
    PROMPT,
    another_dj,
    assert_same,
    compiled,
    direction,
    generated,
    prompt,
    some,
)

V = direction(1)


@pytest.fixture
def dj(one: djinn.Dj) -> Iterator[djinn.Dj]:
    yield from beside_another(one)


def explode(h: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("oh")


PREDICATES: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "raises": (explode, r"failed on a value of shape \(32,\): ZeroDivisionError: oh.*tensor operations only"),
    "branches": (lambda h: h[0] > 0 if h.sum() > 0 else h[1] > 0, r"failed .* no `if` or .item\(\) on data"),
    "item": (lambda h: torch.tensor(h.norm().item() > 3), r"failed .* no `if` or .item\(\) on data"),
    "float": (lambda h: h.norm(), "must return a 0-d bool tensor for each position; it returned dtype torch.float32"),
    "vector": (lambda h: h > 0, r"it returned dtype torch.bool and shape \(32,\)"),
    "no tensor": (lambda h: True, "failed|must return a 0-d bool tensor"),
    "probe": (djinn.when.probe(V[:3]), "failed on a value of shape"),
}


@pytest.mark.parametrize("name", PREDICATES)
def test_predicates_are_tried_when_armed(dj: djinn.Dj, name: str) -> None:
    when, message = PREDICATES[name]
    message = r"the predicate of break_at\('resid_post.0'\) (.|\n)*(" + message + ")"
    fails(dj, (lambda dj, s: begin(s, djinn.break_at("resid_post.0", when)), djinn.InvalidPredicate, message))


@pytest.mark.parametrize("position", [CHUNK, PROMPT + 1])
def test_a_predicate_that_fails_later_leaves_the_run_where_it_was(dj: djinn.Dj, position: int) -> None:
    broken = False

    def when(h: torch.Tensor) -> torch.Tensor:
        if broken:
            raise ZeroDivisionError
        return h[0] != h[0]

    with dj.session() as s:
        points = [djinn.break_at("attn_q.0", positions=position), djinn.break_at("resid_post.0", when)]
        points.insert(1, djinn.break_at("resid_post.0", times=1, positions=position))
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=points)
        next(run)
        broken = True
        for _ in range(2):
            with pytest.raises(djinn.InvalidPredicate, match="ZeroDivisionError"):
                next(run)
        broken = False
        assert next(run).site == "resid_post.0"  # was not counted when its neighbour failed
        assert_same(run.result(), generated(dj, prompt(PROMPT)))


@pytest.mark.parametrize("position", [3, CHUNK, PROMPT + 1])
@pytest.mark.parametrize("steered", [False, True])
def test_a_step_left_in_the_air_moves_with_its_session(dj: djinn.Dj, position: int, steered: bool) -> None:
    broken = False

    def when(h: torch.Tensor) -> torch.Tensor:
        if broken:
            raise ZeroDivisionError
        return h[0] != h[0]

    def run(fail: bool) -> Any:
        nonlocal broken
        with dj.session() as s:
            at = djinn.break_at("resid_post.0", when if fail else None, positions=position)
            run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=[at])
            broken = fail
            if fail:
                with pytest.raises(djinn.InvalidPredicate):
                    list(run)
            else:
                next(run)
            broken = False
            row = s.row
            s.offload()
            with dj.session() as other:
                assert other.row == row
                heard = other.generate(prompt(7), max_new_tokens=2, output_logits=True)
                heard.result()
                if steered:
                    s.steer("resid_post.1", add=V)
                result = run.result()
                assert s.row != row
                more = other.generate(max_new_tokens=2, output_logits=True).result()
            with dj.session() as alone:
                alone.generate(prompt(7), max_new_tokens=2).result()
                assert_same(more, alone.generate(max_new_tokens=2, output_logits=True).result())
            return result

    assert_same(run(fail=True), run(fail=False))


# -- sites compiled in later ---------------------------------------------------------------------


@pytest.mark.parametrize("position", [3, PROMPT - 1, PROMPT + 1])
def test_sites_may_be_added_while_a_run_is_in_the_air(position: int) -> None:
    dj, every = another_dj("llama"), compiled("llama", "every")
    results = []
    for late in (True, False):
        with (dj if late else every).session() as s:
            points = [djinn.break_at("attn_q.0", positions=position)]
            run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=points)
            stop = next(run)
            stop.value.mul_(-1)
            if late:
                with pytest.raises(djinn.SiteNotCompiled):
                    s.steer("attn_out.1", add=V)
                dj.add_sites(["attn_out.*", "resid_mid.0"])
            s.steer("attn_out.1", add=V)
            while stop.site != "attn_out.0":
                stop = some(stop.step())
            stop.value.add_(1)
            assert some(stop.step()).site == "resid_mid.0" and some(stop.run.stop).position == stop.position
            results.append(run.result())
            again = run.rewind(position, "attn_out.1")
            assert again.site == "attn_out.1"
            assert_same(run.result(), results[-1])
    assert_same(results[0], results[1])
    dj.close()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()], ids=["memory", "Ctrl-C"])
@pytest.mark.parametrize("first", ["prompt", "forward"])
def test_a_token_that_cannot_be_drawn_is_drawn_later(
    dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch, first: str, error: BaseException
) -> None:
    """The step whose end it is becomes history as a whole, with its token, or not at all."""
    options: Any = {"max_new_tokens": NEW, "output_logits": True, "capture": ["resid_post.1"], "do_sample": True}

    def begun(session: djinn.Session) -> Any:
        if first == "forward":
            session.forward(prompt(PROMPT)).run_to_end()
        return session.generate(None if first == "forward" else prompt(PROMPT), **options)

    with dj.session() as session:
        wanted = begun(session).result()
    with dj.session() as session:
        run = begun(session)

        def refuse(*_: object) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(driver, "sample", refuse)
            with pytest.raises(type(error)):
                run.result()
        assert not session.token_list[PROMPT:] and not run.records[1:]
        found = run.result()
        assert_same(found, wanted)
        assert_same_bits(found.cache["resid_post.1"], wanted.cache["resid_post.1"])
