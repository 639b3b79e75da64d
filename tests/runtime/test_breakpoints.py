"""Breakpoints: where, when and how often a run stops, and in which order."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import djinn_fx as djinn
from djinn_fx.specs import Breakpoint
from tests.bits import same_bits
from tests.runtime.tiny import CHUNK, another_dj, assert_same, compiled, direction, generated, prompt, values

LONG = 2 * CHUNK + 5


def places(dj: djinn.Dj, *points: str | Breakpoint, length: int = LONG, new: int = 4) -> list[tuple[int, str]]:
    """Position and site of each stop of a run."""
    with dj.session() as s:
        return [
            (stop.position, stop.site) for stop in s.generate(prompt(length), max_new_tokens=new, breakpoints=points)
        ]


def test_a_chunked_prompt_stops_once_per_chunk(one: djinn.Dj) -> None:
    found = places(one, "resid_post.0")
    assert [position for position, _ in found] == [15, 31, 36, 37, 38, 39]
    with one.session() as s:
        s.forward(prompt(3)).result()  # the grid starts at the call's first position
        stops = s.forward(prompt(CHUNK + 1), breakpoints=["resid_post.0"])
        assert [stop.positions for stop in stops] == [tuple(range(3, 19)), (19,)]


def test_a_chunk_may_be_one_token() -> None:
    dj = another_dj("llama", prefill_chunk=1)
    with dj.session() as s:
        run = s.generate(prompt(5), max_new_tokens=3, output_logits=True, breakpoints=["resid_post.*"])
        stops = [(stop.position, stop.phase) for stop in run]
        assert stops == [(p, "prompt" if p < 5 else "generated") for p in range(7) for _ in range(2)]
        plain = run.result()
        assert plain.tokens.tolist() == generated(compiled("llama"), prompt(5), 3).tokens.tolist()
        run.rewind(2, "resid_post.0")
        assert_same(run.result(), plain)


def test_a_prompt_of_one_token_is_a_prompt(one: djinn.Dj) -> None:
    with one.session() as s:
        phases = [stop.phase for stop in s.generate(prompt(1), max_new_tokens=3, breakpoints=["resid_post.0"])]
    assert phases == ["prompt", "generated", "generated"]


def test_a_glob_of_many_stars_is_refused_at_once(both: djinn.Dj) -> None:
    assert len(both.sites.select("*" * 5000 + "attn_out.*")) >= 2
    with pytest.raises(djinn.UnknownSite, match="up to 8 stars"):
        both.sites.select("**?" * 40 + "x")


def test_globs_roles_aliases_and_paths(both: djinn.Dj) -> None:
    names = [site for _, site in places(both, "resid_post.*", "blocks.0.attn.hook_z", length=4, new=1)]
    assert names == ["attn_z.0", "resid_post.0", "resid_post.1"]
    assert [site for _, site in places(both, "resid_post", length=4, new=1)] == ["resid_post.0", "resid_post.1"]
    module = both.sites.get("resid_post.0").module
    assert [site for _, site in places(both, module, "resid_post.0", length=4, new=1)] == ["resid_post.0"]


@pytest.mark.parametrize("times", [1, 2, 4])
def test_times_counts_delivered_stops(one: djinn.Dj, times: int) -> None:
    point = djinn.break_at("resid_post.*", times=times)
    assert places(one, point, length=20) == places(one, "resid_post.*", length=20)[:times]
    # Two breakpoints at one site make one stop and both are counted.
    both = [djinn.break_at("resid_post.0", times=times), djinn.break_at("resid_post.0", times=times + 1)]
    assert len(places(one, *both, length=20)) == times + 1
    with one.session() as s:  # what is passed over is not counted
        run = s.generate(prompt(4), max_new_tokens=9, breakpoints=[djinn.break_at("resid_post.0", times=times)])
        next(run).step(tokens=3)
        assert len(list(run)) == times - 1


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", [15, 19, 20, 21, 22]),
        ("prompt", [15, 19]),
        ("generated", [20, 21, 22]),
        ("last_prompt", [19]),
        (("last_prompt", "generated"), [19, 20, 21, 22]),
        (21, [21]),
        (3, [15]),
        (slice(16, 21), [19, 20]),
        (slice(22, None), [22]),
        ([2, 21], [15, 21]),
        ((2, 22), [15, 22]),
        (range(30, 40), []),
    ],
    ids=str,
)
def test_positions(one: djinn.Dj, positions: djinn.specs.Positions, expected: list[int]) -> None:
    found = places(one, djinn.break_at("resid_post.1", positions=positions), length=20)
    assert [position for position, _ in found] == expected


def test_tokens_of_a_later_call_are_a_prompt(one: djinn.Dj) -> None:
    with one.session() as s:
        s.generate(prompt(4), max_new_tokens=3).result()
        run = s.forward(prompt(2), breakpoints=[djinn.break_at("resid_post.0", positions="prompt")])
        # The last token of the first call was not forwarded yet: it was generated all the same.
        assert [(stop.positions, stop.fired, stop.phase) for stop in run] == [((6, 7, 8), (7, 8), "prompt")]


# -- predicates ----------------------------------------------------------------------------------

PROBE = direction(3)
PREDICATES: list[tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], bool]]] = [
    ("resid_post.0", djinn.when.norm_above(4.0), lambda h: math.sqrt(float((h.double() ** 2).sum())) > 4.0),
    ("resid_post.1", djinn.when.probe(PROBE, 0.5), lambda h: float(h.double() @ PROBE.double()) + 0.5 > 0),
    (
        "resid_post.1",
        djinn.when.cosine_above(PROBE, 0.1),
        lambda h: float(torch.cosine_similarity(h.double(), PROBE.double(), dim=0)) > 0.1,
    ),
    (
        "logits",
        djinn.when.entropy_below(3.7),
        lambda h: float(torch.distributions.Categorical(logits=h.double()).entropy()) < 3.7,
    ),
    ("attn_q.0", lambda h: h.flatten()[0] > 0, lambda h: float(h.flatten()[0]) > 0),
    (
        "resid_post.0",
        lambda h: torch.where(h[0] > 0, h[1] > 0, h[2] > 0),
        lambda h: bool(h[1] > 0 if h[0] > 0 else h[2] > 0),
    ),
]


@pytest.mark.parametrize(("site", "when", "direct"), PREDICATES, ids=lambda item: str(item)[:24])
def test_predicates_fire_where_they_hold(
    both: djinn.Dj, site: str, when: Callable[[Tensor], Tensor], direct: Callable[[Tensor], bool]
) -> None:
    with both.session() as s:
        run = s.generate(prompt(20), max_new_tokens=8, breakpoints=[site])
        shown = [(stop.positions, stop.value.clone()) for stop in run]
    with both.session() as s:
        run = s.generate(prompt(20), max_new_tokens=8, breakpoints=[djinn.break_at(site, when)])
        fired = [stop.fired for stop in run]
    held = [tuple(p for p, h in zip(where, value, strict=True) if direct(h)) for where, value in shown]
    assert fired == [some for some in held if some]
    assert 0 < sum(map(len, held)) < sum(len(where) for where, _ in shown), "a predicate that tells nothing apart"


def test_predicates_and_positions_combine(one: djinn.Dj) -> None:
    with one.session() as s:
        point = djinn.break_at("resid_post.0", lambda h: h[0] == h[0], positions=[3, 5, 21])
        assert [stop.fired for stop in s.generate(prompt(20), max_new_tokens=4, breakpoints=[point])] == [(3, 5), (21,)]


def test_token_stops_on_the_input_token(one: djinn.Dj) -> None:
    ids = torch.tensor([7, 9, 7, 8, 7])
    tokens = generated(one, ids, 6).tokens
    wanted = int(tokens[6])
    with one.session() as s:
        points = [
            djinn.break_at("resid_post.0", djinn.when.token(7)),
            djinn.break_at("resid_post.1", djinn.when.token(wanted)),
        ]
        stops = [(stop.site, stop.fired) for stop in s.generate(ids, max_new_tokens=6, breakpoints=points)]
    assert stops[0] == ("resid_post.0", tuple(i for i in range(5) if ids[i] == 7))
    assert ("resid_post.1", (6,)) in stops
    assert all(int(tokens[p]) in (7, wanted) for _, fired in stops for p in fired)


def test_nonfinite_finds_what_was_planted(one: djinn.Dj) -> None:
    with one.session() as s:
        points = [djinn.break_at("resid_post.0"), djinn.break_at("resid_post.1", djinn.when.nonfinite())]
        run = s.forward(prompt(9), breakpoints=points)
        next(run).value[4, 3] = torch.inf
        assert next(run).fired == (4, 5, 6, 7, 8)  # later positions attend to it


def test_a_predicate_cannot_change_what_it_sees(one: djinn.Dj) -> None:
    def greedy(h: Tensor) -> Tensor:
        return h.mul_(0).sum() == 0

    with one.session() as s:
        run = s.generate(
            prompt(20), max_new_tokens=4, output_logits=True, breakpoints=[djinn.break_at("resid_post.*", greedy)]
        )
        seen = values(run)
        assert all(bool(value.any()) for value in seen.values())
        assert_same(run.result(), generated(one, prompt(20), 4))


# -- several at once -----------------------------------------------------------------------------


ORDERS = (["resid_post.1", "attn_q.0", "resid_post.0"], ["resid_post.0", "resid_post.1", "attn_q.0"])


@pytest.mark.parametrize("names", ORDERS, ids=lambda names: names[0])
def test_a_step_delivers_its_stops_in_execution_order(one: djinn.Dj, names: list[str]) -> None:
    found = places(one, *names, length=20, new=3)
    steps = [15, 19, 20, 21]
    assert found == [(p, site) for p in steps for site in ("attn_q.0", "resid_post.0", "resid_post.1")]


@pytest.mark.parametrize("edited", [False, True])
def test_later_breakpoints_are_looked_at_again_after_an_edit(dj: djinn.Dj, edited: bool) -> None:
    loud = djinn.break_at("resid_post.1", lambda h: h[5] > 25)
    with dj.session() as s:
        run = s.generate(prompt(4), max_new_tokens=4, breakpoints=["resid_post.0", loud])
        seen = []
        for stop in run:
            seen.append((stop.position, stop.site))
            if edited and seen[-1] in ((3, "resid_post.0"), (5, "resid_post.0")):
                stop.value[-1, 5] += 50
    later = [(3, "resid_post.1"), (5, "resid_post.1")] if edited else []
    assert seen == sorted([(p, "resid_post.0") for p in (3, 4, 5, 6)] + later)


def test_an_edit_can_silence_a_later_breakpoint(dj: djinn.Dj) -> None:
    point = djinn.break_at("resid_post.1", lambda h: h.float().norm() < 30, positions="generated")
    with dj.session() as s:
        run = s.generate(prompt(4), max_new_tokens=3, breakpoints=["resid_post.0", point])
        seen = []
        for stop in run:
            seen.append((stop.position, stop.site))
            if stop.position == 4 and stop.site == "resid_post.0":
                stop.value.fill_(100.0)
        assert seen == [(3, "resid_post.0"), (4, "resid_post.0"), (5, "resid_post.0"), (5, "resid_post.1")]


def test_the_value_of_a_later_stop_shows_an_earlier_edit(dj: djinn.Dj) -> None:
    with dj.session() as s:
        run = s.generate(prompt(4), max_new_tokens=2, breakpoints=["resid_post.0", "resid_post.1"])
        plain = values(run)
    for phase, position in (("prompt", 3), ("generated", 4)):
        with dj.session() as s:
            for stop in s.generate(prompt(4), max_new_tokens=2, breakpoints=["resid_post.0", "resid_post.1"]):
                if (stop.phase, stop.site) == (phase, "resid_post.0"):
                    stop.value.add_(1)
                elif stop.phase == phase:
                    assert stop.position == position
                    assert not same_bits(stop.value, plain[position, "resid_post.1"])
