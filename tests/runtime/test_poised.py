"""Steps made ready at their stops: they go on at once with another value, or else as any other step does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import djinn_fx as djinn
from djinn_fx.runtime import driver, moves, standing
from djinn_fx.runtime.doubt import Question
from djinn_fx.runtime.graphs import Replayed
from djinn_fx.runtime.lanes import Lanes
from djinn_fx.runtime.launch import LaunchValues
from djinn_fx.runtime.loop import DecodeLoop
from djinn_fx.runtime.outbox import Outbox
from tests.bits import assert_same_bits
from tests.runtime.poised_cases import ACTS, Act, Ready, check
from tests.runtime.poised_cases import steered as of_steered
from tests.runtime.tiny import another_dj, direction, prompt

NEW = 6


@contextmanager
def at_once() -> Iterator[list[bool]]:
    """For each time that one run goes on, whether it was a poised step that did."""
    found: list[bool] = []

    def go_on(*given: object) -> bool:
        found.append(standing.go_on(*given))  # type: ignore[arg-type]
        return found[-1]

    with mock.patch.object(driver, "go_on", go_on):
        yield found


def run_of(dj: djinn.Dj, session: djinn.Session) -> djinn.Run:
    """A run that stops at two layers of each generated token."""
    points = [djinn.break_at("resid_post.*", positions="generated")]
    return session.generate(prompt(7), max_new_tokens=NEW, breakpoints=points, output_logits=True)


def outcome(run: djinn.Run) -> tuple[list[int], Tensor]:
    """Tokens and logits."""
    result = run.result()
    assert result.logits is not None
    return result.tokens.tolist(), result.logits


def same(pair: tuple[djinn.Dj, djinn.Dj], script: Callable[[djinn.Dj], tuple[list[int], Tensor]]) -> list[bool]:
    """Both backends give the same; returns which of the loop's steps were poised and went on at once."""
    with at_once() as found:
        ours = script(pair[0])
    theirs = script(pair[1])
    assert ours[0] == theirs[0]
    assert_same_bits(ours[1], theirs[1])
    return found


def edited_by(act: Callable[[djinn.Dj, djinn.Stop], None]) -> Callable[[djinn.Dj], tuple[list[int], Tensor]]:
    """A run in which every stop is edited in one way."""

    def script(dj: djinn.Dj) -> tuple[list[int], Tensor]:
        with dj.session() as session:
            run = run_of(dj, session)
            for stop in run:
                act(dj, stop)
            return outcome(run)

    return script


def scaled(dj: djinn.Dj, stop: djinn.Stop) -> None:
    stop.value.mul_(-1.5)


def turned(dj: djinn.Dj, stop: djinn.Stop) -> None:
    """A value whose elements lie in another order."""
    wide = torch.empty(*stop.value.shape, 2, dtype=stop.value.dtype)
    wide[..., 0] = stop.value * 2
    stop.value = wide[..., 0]
    stop._value = wide[..., 0]  # as if it had been kept as it is


def steered(dj: djinn.Dj, stop: djinn.Stop) -> None:
    stop.session.steer("resid_post.1", scale=1.0 + stop.position / 8)
    scaled(dj, stop)


def forked(dj: djinn.Dj, stop: djinn.Stop) -> None:
    (twin,) = stop.fork()
    scaled(dj, stop)
    twin.session.close()


def beside(dj: djinn.Dj, stop: djinn.Stop) -> None:
    """Another session decodes between the stop and the edit."""
    with dj.session() as other:
        other.generate(prompt(5, 1), max_new_tokens=2).result()
    scaled(dj, stop)


def moved(dj: djinn.Dj, stop: djinn.Stop) -> None:
    stop.session.offload()
    scaled(dj, stop)


def looked_at(dj: djinn.Dj, stop: djinn.Stop) -> None:
    assert stop.value.isfinite().all()


def rewound(dj: djinn.Dj, stop: djinn.Stop) -> None:
    """What is written at the stop that was left by a rewind has no effect."""
    value = stop.value
    stop.run.rewind(stop.position, stop.site)
    value.mul_(3)


