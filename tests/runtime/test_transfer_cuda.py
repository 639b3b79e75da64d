"""Checkpoints, offloads and forks on a GPU: nothing waits, and nothing is overwritten while it is read."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime.checkpoint import Checkpoint
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.session import Session
from tests.bits import assert_same_bits
from tests.runtime.checkpoint_cases import (
    assert_same,
    assert_same_result,
    close_all,
    edit,
    finish,
    run_of,
    small_dj,
    start,
)
from tests.runtime.holding import compiled, hold_up, no_waiting
from tests.runtime.tiny import make_model, some

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["gpt2", "llama-bf16"])
def dj(request: pytest.FixtureRequest) -> Iterator[djinn.Dj]:
    yield compiled(request.param)
    close_all(compiled(request.param))


def stopped(dj: djinn.Dj, count: int = 4, seed: int = 5) -> Run:
    run = start(dj.session(seed=seed), ["resid_post.1"])
    for _ in range(count):
        edit(next(run))
    return run


def kv_of(session: Session, length: int) -> list[torch.Tensor]:
    return [tensor[session.row, :, :length].cpu() for tensor in session.engine.arena.env.values()]


def held_kv(checkpoint: Checkpoint) -> list[torch.Tensor]:
    assert checkpoint._kv is not None
    return list(checkpoint._kv.tensors().values())


@pytest.mark.parametrize("reached", [1, 2, 4], ids=["first chunk", "second chunk", "decode"])
def test_a_checkpoint_waits_for_nothing_and_has_every_byte(dj: djinn.Dj, reached: int, tmp_path: Path) -> None:
    run = stopped(dj, reached)
    session = run.session
    with no_waiting():
        checkpoint = session.checkpoint()
    for found, wanted in zip(held_kv(checkpoint), kv_of(session, session.length), strict=True):
        assert_same_bits(found, wanted)
    saved = checkpoint.save(tmp_path / "a.safetensors")
    expected = finish(run)
    session.close()
    for one in (checkpoint, saved):
        with dj.restore(one) as restored:
            assert_same(finish(run_of(restored)), expected)


def test_between_runs(dj: djinn.Dj) -> None:
    with dj.session(seed=3) as session:
        start(session, []).result()
        with no_waiting():
            checkpoint = session.checkpoint()
        for found, wanted in zip(held_kv(checkpoint), kv_of(session, session.length), strict=True):
            assert_same_bits(found, wanted)


def test_offload_and_return_wait_for_nothing(dj: djinn.Dj) -> None:
    run, twin = stopped(dj), stopped(dj)
    session = run.session
    before = kv_of(session, session.extent)
    with no_waiting():
        session.offload()
        dj.session().close()
        dj.engine.bring_back(session)
    for found, wanted in zip(kv_of(session, session.extent), before, strict=True):
        assert_same_bits(found, wanted)
    assert_same(finish(run), finish(twin))


def forward_on(run: Run) -> None:
    finish(run, edit)


def close(run: Run) -> None:
    run.session.close()


def rewind(run: Run) -> None:
    edit(run.rewind(0, "resid_post.1"))


def recompute(run: Run) -> None:
    run.session.steer("resid_post.0", scale=0.5, kv="recompute")


def offload_and_reuse(run: Run) -> None:
    engine, row = run.session.engine, run.session.row
    run.session.offload()
    fresh = [engine.open_session(9) for _ in range(engine.arena.free_rows)]  # a row just left comes last
    assert row in {session.row for session in fresh}
    for session in fresh:
        start(session, []).result()
    for session in fresh:
        session.close()


def offload_and_return(run: Run) -> None:
    offload_and_reuse(run)
    forward_on(run)


@pytest.mark.parametrize("act", [forward_on, close, rewind, recompute, offload_and_reuse, offload_and_return])
def test_what_comes_next_does_not_reach_what_is_being_sent(dj: djinn.Dj, act: Callable[[Run], None]) -> None:
    run, twin = stopped(dj), stopped(dj)
    wanted, expected = kv_of(run.session, run.session.length), finish(twin)
    hold_up(dj)
    checkpoint = run.session.checkpoint()
    act(run)
    for found, tensor in zip(held_kv(checkpoint), wanted, strict=True):
        assert_same_bits(found, tensor)
    with dj.restore(checkpoint) as restored:
        assert_same(finish(run_of(restored)), expected)


def test_a_fork_of_a_session_that_is_on_its_way_back(dj: djinn.Dj) -> None:
    run, twin = stopped(dj), stopped(dj)
    run.session.offload()
    hold_up(dj)
    (fork,) = some(run.stop).fork(1)
    expected = finish(twin)
    for one in (fork.run, run):
        assert_same_result(one.result(), expected.result)


def test_closed_while_on_its_way_back(dj: djinn.Dj) -> None:
    run = stopped(dj)
    run.session.offload()
    hold_up(dj)
    dj.engine.bring_back(run.session)
    run.session.close()
    torch.cuda.synchronize()
    assert not any(bool(tensor[:-1].any()) for tensor in dj.engine.arena.env.values())


def test_checkpoints_taken_and_dropped_leave_no_memory_behind(dj: djinn.Dj) -> None:
    run = stopped(dj)

    def cycles(count: int) -> tuple[int, int, int]:
        for index in range(count):
            checkpoint = run.session.checkpoint()
            if index % 7 == 0:
                checkpoint.wait()
        del checkpoint
        torch.cuda.synchronize()
        run.session.checkpoint().wait()  # looks after what the others left
        gc.collect()
        found = dj.memory()
        return torch.cuda.memory_allocated(), found["pinned_used"], found["pinned_capacity"]

    assert cycles(50) == cycles(1000)


def test_pinned_memory_that_runs_out_leaves_everyone_usable() -> None:
    dj = small_dj(make_model("gpt2").cuda(), backend="eager", pinned_bytes=12000)
    run, twin = stopped(dj), stopped(dj)
    held = [run.session.checkpoint()]
    with pytest.raises(djinn.CapacityError, match="pinned_bytes=12000 are taken"):
        run.session.offload()
    with pytest.raises(djinn.CapacityError, match="pinned_bytes=12000 are taken"):
        twin.session.checkpoint()
    assert held[0].wait().nbytes > 0  # what history shares with it goes to ordinary memory
    for _ in range(50):
        held.clear()
        held.append(run.session.checkpoint())  # the memory of a dropped one comes back, if need be by waiting for it
    assert_same(finish(run), finish(twin))
    close_all(dj)
    dj.close()


def test_two_models_read_one_checkpoint_in_turn() -> None:
    """Its memory is free again when both are through, so the second copy comes after the first."""
    one, other = (small_dj(make_model("llama-bf16").cuda(), backend="eager") for _ in range(2))
    for dj in (one, other):
        dj.warmup()
    checkpoint = stopped(one).session.checkpoint().wait()
    hold_up(one)
    assert checkpoint._kv is not None
    parked = checkpoint._kv.in_memory()
    one.engine.transfer.receive(parked, one.engine.arena.spare_row)
    first = parked.block.busy
    other.engine.transfer.receive(parked, other.engine.arena.spare_row)
    assert parked.block.busy is not None and first is not None and not first.query()
    parked.block.busy.synchronize()
    assert first.query()
    for dj in (one, other):
        close_all(dj)
        dj.close()
