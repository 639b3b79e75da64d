"""The past: fork it, go back into it, take it off the device and bring it home, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import djinn_fx as djinn
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.session import Session
from tests.bits import assert_same_bits, same_bits
from tests.runtime.tiny import (
    CHUNK,
    NEW,
    PROMPT,
    ROWS,
    assert_same,
    bits_of,
    direction,
    generated,
    logits_of,
    prompt,
    some,
    values,
)

V = direction(1)
#: Ends and beginnings of chunks, the last of the prompt, tokens.
PLACES = (0, CHUNK - 1, CHUNK, PROMPT - 1, PROMPT, PROMPT + 2)


def usual(session: Session, *breakpoints: Any, **options: Any) -> Run:
    """The usual run on a session, lazy."""
    return session.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=breakpoints, **options)


def last_of_step(position: int) -> int:
    """Where a stop of the step that covers ``position`` says it is."""
    return position if position >= PROMPT else CHUNK - 1 if position < CHUNK else PROMPT - 1


# -- rewind --------------------------------------------------------------------------------------


def test_rewind_to_every_site_shows_and_gives_what_was(every: djinn.Dj) -> None:
    with every.session() as s:
        run = usual(s, *every.compiled_sites)
        seen = values(run)
        plain = run.result()
        for position in reversed(PLACES):
            for site in reversed(every.compiled_sites):
                stop = run.rewind(position, site)
                assert (stop.site, stop.position, stop.fired) == (site, last_of_step(position), ())
                assert run.stop is stop and not run.finished
                assert_same_bits(stop.value, seen[stop.position, site], site)
        assert_same(run.result(), plain)


@pytest.mark.parametrize("position", PLACES)
def test_a_finished_run_goes_on_from_where_it_is_rewound_to(dj: djinn.Dj, position: int) -> None:
    with dj.session() as s:
        run = usual(s)
        plain = run.result()
        for site in dj.compiled_sites:
            run.rewind(position, site)
            assert s.tokens.tolist() == plain.tokens[: max(PROMPT, position + 1)].tolist()
            assert_same(run.result(), plain, site)
        assert run.finish_reason == "length"


def test_rewind_replays_earlier_edits_and_drops_later_ones(dj: djinn.Dj) -> None:
    def run_with(*edited: tuple[int, str]) -> Any:
        with dj.session() as s:
            run = usual(s, "attn_q.0", "resid_post.0", "mlp_out.1")
            for stop in run:
                if (stop.position, stop.site) in edited:
                    stop.value.add_(1)
            if len(edited) == 4:
                run.rewind(21, "resid_post.0")
            return run.result()

    edits = ((15, "resid_post.0"), (21, "attn_q.0"), (21, "mlp_out.1"), (22, "resid_post.0"))
    assert_same(run_with(*edits), run_with(*edits[:2]))
    assert not same_bits(bits_of(run_with(*edits[:3])), bits_of(run_with(*edits[:2])))


def test_rewind_drops_the_edit_at_the_place_itself(dj: djinn.Dj) -> None:
    with dj.session() as s:
        run = usual(s, djinn.break_at("resid_post.0", positions=(3, 21)))
        for stop in run:
            stop.value.add_(1)
        for position in (21, 3):
            run.rewind(position, "resid_post.0")
        assert_same(run.result(), generated(dj, prompt(PROMPT)))


def test_another_way_from_the_same_place(dj: djinn.Dj) -> None:
    """Edit, rewind, edit otherwise, rewind, edit as before: the first way again."""
    ways = []
    with dj.session() as s:
        run = usual(s)
        run.result()
        for factor in (-1.0, 3.0, -1.0):
            run.rewind(20, "resid_post.0").value.mul_(factor)
            ways.append(run.result())
    assert_same(ways[0], ways[2])
    assert not same_bits(bits_of(ways[0]), bits_of(ways[1]))


def test_rewind_rolls_steering_back(dj: djinn.Dj) -> None:
    with dj.session() as s:
        first = s.steer("resid_post.0", add=V)
        plain = usual(s).result()
    with dj.session() as s:
        first = s.steer("resid_post.0", add=V)
        run = usual(s, djinn.break_at("resid_post.0", positions=(20, 21)))
        next(run)
        second = s.steer("resid_post.1", add=V)
        next(run)
        third = s.steer("resid_post.0", scale=0.5)
        first_strength = first.active
        run.result()
        assert (first_strength, second.active, third.active) == (False, True, True)
        run.rewind(20, "resid_post.0")
        assert [handle.active for handle in (first, second, third)] == [True, False, False]
        assert first.strength == 1.0 and set(s.steering) == {"resid_post.0"}
        assert_same(run.result(), plain)
        second.remove()
        with pytest.raises(djinn.InvalidValue, match="rewound away"):
            third.strength = 2.0


def test_rewind_between_two_changes_of_one_step(dj: djinn.Dj) -> None:
    """A change at a stop acts on the sites behind it; rewound to before, it is gone, to behind, it stays."""
    with dj.session() as s:
        run = usual(s, djinn.break_at("resid_post.0", positions=20))
        next(run)
        s.steer("resid_post.1", add=V)
        late = run.result()
        run.rewind(20, "mlp_out.1")
        assert_same(run.result(), late)
        run.rewind(20, "attn_q.0")
        assert_same(run.result(), generated(dj, prompt(PROMPT)))


def test_rewind_from_a_stop_and_inside_the_loop(one: djinn.Dj) -> None:
    plain = generated(one, prompt(PROMPT))
    with one.session() as s:
        run = usual(s, "resid_post.1")
        seen = []
        for stop in run:
            seen.append(stop.position)
            if seen == [15, 19, 20]:
                stop.value.zero_()
                again = run.rewind(17, "resid_post.0")
                assert not stop.current and again.positions == (16, 17, 18, 19)
        assert seen == [15, 19, 20, 19, 20, 21, 22]
        assert_same(run.result(), plain)


def test_rewind_within_the_step_in_the_air(dj: djinn.Dj) -> None:
    for position in (3, 18, 21):
        with dj.session() as s:
            run = usual(s, djinn.break_at("mlp_out.1", positions=position))
            stop = next(run)
            stop.value.zero_()
            assert run.rewind(position).site == "mlp_out.1"  # where it stands, unless another is named
            first = run.rewind(position, "attn_q.0")
            assert (first.site, first.position) == ("attn_q.0", stop.position)
            assert_same(run.result(), generated(dj, prompt(PROMPT)))


def test_rewind_of_a_forward_call_and_what_it_captured(one: djinn.Dj) -> None:
    with one.session() as s:
        run = s.forward(prompt(PROMPT), capture=["resid_post.1"])
        plain = run.result()
        for position in (3, 18):
            run.rewind(position, "resid_post.0")
            again = run.result()
            assert_same(again, plain)
            assert_same_bits(again.cache["resid_post.1"], plain.cache["resid_post.1"])
        more = s.generate(max_new_tokens=NEW, output_logits=True).result()
        assert_same_bits(bits_of(more)[0], bits_of(plain)[-1])
        assert_same_bits(bits_of(more)[1:], bits_of(generated(one, prompt(PROMPT)))[1:])


# -- offload -------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", PLACES)
def test_offloaded_in_the_middle_of_a_step_and_back_in_another_row(dj: djinn.Dj, position: int) -> None:
    plain = generated(dj, prompt(PROMPT))
    with dj.session() as s:
        run = usual(s, djinn.break_at("resid_post.0", positions=position))
        stop = next(run)
        row, free = s.row, dj.engine.arena.free_rows
        s.offload()
        s.offload()
        assert not s.resident and dj.engine.arena.free_rows == free + 1 and "offloaded" in repr(s)
        with dj.session(seed=1) as other:  # takes the row and fills it
            assert other.row == row
            logits_of(other, prompt(40, 9))
            stop.value.add_(1).sub_(0)
            some(run.rewind(position, "resid_post.0"))
            assert s.resident and s.row != row
            assert_same(run.result(), plain)


def test_an_edit_made_while_offloaded_takes_effect(dj: djinn.Dj) -> None:
    results = []
    for away in (False, True):
        with dj.session() as s:
            run = usual(s, djinn.break_at("resid_post.0", positions=(18, 21)))
            for stop in run:
                if away:
                    s.offload()
                stop.value.mul_(-1)
                s.steer("resid_post.1", add=V * stop.position)
            results.append(run.result())
    assert_same(results[0], results[1])


def test_more_sessions_than_rows_take_turns(one: djinn.Dj) -> None:
    sessions: list[Session] = []
    for seed in range(ROWS + 2):
        sessions.append(one.session())
        sessions[-1].generate(prompt(10, seed), max_new_tokens=1).result()
        sessions[-1].offload()
    for seed, session in enumerate(sessions):
        result = session.generate(max_new_tokens=NEW, output_logits=True).result()
        assert_same_bits(result.logits, bits_of(generated(one, prompt(10, seed), NEW + 1))[1:])
        session.offload()
    for session in sessions:
        session.close()


def test_what_needs_a_row_and_gets_none_changes_nothing(one: djinn.Dj) -> None:
    with one.session() as s:
        run = usual(s, djinn.break_at("resid_post.0", positions=20))
        stop = next(run)
        s.offload()
        others = [one.session() for _ in range(ROWS)]
        for other in others:
            other.pin()
        acts: list[Callable[[], object]] = [
            lambda: next(run),
            lambda: run.rewind(3, "resid_post.0"),
            lambda: stop.fork(),
            lambda: s.pin(),
            lambda: s.steer("resid_post.0", add=V, kv="recompute"),
        ]
        for act in acts:
            with pytest.raises(djinn.CapacityError, match=rf"0 of {ROWS} free. Close or offload\(\) a session"):
                act()
            assert run.stop is stop and stop.current and not s.steering and not s.resident
        for other in others:
            other.close()
        assert_same(run.result(), generated(one, prompt(PROMPT)))


def test_pinned_sessions_stay(one: djinn.Dj) -> None:
    with one.session() as s:
        s.pin()
        with pytest.raises(djinn.InvalidValue, match=r"pinned to the device; call s.pin\(False\) first"):
            s.offload()
        s.pin(False)
        s.offload()
        s.pin()
        assert s.resident


# -- one paused while another runs ---------------------------------------------------------------


@pytest.mark.parametrize("site", ["attn_q.0", "resid_post.0", "resid_post.1"])
def test_a_paused_b_served_whole_a_resumed(dj: djinn.Dj, site: str) -> None:
    plain_a, plain_b = generated(dj, prompt(PROMPT)), generated(dj, prompt(7, 1))
    for position in PLACES:
        with dj.session() as a:
            run = usual(a, djinn.break_at(site, positions=position))
            next(run)
            assert_same(generated(dj, prompt(7, 1)), plain_b)
            assert_same(run.result(), plain_a)
