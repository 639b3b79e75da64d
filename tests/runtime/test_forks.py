"""Forks of a stopped session, and draws that belong to a seed and a position, whatever the way there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime.planner import flight_of
from djinn_fx.runtime.results import Result
from tests.bits import assert_same_bits, same_bits
from tests.runtime.tiny import (
    NEW,
    PROMPT,
    ROWS,
    another_dj,
    assert_same,
    bits_of,
    compiled,
    direction,
    generated,
    prompt,
)

V = direction(1)
PLACES = (3, PROMPT - 1, PROMPT + 1)
DRAW: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "output_logits": True}


# -- forks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", PLACES)
@pytest.mark.parametrize("site", ["attn_q.0", "resid_post.0", "resid_post.1"])
def test_forks_go_the_parents_way(dj: djinn.Dj, site: str, position: int) -> None:
    plain = generated(dj, prompt(PROMPT))
    with dj.session() as s:
        at = djinn.break_at(site, positions=position)
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=[at])
        stop = next(run)
        forks = stop.fork(2)
        for fork in forks:
            assert (fork.site, fork.positions, fork.fired) == (stop.site, stop.positions, stop.fired)
            assert fork.session is not s and fork.run.session is fork.session and fork.run.stop is fork
            assert_same_bits(fork.value, stop.value)
        forks[0].value.zero_()  # theirs alone
        assert bool(stop.value.any()) and bool(forks[1].value.any())
        changed = not same_bits(bits_of(forks[0].run.result()), bits_of(plain))
        assert changed or (position, site) == (3, "resid_post.1")  # nothing attends to the last block's output
        assert_same(run.result(), plain)
        assert_same(forks[1].run.result(), plain)


def test_forks_inherit_the_edited_value_steering_and_history(dj: djinn.Dj) -> None:
    with dj.session() as s:
        handle = s.steer("resid_post.1", add=V)
        points = [djinn.break_at("resid_post.0", positions=p) for p in (3, 21)]
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=points)
        for stop in run:
            stop.value.add_(1)
            if stop.position == 21:
                (fork,) = stop.fork()
        handle.remove()
        parents = run.result()
        assert_same(fork.run.result(), parents)
        fork.run.rewind(3, "mlp_out.1")  # the parent's past is the fork's, its edit at position 3 included
        run.rewind(3, "mlp_out.1")
        assert_same(fork.run.result(), run.result())


def test_forks_have_no_breakpoints_and_no_callbacks(one: djinn.Dj) -> None:
    told: list[int] = []
    with one.session() as s:
        run = s.generate(prompt(4), max_new_tokens=NEW, breakpoints=["resid_post.*"], on_token=told.append)
        (fork,) = next(run).fork()
        assert list(fork.run) == [] and fork.run.finish_reason == "length"
        assert told == []
        assert told == run.result().tokens[4:].tolist()


def test_forks_draw_as_the_parent_unless_seeded(one: djinn.Dj) -> None:
    with one.session(seed=7) as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=8, breakpoints=["resid_post.0"], **DRAW)
        stop = next(run)
        same, other, third = stop.fork(3, seeds=[7, 8, 9])
        parents = run.result()
        assert_same(same.run.result(), parents)
        ways = {tuple(fork.run.result().tokens.tolist()) for fork in (same, other, third)}
        assert len(ways) == 3
        assert [fork.session.seed for fork in (same, other, third)] == [7, 8, 9]


def test_forks_are_all_made_or_none(one: djinn.Dj) -> None:
    with one.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=["resid_post.0"])
        stop = next(run)
        with pytest.raises(djinn.CapacityError, match=rf"{ROWS} KV row\(s\) needed, {ROWS - 1} of {ROWS} free"):
            stop.fork(ROWS)
        assert one.engine.arena.free_rows == ROWS - 1 and stop.current and s.children == []
        for n, seeds in ((0, None), (2, [1]), (1, [])):
            with pytest.raises(djinn.InvalidValue, match="n must be 1 or more, with n seeds"):
                stop.fork(n, seeds)
        assert len(stop.fork(ROWS - 1)) == ROWS - 1 and one.engine.arena.free_rows == 0
        assert_same(run.result(), generated_alone(one))


def generated_alone(dj: djinn.Dj) -> Result:
    """The usual run, while the rows of ``dj`` are taken: on another compiled model of the same weights."""
    return generated(compiled("llama", "every"), prompt(PROMPT))


def test_forks_close_with_the_parent(one: djinn.Dj) -> None:
    with one.session() as s:
        stop = next(s.generate(prompt(4), max_new_tokens=NEW, breakpoints=["resid_post.0"]))
        child, sibling = stop.fork(2)
        (grandchild,) = child.fork()
        sibling.session.close()
        assert one.engine.arena.free_rows == ROWS - 3 and not s.closed
    for orphan in (child, grandchild):
        assert orphan.session.closed
        with pytest.raises(djinn.SessionClosed, match=r"is a fork, and the session .* was closed.*dj.restore"):
            next(orphan.run)


# -- draws ---------------------------------------------------------------------------------------


def test_a_draw_belongs_to_a_seed_and_a_position(dj: djinn.Dj) -> None:
    with dj.session(seed=5) as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=8, **DRAW)
        plain = run.result()
        for position in (24, 21, 3):
            run.rewind(position, "resid_post.0")
            assert_same(run.result(), plain)
        run.rewind(23, "resid_post.1").value.add_(V.to(dj.engine.dtype) * 9)
        assert run.result().tokens[:24].tolist() == plain.tokens[:24].tolist() != run.tokens.tolist()
    with dj.session(seed=5) as s:
        parts = [
            s.generate(prompt(PROMPT), max_new_tokens=5, **DRAW).result(),
            s.generate(max_new_tokens=3, **DRAW).result(),
        ]
        assert torch.cat([part.tokens for part in parts]).tolist() == plain.tokens.tolist()
    others = set()
    for seed in (-1, 0, 6, 2**63 - 1):
        with dj.session(seed=seed) as s:
            others.add(tuple(s.generate(prompt(PROMPT), max_new_tokens=8, **DRAW).result().tokens.tolist()))
    assert len(others | {tuple(plain.tokens.tolist())}) == 5


@pytest.mark.parametrize("name", ["llama-bf16"])
def test_a_batch_invariant_session_does_not_notice_its_company(name: str) -> None:
    dj = compiled(name, "invariant")
    prompts = [prompt(length, seed) for seed, length in enumerate((5, 20, 9, 3, 17, 1, 12))]
    edits = [[djinn.Edit("resid_post.0", add=V, positions="generated")] if i % 2 else [] for i in range(len(prompts))]
    together = dj.generate(prompts, max_new_tokens=6, edits=edits, seeds=range(7), **DRAW)
    for seed, ids in enumerate(prompts):
        with dj.session(seed=seed) as s:
            for edit in edits[seed]:
                s.steer(edit)
            assert_same(s.generate(ids, max_new_tokens=6, **DRAW).result(), together[seed])


def test_a_token_drawn_ahead_is_not_the_forks() -> None:
    """On a GPU a step's token is drawn before its stop; a fork with another seed draws its own."""
    dj = another_dj("gpt2", backend="static")
    with dj.session(seed=1) as s:
        run = s.generate(
            prompt(6),
            max_new_tokens=3,
            do_sample=True,
            breakpoints=[djinn.break_at("resid_post.0", positions="generated")],
        )
        stop = next(run)
        flight = flight_of(run)
        flight.drawn = 7
        (fork,) = stop.fork(seeds=[2])
        assert flight_of(fork.run).drawn is None
        assert flight.drawn == 7
    dj.close()


def test_nobody_who_only_looks_makes_a_stop_seem_touched(dj: djinn.Dj, tmp_path: Path) -> None:
    with dj.session() as session:
        stop = next(session.generate(prompt(9), max_new_tokens=3, breakpoints=["resid_post.0"]))
        with dj.autosave(tmp_path, every=3600) as saver:
            saver.save_now()
        stop.describe()
        (copy,) = stop.fork(1)
        assert stop.untouched and copy.untouched
        assert_same_bits(copy.value, stop.value)
        assert not (stop.untouched or stop.written or copy.written)
