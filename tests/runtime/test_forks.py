"""Forks, several calls on one session, abandoned runs, and draws that belong to a seed and a position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime.results import Result
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
    compiled,
    direction,
    generated,
    logits_of,
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
        with pytest.raises(djinn.SessionClosed, match="this session was closed"):
            next(orphan.run)


# -- several calls -------------------------------------------------------------------------------


def test_two_generates_are_one_long_one(dj: djinn.Dj) -> None:
    plain = generated(dj, prompt(PROMPT), 7)
    for first in (1, 3, 6):
        with dj.session() as s:
            parts = [s.generate(prompt(PROMPT), max_new_tokens=first, output_logits=True).result()]
            parts.append(s.generate(max_new_tokens=7 - first, output_logits=True).result())
            assert torch.cat([part.tokens for part in parts]).tolist() == plain.tokens.tolist() == s.tokens.tolist()
            assert_same_bits(torch.cat([bits_of(part) for part in parts]), plain.logits)


def test_generate_goes_on_from_forward(dj: djinn.Dj) -> None:
    plain = generated(dj, prompt(PROMPT), 5)
    for cut in (CHUNK, PROMPT):
        with dj.session() as s:
            logits = logits_of(s, prompt(PROMPT)[:cut])
            rest = prompt(PROMPT)[cut:]
            told: list[int] = []
            options: dict[str, Any] = {"max_new_tokens": 5, "output_logits": True, "on_token": told.append}
            run = s.generate(rest, **options) if len(rest) else s.generate(**options)
            result = run.result()
            # A forward call has all logits, the program of a generate call the last only: its head has other bits.
            first = 1 if cut == PROMPT else 0
            assert_same_bits(bits_of(result)[first:], bits_of(plain)[first:])
            assert not first or same_bits(bits_of(result)[0], logits[-1])
            assert told == plain.tokens[PROMPT:].tolist() and result.tokens.tolist() == [*rest.tolist(), *told]


def test_a_conversation_is_one_long_prompt(one: djinn.Dj) -> None:
    with one.session() as s:
        s.generate(prompt(CHUNK), max_new_tokens=3).result()
        spoken = s.tokens
        logits = logits_of(s, prompt(5, 1))
        assert s.tokens.tolist() == [*spoken.tolist(), *prompt(5, 1).tolist()]
    expected = one(torch.cat([spoken, prompt(5, 1)])).logits[0, -5:]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_one_unfinished_run_at_a_time(one: djinn.Dj) -> None:
    with one.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=["resid_post.0"])
        for _ in range(2):
            acts: list[Callable[[], Run]] = [lambda: s.generate(max_new_tokens=1), lambda: s.forward(prompt(2))]
            for act in acts:
                with pytest.raises(djinn.SessionBusy, match=r"run.result\(\).*iterate it.*run.close\(\)"):
                    act()
            next(run)
        assert_same(run.result(), generated(one, prompt(PROMPT)))


# -- abandoned -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [0, 1, 2, 3, 4])
def test_an_abandoned_run_leaves_what_was_committed(dj: djinn.Dj, stops: int) -> None:
    """The step it stood in is as if it had not been: neither its edit nor its tokens' KV is left."""
    with dj.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, breakpoints=["resid_post.0"])
        for _ in range(stops):
            stop = next(run)
        if stops:
            stop.value.zero_()
        run.close()
        run.close()
        assert (run.finished, run.finish_reason, run.stop) == (True, "closed", None)
        for act in (lambda: next(run), run.result, lambda: run.rewind(0)):
            with pytest.raises(djinn.SessionClosed, match=r"abandoned with close\(\); start another on its session"):
                act()
        plain = generated(dj, prompt(PROMPT), NEW + 2)
        left = (0, 0, CHUNK, PROMPT + 1, PROMPT + 2)[stops]
        assert s.tokens.tolist() == plain.tokens[:left].tolist()
        if not left:
            with pytest.raises(djinn.InvalidValue, match="the prompt is empty"):
                s.generate(max_new_tokens=1)
            assert_same(
                s.generate(prompt(3), max_new_tokens=NEW, output_logits=True).result(), generated(dj, prompt(3))
            )
            return
        more = s.generate(max_new_tokens=NEW, output_logits=True).result()
        if left == CHUNK:
            assert_same_bits(more.logits, generated(dj, prompt(PROMPT)[:CHUNK]).logits)
        else:
            assert_same_bits(more.logits, bits_of(plain)[left - PROMPT :][:NEW])


def test_an_abandoned_prompt_is_no_reason_to_use_older_logits(one: djinn.Dj) -> None:
    with one.session() as s:
        logits_of(s, prompt(CHUNK))
        run = s.generate(prompt(PROMPT, 1), max_new_tokens=NEW, breakpoints=["resid_post.0"])
        next(run)
        next(run)
        run.close()
        whole = torch.cat([prompt(CHUNK), prompt(PROMPT, 1)[:CHUNK]])
        assert s.tokens.tolist() == whole.tolist()
        more = s.generate(max_new_tokens=NEW, output_logits=True).result()
    assert_same_bits(more.logits, generated(one, whole).logits)


def test_a_rewound_and_abandoned_run(one: djinn.Dj) -> None:
    with one.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW)
        run.result()
        run.rewind(17, "resid_post.0").value.zero_()
        run.close()
        more = s.generate(max_new_tokens=NEW, output_logits=True).result()
    assert_same_bits(more.logits, generated(one, prompt(PROMPT)[:CHUNK]).logits)


def test_closing_a_session_abandons_its_run(one: djinn.Dj) -> None:
    s: Session = one.session()
    run = s.generate(prompt(4), max_new_tokens=NEW, breakpoints=["resid_post.0"])
    stop = next(run)
    kept = stop.value.clone()
    s.close()
    s.close()
    assert s.closed and not s.resident and run.finish_reason == "closed" and "closed" in repr(s)
    assert_same_bits(stop.value, kept)
    acts = [lambda: next(run), run.result, lambda: s.forward(prompt(2)), s.offload, s.pin, s.checkpoint]
    acts += [lambda: s.steer("resid_post.0", scale=2.0), lambda: run.rewind(0)]
    for act in acts:
        with pytest.raises(djinn.SessionClosed):
            act()
    with pytest.raises(djinn.StaleStop):
        stop.value = kept


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
