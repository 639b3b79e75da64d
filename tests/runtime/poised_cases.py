"""Runs that are edited at their stops, against the same runs whose steps run whole: the same bits in the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from torch import Tensor

import djinn_fx as djinn
from djinn_fx.runtime.graphs import Replayed, Runnable
from djinn_fx.runtime.lanes import Lanes
from djinn_fx.runtime.poised import Poised
from djinn_fx.runtime.stop import Stop
from tests.bits import assert_same_bits

#: Tokens of a prompt, and sampled ones.
GIVEN, NEW = 17, 8

Act = Callable[[djinn.Stop], None]

#: Whether a part of a step is ready when it is asked for the n-th time.
Ready = Callable[[int], bool]


def everything(dj: djinn.Dj, act: Act) -> tuple[list[int], list[Tensor]]:
    """Tokens, logits, and the values at all stops as they were found, and afterwards again."""
    found: list[Tensor] = []
    with dj.session(seed=1) as session:
        run = session.generate(
            list(range(3, 3 + GIVEN)),
            max_new_tokens=NEW,
            breakpoints=[djinn.break_at("resid_post.*", positions="generated")],
            output_logits=True,
        )
        for stop in run:
            found.append(stop.value.clone())
            act(stop)
        result = run.result()
        for position in reversed(range(GIVEN, GIVEN + NEW - 1)):
            again = run.rewind(position, dj.engine.sites[-1].name)
            found.append(again.value.clone())
    assert result.logits is not None
    return result.tokens.tolist(), [result.logits, *found]


def scaled(stop: djinn.Stop) -> None:
    stop.value.mul_(-1.5)


def first(stop: djinn.Stop) -> None:
    if stop.layer == 0:
        scaled(stop)


def two_of_three(stop: djinn.Stop) -> None:
    if stop.layer != 1:
        stop.value.add_(0.25 * stop.position)


def every_other_step(stop: djinn.Stop) -> None:
    if stop.position % 2:
        scaled(stop)


def steered(stop: djinn.Stop) -> None:
    stop.session.steer("resid_post.1", scale=1.0 + stop.position / 64)
    scaled(stop)


def no_edit(stop: djinn.Stop) -> None:
    stop.value.mul_(-1).mul_(-1)


def kept(stop: djinn.Stop) -> None:
    """The checkpoint of an edited stop goes on as the stop does."""
    scaled(stop)
    with stop.session.engine.lock:
        taken = stop.checkpoint()
    assert taken.nbytes > 0


ACTS = [scaled, first, two_of_three, every_other_step, steered, no_edit, kept]


def check(dj: djinn.Dj, act: Act, ready: Ready | None = None) -> tuple[list[bool], list[bool]]:
    """Tokens, logits and values of three runs are those of one whose steps are not made ready.

    Args:
        dj: the model.
        act: what is done at every stop.
        ready: whether parts of steps are ready, where that is not left to the loop.

    Returns:
        for each step that ran on from its stop, whether it did so from behind the site, and by a letter.
    """
    with mock.patch.object(Stop, "_make_ready", lambda stop: None):
        expected = everything(dj, act)
    chosen, rest, inject, asked = Poised.ready, Replayed._rest, Lanes.inject, 0
    ways: list[bool] = []
    posts: list[bool] = []

    def way_of(poised: Poised) -> Any:
        way, part = chosen(poised)
        ways.append(way is poised.short)
        return way, part

    def rest_of(replayed: Replayed, first: int) -> Runnable | None:
        nonlocal asked
        asked += 1
        return rest(replayed, first) if ready is None or ready(asked) else None

    def injected(lanes: Lanes, *given: Any, post: bool = False) -> None:
        posts.append(post)
        inject(lanes, *given, post=post)

    patches = ((Poised, "ready", way_of), (Replayed, "_rest", rest_of), (Lanes, "inject", injected))
    for _ in range(3):
        with mock.patch.object(*patches[0]), mock.patch.object(*patches[1]), mock.patch.object(*patches[2]):
            found = everything(dj, act)
        assert found[0] == expected[0]
        for mine, other in zip(found[1], expected[1], strict=True):
            assert_same_bits(mine, other)
    return ways, posts
