"""Steps in the air: what may happen to one between its beginning and its commit."""

from __future__ import annotations

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime.run import Run
from djinn_fx.specs import Edit
from tests.runtime.checkpoint_cases import assert_same, close_all, edit, finish, shared, small_dj, start
from tests.runtime.tiny import direction, make_model, some


def test_a_chunk_left_without_a_stop_follows_its_session_to_another_row() -> None:
    dj, calls = shared("gpt2"), 0

    def fails_once(h: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:  # the trial, the first chunk, the second
            raise RuntimeError("not today")
        return h.sum() > 1e9

    with dj.session(seed=6) as undisturbed:
        expected = finish(start(undisturbed, []))
    session = dj.session(seed=6)
    run = start(session, [djinn.break_at("resid_post.0", fails_once)])
    with pytest.raises(djinn.InvalidPredicate):
        next(run)
    before = session.row
    session.offload()
    other = dj.session()
    theirs = next(start(other, ["resid_post.1"]))
    assert other.row == before
    assert_same(finish(run), expected)
    assert session.row != before
    assert theirs.run.result().tokens.numel() == 23
    close_all(dj)


def test_sites_compiled_in_while_a_chunk_is_stopped() -> None:
    dj = small_dj(make_model("gpt2"), sites=("resid_post",))
    run = start(dj.session(seed=6), ["resid_post.0"])
    edit(stop := next(run))
    twin = stop.fork(1)[0].run
    dj.add_sites("mlp_out.1")
    assert some(some(run.stop).step()).site == "mlp_out.1"
    run.session.steer("mlp_out.1", scale=-1.0)
    twin.session.steer("mlp_out.1", scale=-1.0)
    steered = finish(twin)
    assert_same(finish(twin_of(twin)), steered)
    late = run.result().cache["resid_post.1"]  # it stood behind the site when it was steered
    assert not torch.equal(late[:8], steered.result.cache["resid_post.1"][:8])
    dj.close()


def twin_of(run: Run) -> Run:
    """The run once more from its first chunk, replayed from the journal."""
    stop = run.rewind(0, "resid_post.0")
    edit(stop)
    run.session.steer("mlp_out.1", scale=-1.0)
    return run


def test_recompute_of_a_run_that_stands_at_a_stop_keeps_what_fired() -> None:
    dj = shared("gpt2")
    session = dj.session()
    stop = next(start(session, [djinn.break_at("resid_post.1", positions=(2, 5))]))
    assert stop.fired == (2, 5)
    session.steer("resid_post.0", add=direction(1), kv="recompute")
    assert some(stop.run.stop).fired == (2, 5)
    close_all(dj)


@pytest.mark.parametrize("words", [("generated",), ["generated"]], ids=["tuple", "list"])
def test_words_for_positions_may_stand_in_any_sequence(words: tuple[str, ...]) -> None:
    dj = shared("gpt2")
    session = dj.session()
    session.steer(Edit("resid_post.0", scale=0.0, positions=words))
    values = [stop.value.abs().sum() for stop in start(session, ["resid_post.0"])]
    assert all(value > 0 for value in values[:3]) and all(value == 0 for value in values[3:]) and len(values) == 6
    close_all(dj)


def test_a_scale_belongs_to_the_session_once_it_steers() -> None:
    dj, scale = shared("gpt2"), torch.linspace(0.5, 1.5, 32)
    session = dj.session()
    session.steer("resid_post.0", scale=scale)
    run = start(session, ["resid_post.0"])
    first = next(run).value.clone()
    scale.zero_()
    assert torch.equal(run.rewind(0, "resid_post.0").value, first)
    close_all(dj)
