"""Where and from when steering acts, and the handles on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime.results import Result
from djinn_fx.runtime.session import Session
from djinn_fx.specs import Positions
from tests.bits import assert_same_bits, same_bits
from tests.runtime.tiny import (
    NEW,
    PROMPT,
    WIDTH,
    assert_same,
    bits_of,
    direction,
    edited,
    generated,
    logits_of,
    prompt,
    steered,
)

V = direction(1)


FORMS: list[tuple[Positions, Iterable[int]]] = [
    ("all", range(23)),
    ("prompt", range(20)),
    ("generated", (20, 21, 22)),
    ("last_prompt", (19,)),
    (("last_prompt", "generated"), range(19, 23)),
    (("prompt", "last_prompt"), range(20)),
    (21, (21,)),
    (3, (3,)),
    (slice(2, 21), range(2, 21)),
    (slice(None, 17), range(17)),
    (slice(18, None), range(18, 23)),
    ([0, 7, 21], (0, 7, 21)),
    ((5, 22), (5, 22)),
]


@pytest.mark.parametrize(("positions", "meant"), FORMS, ids=str)
def test_positions(one: djinn.Dj, positions: Positions, meant: Iterable[int]) -> None:
    by_hand = edited(one, "resid_post.0", meant, lambda h: h + V)
    assert not same_bits(bits_of(by_hand), bits_of(generated(one, prompt(PROMPT), NEW)))
    assert_same(steered(one, djinn.Edit("resid_post.0", add=V, positions=positions)), by_hand)
    turned = edited(one, "resid_post.0", meant, lambda h: h - (h @ V) * V / (V @ V))
    ablated = steered(one, djinn.Edit("resid_post.0", ablate=V, positions=positions))
    torch.testing.assert_close(ablated.logits, turned.logits, rtol=1e-4, atol=1e-4)


def test_prompt_and_last_prompt_speak_of_each_call(one: djinn.Dj) -> None:
    def run(act: Callable[[Session, int], None]) -> torch.Tensor:
        with one.session() as s:
            act(s, 0)
            first = s.generate(prompt(4), max_new_tokens=3, output_logits=True).result()
            act(s, 1)
            return torch.cat([bits_of(first), logits_of(s, prompt(3, 5))])

    # The second call forwards the last sampled token, 6, and its own three, 7 to 9.
    def last(s: Session, call: int) -> None:
        s.steer("resid_post.0", add=V, positions="last_prompt")

    def by_hand(s: Session, call: int) -> None:
        s.steer("resid_post.0", add=V, positions=(3, 9)[call])

    assert_same_bits(run(last), run(by_hand))

    def given(s: Session, call: int) -> None:
        s.steer("resid_post.0", add=V, positions="prompt")

    def also_by_hand(s: Session, call: int) -> None:
        s.steer("resid_post.0", add=V, positions=[0, 1, 2, 3, 7, 8, 9])

    assert_same_bits(run(given), run(also_by_hand))


@pytest.mark.parametrize("dj", ["llama-bf16"], indirect=True)
def test_a_scale_of_nine_tenths_means_nine_tenths_in_bf16(dj: djinn.Dj) -> None:
    def run(change: Callable[[Any], Any]) -> Result:
        return edited(dj, "resid_post.0", range(23), change)

    kept = steered(dj, djinn.Edit("resid_post.0", scale=0.9))
    assert_same(kept, run(lambda h: h * 0.9))
    assert not same_bits(bits_of(kept), bits_of(run(lambda h: h * torch.tensor(0.9).bfloat16())))
    vector = steered(dj, djinn.Edit("resid_post.0", scale=torch.full((WIDTH,), 0.9)))
    assert_same(kept, vector)
    # Round after the scale, round after the add.
    both = steered(dj, djinn.Edit("resid_post.0", scale=0.9, add=V))
    assert_same(both, run(lambda h: ((h * 0.9).float() + V).bfloat16()))


# -- when it acts --------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["resid_post.0", "mlp_out.1", "resid_post.1"])
@pytest.mark.parametrize("position", [15, 19, 21])
@pytest.mark.parametrize("change", ["steer", "remove", "strength"])
def test_a_change_at_a_stop_acts_behind_it_only(dj: djinn.Dj, site: str, position: int, change: str) -> None:
    """At the stop after mlp_out.1: resid_post.1 is still ahead, the other two come with the next step."""
    ahead = site == "resid_post.1"
    turn = position + (not ahead)
    if position < PROMPT and ahead:
        turn = position // 16 * 16  # all of the chunk is ahead
    with dj.session() as s:
        handle = None if change == "steer" else s.steer(site, add=V)
        at = djinn.break_at("mlp_out.1", positions=position)
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=[at])
        for _ in run:
            if handle is None:
                s.steer(site, add=V)
            elif change == "remove":
                handle.remove()
            else:
                handle.strength = 0.25
        late = run.result()
    size = {"steer": (0.0, 1.0), "remove": (1.0, 0.0), "strength": (1.0, 0.25)}[change]
    assert_same(late, edited_in_two(dj, site, turn, size))


def edited_in_two(dj: djinn.Dj, site: str, turn: int, size: tuple[float, float]) -> Result:
    """So much of V added before position ``turn`` and so much from there on."""
    with dj.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=[site])
        for stop in run:
            for row, position in enumerate(stop.positions):
                share = size[position >= turn]
                if share:
                    stop.value[row] = (stop.value[row].float() + V * share).to(stop.value.dtype)
        return run.result()


def test_strength_is_a_share_of_the_whole_change(one: djinn.Dj) -> None:
    half = steered(one, djinn.Edit("resid_post.0", scale=0.5, add=V, strength=0.5))
    assert_same(half, steered(one, djinn.Edit("resid_post.0", scale=0.75, add=V / 2)))
    twice = steered(one, djinn.Edit("resid_post.0", add=V, strength=-2.0))
    assert_same(twice, steered(one, djinn.Edit("resid_post.0", add=V * -2)))


def test_handles(one: djinn.Dj) -> None:
    with one.session() as s:
        first = s.steer("blocks.0.hook_resid_post", add=V)
        assert (first.site, first.active, first.strength) == ("resid_post.0", True, 1.0)
        first.strength = 0.5
        assert first.strength == first.edit.strength == 0.5 and first.edit.add is not None
        other = s.steer("resid_post.1", scale=2.0)
        second = s.steer("resid_post.0", scale=0.9)
        assert [handle.active for handle in (first, second, other)] == [False, True, True]
        for act in (lambda: first.strength, lambda: setattr(first, "strength", 1.0), lambda: first.edit):
            with pytest.raises(djinn.InvalidValue, match=r"'resid_post.0': it was removed, replaced .* steer\(\)"):
                act()
        first.remove()  # does nothing to the one that replaced it
        assert "strength=1.0" in repr(second) and "not in force" in repr(first)
        other.remove()
        other.remove()
        assert_same(
            steered(one, djinn.Edit("resid_post.0", scale=0.9)),
            s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True).result(),
        )


def test_the_later_steering_of_a_site_replaces_the_earlier(one: djinn.Dj) -> None:
    edits = [djinn.Edit("resid_post.0", add=V), djinn.Edit("resid_post.0", scale=0.9)]
    assert_same(steered(one, *edits), steered(one, edits[1]))


def test_an_edit_owns_its_tensors(one: djinn.Dj) -> None:
    scale, read = V.abs(), V.clone()
    edit = djinn.Edit("resid_post.0", scale=scale, feature=djinn.Feature(read, read, set=1.0))
    expected = steered(one, edit)
    with one.session() as s:
        handle = s.steer(edit)
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True)
        scale.zero_()
        read.zero_()
        assert_same(run.result(), expected)
        handle.strength = 1.0
        again = logits_of(s, prompt(3))
    with one.session() as s:
        s.steer("resid_post.0", scale=V.abs(), feature=djinn.Feature(V, V, set=1.0))
        s.generate(prompt(PROMPT), max_new_tokens=NEW).result()
        assert_same_bits(again, logits_of(s, prompt(3)))


# -- as if it had always acted -------------------------------------------------------------------


def test_recompute_is_a_session_steered_from_the_start(dj: djinn.Dj) -> None:
    with dj.session() as s:
        s.steer("resid_post.0", add=V)
        s.forward(prompt(PROMPT)).result()
        rest = s.generate(prompt(3, 1), max_new_tokens=NEW, output_logits=True).result()
    with dj.session() as s:
        s.forward(prompt(PROMPT)).result()
        s.steer("resid_post.0", add=V, kv="recompute")
        assert_same(s.generate(prompt(3, 1), max_new_tokens=NEW, output_logits=True).result(), rest)
    with dj.session() as s:
        s.forward(prompt(PROMPT)).result()
        s.steer("resid_post.0", add=V)
        kept = s.generate(prompt(3, 1), max_new_tokens=NEW, output_logits=True).result()
        assert not same_bits(bits_of(kept), bits_of(rest))


def test_recompute_reaches_the_token_that_comes_next(dj: djinn.Dj) -> None:
    def run(before: bool) -> Result:
        with dj.session() as s:
            if before:
                s.steer("resid_post.0", add=V * 3)
            s.forward(prompt(PROMPT)).result()
            if not before:
                s.steer("resid_post.0", add=V * 3, kv="recompute")
            return s.generate(max_new_tokens=NEW, output_logits=True).result()

    assert_same(run(before=False), run(before=True))


@pytest.mark.parametrize("position", [15, 19, 21])
def test_recompute_at_a_stop_keeps_the_place_and_the_edits(dj: djinn.Dj, position: int) -> None:
    """A small edit, that no token feels: tokens are kept, and would differ from those of the other session."""

    def run(before: bool) -> Result:
        with dj.session() as s:
            if before:
                s.steer("mlp_out.1", add=V * 0.004)
            points = [djinn.break_at("resid_post.0", positions=p) for p in (3, position)]
            run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=points)
            for stop in run:
                stop.value.mul_(0.5)
                if stop.position == position and not before:
                    s.steer("mlp_out.1", add=V * 0.004, kv="recompute")
                    again = run.stop
                    assert again is not None and again is not stop
                    assert (again.site, again.position, again.fired) == (stop.site, stop.position, stop.fired)
                    assert_same_bits(again.value, stop.value)
            return run.result()

    late, early = run(before=False), run(before=True)
    assert late.tokens.tolist() == early.tokens.tolist()
    first = max(0, position - PROMPT + 1)  # what was returned before stays as it was
    assert_same_bits(bits_of(late)[first:], bits_of(early)[first:])