@pytest.mark.parametrize(
    ("act", "some"),
    [(scaled, True), (turned, False), (steered, False), (forked, False), (beside, False), (moved, False)],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_bits_stay_and_only_what_stands_undisturbed_goes_on_at_once(
    pair: tuple[djinn.Dj, djinn.Dj], act: Callable[[djinn.Dj, djinn.Stop], None], some: bool
) -> None:
    found = same(pair, edited_by(act))
    assert found.count(True) == (2 * (NEW - 1) if some else 0)


@pytest.mark.parametrize("act", [looked_at, rewound], ids=lambda act: act.__name__)
def test_what_nobody_wrote_does_not_run_again(
    pair: tuple[djinn.Dj, djinn.Dj], act: Callable[[djinn.Dj, djinn.Stop], None]
) -> None:
    def script(dj: djinn.Dj) -> tuple[list[int], Tensor]:
        with dj.session() as session:
            run = run_of(dj, session)
            act(dj, next(run))
            return outcome(run)

    assert True not in same(pair, script)


@pytest.mark.parametrize("where", ["part", "post", "posted", "run", "sent", "asked", "serves"])
def test_an_interrupt_loses_no_edit(pair: tuple[djinn.Dj, djinn.Dj], where: str) -> None:
    """Ctrl-C before a poised step runs, while it runs, and behind it: what was written acts when the run goes on."""
    target = {
        "part": (Replayed, "part"),
        "post": (Outbox, "post"),
        "posted": (DecodeLoop, "_start"),
        "run": (DecodeLoop, "_run"),
        "sent": (Lanes, "sent"),
        "asked": (Question, "asked"),
        "serves": (LaunchValues, "__init__"),
    }[where]

    def script(dj: djinn.Dj) -> tuple[list[int], Tensor]:
        with dj.session() as session:
            run = run_of(dj, session)
            scaled(dj, next(run))
            with mock.patch.object(*target, side_effect=KeyboardInterrupt), suppress(KeyboardInterrupt):
                if dj is pair[0]:
                    next(run)
            with dj.restore(session.checkpoint()) as twin:
                assert twin.run is not None
                ours, its = outcome(run), outcome(twin.run)
            assert ours[0] == its[0]
            assert_same_bits(ours[1], its[1])
            return ours

    same(pair, script)


class Cut(np.ndarray):
    """Numbers; whoever writes to them is interrupted right after."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        raise KeyboardInterrupt


@pytest.mark.parametrize("beside", [scaled, steered], ids=["at once", "steered"])
def test_flags_whose_writing_was_interrupted_are_sent(
    pair: tuple[djinn.Dj, djinn.Dj], beside: Callable[[djinn.Dj, djinn.Stop], None]
) -> None:
    def script(dj: djinn.Dj) -> tuple[list[int], Tensor]:
        with dj.session() as session:
            run = run_of(dj, session)
            beside(dj, next(run))
            if dj is pair[0]:
                loop = dj.engine.loop
                assert loop is not None
                cut = mock.patch.object(loop.lanes, "_host_flags", loop.lanes._host_flags.view(Cut))
                with cut, pytest.raises(KeyboardInterrupt):
                    next(run)
            return outcome(run)

    same(pair, script)


def test_the_value_may_be_written_again_right_after(pair: tuple[djinn.Dj, djinn.Dj]) -> None:
    """What a user does to a value that he kept, once the run went on, changes nothing."""

    def script(dj: djinn.Dj) -> tuple[list[int], Tensor]:
        with dj.session() as session:
            run, kept = run_of(dj, session), []
            for stop in run:
                scaled(dj, stop)
                kept.append(stop.value)
                kept[:-1] = [value.zero_() for value in kept[:-1]]
            tokens, logits = outcome(run)
            assert all(step.injections for step in session.journal[1:])
            return tokens, logits

    same(pair, script)


def test_an_edit_can_be_rewound_and_made_otherwise(pair: tuple[djinn.Dj, djinn.Dj]) -> None:
    def script(dj: djinn.Dj) -> tuple[list[int], Tensor]:
        with dj.session() as session:
            run = run_of(dj, session)
            first = next(run)
            scaled(dj, first)
            next(run)
            stop = run.rewind(first.position, first.site)
            stop.value.add_(direction(3).to(stop.value.dtype))
            return outcome(run)

    same(pair, script)


def test_another_shape_is_refused_and_nothing_is_lost(pair: tuple[djinn.Dj, djinn.Dj]) -> None:
    with pair[0].session() as session:
        run = run_of(pair[0], session)
        stop = next(run)
        kept = stop.value.clone() * 2
        stop.value.mul_(2)
        stop.value.data = torch.zeros(3)
        with pytest.raises(djinn.InvalidValue, match="through"):
            next(run)
        assert run.stop is stop
        stop.value.data = kept
        next(run)
        (injected,) = [step.injections for step in [run.flight.step] if run.flight is not None]  # type: ignore[union-attr]
        assert_same_bits(injected["resid_post.0"], kept)


def test_a_step_is_made_ready_when_its_value_is_asked_for_and_forgotten_when_it_goes_on(
    pair: tuple[djinn.Dj, djinn.Dj],
) -> None:
    with pair[0].session() as session:
        run = run_of(pair[0], session)
        stop = next(run)
        assert stop.poised is None
        scaled(pair[0], stop)
        assert stop.poised is not None and stop.poised.way.begin > 0
        other = next(run)
        assert stop.poised is None and stop.value is not None and stop.poised is None
        other.value = other.content * 2
        assert other.poised is not None


@pytest.fixture(scope="module", params=["gpt2", "llama-bf16"])
def own(request: pytest.FixtureRequest) -> Iterator[djinn.Dj]:
    """A model that is cut as one with our matrix kernels is: a site's value is handed from one segment to the next."""
    with mock.patch("djinn_fx.making._has_own_products", lambda source: True):
        dj = another_dj(request.param, backend="static")
        yield dj
    dj.close()


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
@pytest.mark.parametrize("ready", [lambda n: True, lambda n: False, lambda n: n % 2, lambda n: n * 5 % 7 < 4])
def test_a_step_goes_on_from_behind_its_site(own: djinn.Dj, act: Act, ready: Ready) -> None:
    """Also where parts are ready at one site and not at the next: what was injected before is injected again."""
    ways, _ = check(own, act, ready)
    assert (True in ways) == (act is not of_steered and ready(1) + ready(2) > 0)


def test_a_value_that_took_a_sites_place_is_gone_where_its_step_runs_again_without_it(own: djinn.Dj) -> None:
    """The tables never held it: steering of a later site alone must not be all that seems to have changed."""

    def script() -> tuple[list[int], Tensor]:
        with own.session() as session:
            run = run_of(own, session)
            scaled(own, stop := next(run))
            next(run)
            with mock.patch.object(moves, "execute", side_effect=KeyboardInterrupt), suppress(KeyboardInterrupt):
                run.rewind(stop.position, stop.site)
            session.steer("resid_post.1", scale=2.0)
            return outcome(run)

    with mock.patch.object(djinn.Stop, "_make_ready", lambda stop: None):
        expected = script()
    found = script()
    assert found[0] == expected[0]
    assert_same_bits(found[1], expected[1])
