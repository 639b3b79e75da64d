"""Where and from when steering acts, what neutral edits leave alone, and the handles on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime.results import Result
from djinn_fx.runtime.session import Session
from djinn_fx.specs import Positions
from tests.bits import assert_same_bits, bits, same_bits
from tests.runtime.tiny import WIDTH, assert_same, direction, generated, logits_of, prompt

V = direction(1)
PROMPT, NEW = 20, 4  # forwards the positions 0 to 22


def steered(dj: djinn.Dj, *edits: djinn.Edit, ids: torch.Tensor | None = None) -> Result:
    with dj.session() as s:
        for edit in edits:
            s.steer(edit)
        run = s.generate(prompt(PROMPT) if ids is None else ids, max_new_tokens=NEW, output_logits=True)
        return run.result()


def edited(dj: djinn.Dj, site: str, positions: Iterable[int], change: Callable[[Any], Any]) -> Result:
    """The same by hand, at the stops."""
    with dj.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=[site])
        for stop in run:
            for row, position in enumerate(stop.positions):
                if position in positions:
                    stop.value[row] = change(stop.value[row])
        return run.result()


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


def bits_of(result: Result) -> torch.Tensor:
    assert result.logits is not None
    return result.logits


def test_prompt_and_last_prompt_speak_of_each_call(one: djinn.Dj) -> None:
    def run(act: Callable[[Session, int], None]) -> torch.Tensor:
        with one.session() as s:
            act(s, 0)
            first = s.generate(prompt(4), max_new_tokens=3).result()
            act(s, 1)
            return torch.cat([first.tokens.float()[:, None].expand(-1, 64), logits_of(s, prompt(3, 5))])

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


# -- neutral -------------------------------------------------------------------------------------

FEATURE = djinn.Feature(V, V, set=1.0)
NEUTRAL: dict[str, dict[str, Any]] = {
    "scale": {"scale": 1.0},
    "scale by ones": {"scale": torch.ones(WIDTH)},
    "add zeros": {"add": torch.zeros(WIDTH)},
    "strength 0": {"scale": 0.3, "add": V, "ablate": V, "feature": FEATURE, "strength": 0.0},
    "elsewhere": {"scale": 0.3, "add": V, "positions": 0},
    "ablation elsewhere": {"ablate": V, "feature": FEATURE, "positions": 0},
}


def plant(value: torch.Tensor) -> None:
    """Numbers that careless arithmetic changes, in every row but the first."""
    for row in value[1:] if len(value) > 1 else value:
        row[:4] = torch.tensor([-0.0, torch.inf, torch.nan, -torch.inf])
        row[6:9] = -0.0


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_edits_change_no_bit(dj: djinn.Dj, name: str) -> None:
    def run(**edit: Any) -> tuple[Result, list[torch.Tensor]]:
        with dj.session() as s:
            if edit:
                s.steer("resid_post.1", **edit)
            run = s.generate(
                prompt(6), max_new_tokens=3, output_logits=True, breakpoints=["resid_post.0", "resid_post.1"]
            )
            seen = []
            for stop in run:
                if stop.site == "resid_post.0":
                    plant(stop.value)
                seen.append(stop.value.clone())
            return run.result(), seen

    plain, values = run()
    assert any(bool((bits(value) == bits(torch.tensor(-0.0, dtype=value.dtype))).any()) for value in values)
    kept, others = run(**NEUTRAL[name])
    assert plain.tokens.tolist() == kept.tokens.tolist()
    for value, other in zip(values, others, strict=True):
        # At position 0 the edits that speak of it act; the stream is planted behind it.
        start = 1 if "elsewhere" in name and len(value) > 1 else 0
        assert_same_bits(value[start:], other[start:])
    assert_same_bits(plain.logits, kept.logits)


def test_a_neighbour_in_the_batch_does_not_feel_an_edit(dj: djinn.Dj) -> None:
    def neighbour(*edits: djinn.Edit) -> Result:
        with dj.session() as a, dj.session() as b:
            for edit in edits:
                a.steer(edit)
            runs = [s.generate(prompt(6, i), max_new_tokens=4, output_logits=True) for i, s in enumerate((a, b))]
            return dj.results(runs)[1]

    plain, wild = neighbour(), torch.full((WIDTH,), torch.nan)
    assert_same(neighbour(djinn.Edit("resid_post.0", scale=wild, positions="generated")), plain)
    assert_same(neighbour(djinn.Edit("resid_post.0", ablate=V), djinn.Edit("resid_post.1", add=V * 1e30)), plain)


@pytest.mark.parametrize("dj", ["gpt2-bf16"], indirect=True)
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
        assert not first.active and second.active and other.active
        for act in (lambda: first.strength, lambda: setattr(first, "strength", 1.0), lambda: first.edit):
            with pytest.raises(djinn.InvalidValue, match=r"'resid_post.0': it was removed, replaced .* steer\(\) again"):
                act()
        first.remove()  # does nothing to the one that replaced it
        assert second.active and "strength=1.0" in repr(second) and "not in force" in repr(first)
        other.remove()
        other.remove()
        assert_same(steered(one, djinn.Edit("resid_post.0", scale=0.9)), s.generate(
            prompt(PROMPT), max_new_tokens=NEW, output_logits=True
        ).result())


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
        assert_same(s.forward(prompt(2)).result(), s.run and s.forward(prompt(2)).result()) if False else None


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
    def run(before: bool) -> Result:
        with dj.session() as s:
            if before:
                s.steer("resid_post.0", add=V * 0.1)
            points = [djinn.break_at("resid_post.1", positions=p) for p in (3, position)]
            run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=points)
            for stop in run:
                stop.value[0].fill_(0.5)
                if stop.position == position and not before:
                    s.steer("resid_post.0", add=V * 0.1, kv="recompute")
                    assert run.stop is not None and run.stop is not stop
                    assert (run.stop.site, run.stop.position) == (stop.site, stop.position)
                    assert bool((run.stop.value[0] == 0.5).all())
            return run.result()

    late, early = run(before=False), run(before=True)
    assert late.tokens[: position + 1].tolist() == early.tokens[: position + 1].tolist()
    assert_same(late, early)
