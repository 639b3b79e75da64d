"""Checkpoints: a restored session goes on as if nothing had happened, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.session import Session
from tests.bits import assert_same_bits
from tests.runtime.checkpoint_cases import (
    PROMPT,
    assert_same,
    assert_same_result,
    close_all,
    edit,
    finish,
    run_of,
    shared,
    small_dj,
    start,
    through_file,
)
from tests.runtime.tiny import direction, make_model, model_of, some


@pytest.fixture
def dj() -> Iterator[djinn.Dj]:
    yield shared("gpt2")
    close_all(shared("gpt2"))


# -- exactly where it stood --------------------------------------------------------------------


PLACES = [("gpt2", site) for site in ("embed", "attn_z.0", "resid_post.1", "logits")]
PLACES += [("llama-bf16", site) for site in ("attn_z.0", "resid_post.0")]


@pytest.mark.parametrize("edited", [False, True], ids=["untouched", "edited"])
@pytest.mark.parametrize("reached", [1, 4], ids=["mid-prompt", "mid-decode"])
@pytest.mark.parametrize(("name", "site"), PLACES)
def test_a_stopped_run_goes_on_from_a_file(name: str, tmp_path: Path, site: str, reached: int, edited: bool) -> None:
    dj = shared(name)
    run = start(dj.session(seed=5), [site])
    stop = next(run)
    edit(stop)  # by the time of the checkpoint an edit of a committed step, in the journal
    for _ in range(reached):
        stop = next(run)
    if edited:
        edit(stop)
    again = run_of(dj.restore(through_file(stop.checkpoint(), tmp_path)))
    there = some(again.stop)
    assert (there.site, there.positions, there.fired) == (stop.site, stop.positions, stop.fired)
    assert (there.phase, there.tokens.tolist()) == (stop.phase, stop.tokens.tolist())
    assert_same_bits(there.value, stop.value)
    assert_same(finish(run, edit), finish(again, edit))
    close_all(dj)


def test_edits_before_the_stop_in_the_same_step_are_kept(dj: djinn.Dj, tmp_path: Path) -> None:
    run = start(dj.session(seed=1), dj.compiled_sites)
    stop = next(run)
    while (stop.site, stop.phase) != ("attn_out.1", "generated"):
        edit(stop)
        stop = next(run)
    again = run_of(dj.restore(through_file(stop.checkpoint(), tmp_path)))
    assert_same(finish(run), finish(again))


def test_steering_goes_on_and_its_handles_come_back(dj: djinn.Dj, tmp_path: Path) -> None:
    session = dj.session(seed=2)
    session.steer("resid_post.0", scale=0.7, add=direction(1), positions="generated")
    session.steer("attn_out.1", ablate=direction(2, 2, 32), strength=0.5)
    run = start(session, ["resid_post.1"])
    next(run)
    feature = djinn.Feature(direction(4), direction(5), bias=0.1, act="relu", max=0.2)
    session.steer(djinn.Edit("resid_post.1", feature=feature, positions=slice(9, None)))
    session.steer("resid_post.0", scale=torch.linspace(0.5, 1.5, 32), positions=("prompt", "generated"))
    stop = next(run)
    restored = dj.restore(through_file(stop.checkpoint(), tmp_path))
    assert set(restored.handles) == set(session.handles) == {"resid_post.0", "attn_out.1", "resid_post.1"}
    for one in (session, restored):
        one.handles["attn_out.1"].strength = -2.0
        one.handles["resid_post.1"].remove()
    assert_same(finish(run), finish(run_of(restored)))
    keys = {armed.key for armed in session.steering.values()}
    assert keys.isdisjoint(armed.key for armed in restored.steering.values())


def test_rewind_after_a_restore_replays_what_the_original_replays(dj: djinn.Dj, tmp_path: Path) -> None:
    session = dj.session(seed=3)
    session.steer("resid_post.0", add=direction(6))
    run = start(session, ["resid_post.1"])
    for _ in range(4):
        edit(next(run))
    session.steer("resid_post.1", scale=1.3)
    stop = next(run)
    again = run_of(dj.restore(through_file(stop.checkpoint(), tmp_path)))
    for position, site in ((19, "resid_post.1"), (9, "attn_out.1")):
        assert_same_bits(run.rewind(position, site).value, again.rewind(position, site).value)
    assert_same(finish(run), finish(again))


# -- between runs, offloaded, without a stop ---------------------------------------------------


def test_a_session_between_runs(dj: djinn.Dj, tmp_path: Path) -> None:
    session = dj.session(seed=4)
    done = start(session, []).result()
    restored = dj.restore(through_file(session.checkpoint(), tmp_path))
    assert_same_result(run_of(restored).result(), done)
    more = [one.generate([5, 6], max_new_tokens=4, output_logits=True) for one in (session, restored)]
    assert_same(*(finish(run) for run in more))


def test_a_forward_call_leaves_logits_to_draw_from(dj: djinn.Dj, tmp_path: Path) -> None:
    session = dj.session(seed=4)
    first = session.forward(PROMPT).result()
    restored = dj.restore(through_file(session.checkpoint(), tmp_path))
    assert_same_result(run_of(restored).result(), first)
    more = [one.generate(max_new_tokens=4, do_sample=True, output_logits=True) for one in (session, restored)]
    assert_same(*(finish(run) for run in more))


def test_a_forward_call_that_stands_in_its_second_chunk(dj: djinn.Dj, tmp_path: Path) -> None:
    run = dj.session().forward(PROMPT, capture=["resid_post.0"], breakpoints=["embed", "logits"])
    for _ in range(4):
        edit(stop := next(run))
    assert stop.site == "logits" and stop.positions == tuple(range(8, 16))
    again = run_of(dj.restore(through_file(stop.checkpoint(), tmp_path)))
    assert_same(finish(run), finish(again))


def test_a_session_that_shares_its_steps_with_others(tmp_path: Path) -> None:
    dj = small_dj(model_of("llama-bf16"), batch_invariant=True)
    runs = [
        dj.session(seed=i).generate(PROMPT[i:], max_new_tokens=4, output_logits=True, capture=["resid_post.1"])
        for i in range(2)
    ]
    others = [dj.session(seed=i + 2) for i in range(2)]
    stops = [next(start(other, ["resid_post.0"])) for other in others]
    saved: list[tuple[Run, Path | str]] = []
    for stop in dj.as_stopped([*runs, *(stop.run for stop in stops)]):
        edit(stop)
        if stop.phase == "generated":
            saved.append((stop.run, stop.checkpoint().save(tmp_path / str(len(saved)))))
    assert len(saved) == 6
    expected = {id(run): run.result() for run, _ in saved}
    close_all(dj)
    for run, path in saved[:2]:
        with dj.restore(path) as restored:
            again = finish(run_of(restored), edit)
            assert_same_result(again.result, expected[id(run)])
    dj.close()


def test_a_fresh_session(dj: djinn.Dj, tmp_path: Path) -> None:
    session = dj.session(seed=9)
    session.steer("resid_post.0", scale=0.5)
    restored = dj.restore(through_file(session.checkpoint(), tmp_path))
    assert restored.run is None and restored.seed == 9
    assert_same(finish(start(session, [])), finish(start(restored, [])))


@pytest.mark.parametrize("reached", [2, 4], ids=["mid-prompt", "mid-decode"])
def test_an_offloaded_session_stays_offloaded(dj: djinn.Dj, tmp_path: Path, reached: int) -> None:
    session = dj.session(seed=6)
    run = start(session, ["resid_post.1"])
    for _ in range(reached):
        edit(next(run))
    session.offload()
    saved = through_file(session.checkpoint(), tmp_path)
    assert not session.resident
    assert_same(finish(run), finish(run_of(dj.restore(saved))))


@pytest.mark.parametrize("reached", [1, 4], ids=["mid-prompt", "mid-decode"])
def test_a_run_that_a_failing_predicate_left_without_a_stop(dj: djinn.Dj, tmp_path: Path, reached: int) -> None:
    calls = 0

    def fails_once(h: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2 + reached:  # the first call is the trial
            raise RuntimeError("not today")
        return h.sum() > 1e9

    session = dj.session(seed=6)
    run = start(session, ["embed", djinn.break_at("resid_post.1", fails_once)])
    with pytest.raises(djinn.InvalidPredicate, match="not today"):
        for stop in run:
            edit(stop)
    assert run.stop is None and run.flight is not None
    again = run_of(dj.restore(session.checkpoint()))
    assert again.stop is None
    assert_same(finish(run), finish(again))


def test_not_in_the_middle_of_a_step(dj: djinn.Dj) -> None:
    session = dj.session()
    run = start(session, [], on_token=lambda token: session.checkpoint())
    with pytest.raises(djinn.SessionBusy, match="middle of a step"):
        run.result()


# -- in memory ---------------------------------------------------------------------------------


def test_memory_is_apart_from_what_comes_later(dj: djinn.Dj) -> None:
    session = dj.session(seed=8)
    push, scale = direction(1), torch.linspace(0.5, 1.5, 32)
    session.steer("resid_post.0", add=push, scale=scale)
    run = start(session, ["resid_post.0", "resid_post.1"])
    stop = next(run)
    edit(stop)
    checkpoint = stop.checkpoint()
    assert checkpoint.wait() is checkpoint and checkpoint.nbytes > 0
    first = dj.restore(checkpoint)
    expected = finish(run_of(first))
    for tensor in (stop.value, push, scale, some_add(first)):
        tensor.zero_()
    session.steer("resid_post.1", scale=5.0)
    finish(run, edit)
    session.close()
    first.close()
    for _ in range(2):
        with dj.restore(checkpoint) as restored:
            assert_same_bits(some_add(restored), direction(1))
            assert_same(finish(run_of(restored)), expected)


def some_add(session: Session) -> torch.Tensor:
    """The vector of a restored edit: the user can reach it."""
    add = session.handles["resid_post.0"].edit.add
    assert add is not None
    return add


def told(checkpoint: djinn.Checkpoint) -> tuple[object, ...]:
    session = checkpoint._contents().session
    return session["tokens"], session["sampled"], len(session["journal"])


@pytest.mark.parametrize("way", ["rewound", "closed", "steered", "went on"])
def test_history_that_is_written_down_later_is_that_of_then(dj: djinn.Dj, way: str) -> None:
    """Nobody looks at one of two checkpoints until its session has another history."""
    with dj.session(seed=8) as session:
        run = start(session, [djinn.break_at("resid_post.1", positions="generated")])
        for _ in range(3):
            stop = next(run)
        asked, later = stop.checkpoint(), stop.checkpoint()
        expected = told(asked)
        if way == "rewound":
            edit(run.rewind(stop.position - 1, "resid_post.0"))
            finish(run)
        elif way == "closed":
            run.close()
            session.generate([1, 2, 3], max_new_tokens=3).result()
        elif way == "steered":
            session.steer("resid_post.0", scale=2.0, kv="recompute")
            finish(run)
        else:
            finish(run)
        assert told(session.checkpoint()) != expected
        assert told(later) == expected


def test_a_checkpoint_outlives_its_model(dj: djinn.Dj) -> None:
    other = small_dj(make_model("gpt2"))
    run = start(other.session(seed=8), ["resid_post.1"])
    checkpoint = next(run).checkpoint()
    expected = finish(run)
    other.close()
    assert_same(finish(run_of(dj.restore(checkpoint))), expected)
    with pytest.raises(djinn.SessionClosed):
        checkpoint.restore_into(other.engine)


def test_forks_have_checkpoints_of_their_own(dj: djinn.Dj, tmp_path: Path) -> None:
    stop = next(start(dj.session(seed=8), ["resid_post.1"]))
    (twin,) = stop.fork(1, seeds=[99])
    edit(twin)
    restored = dj.restore(through_file(twin.checkpoint(), tmp_path))
    assert restored.seed == 99
    assert_same(finish(run_of(restored)), finish(twin.run))


def test_repr_says_where(dj: djinn.Dj) -> None:
    stop = next(start(dj.session(), ["resid_post.1"]))
    assert "19 tokens, stopped at 'resid_post.1'" in repr(stop.checkpoint())


@pytest.mark.gpu
@pytest.mark.parametrize("reached", [2, 4], ids=["mid-prompt", "mid-decode"])
def test_on_a_gpu_the_copies_only_begin(tmp_path: Path, reached: int) -> None:
    dj = small_dj(make_model("llama-bf16").cuda())
    session = dj.session(seed=5)
    session.steer("resid_post.0", add=direction(1))
    run = start(session, ["resid_post.1"])
    for _ in range(reached):
        edit(stop := next(run))
    checkpoint, later = stop.checkpoint(), stop.checkpoint()  # nothing waits for them until a restore
    expected = finish(run)
    session.close()
    assert_same(finish(run_of(dj.restore(later))), expected)
    assert checkpoint.wait().nbytes == later.nbytes
    assert_same(finish(run_of(dj.restore(through_file(checkpoint, tmp_path)))), expected)
    dj.close()
