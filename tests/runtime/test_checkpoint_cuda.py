"""Checkpoints on a GPU whose values travel with the KV: bits, whatever anybody does while they are on their way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.program import KVSpec
from djinn_fx.runtime import transfer as transfers
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.pinned import HostPool
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.stop import Stop
from djinn_fx.runtime.transfer import Transfer
from tests.bits import assert_same_bits
from tests.runtime.checkpoint_cases import assert_same, close_all, edit, finish, run_of, small_dj, start
from tests.runtime.holding import compiled, hold_up, no_waiting
from tests.runtime.tiny import make_model, some

pytestmark = pytest.mark.gpu

POSITIONS = 700


@pytest.fixture(params=["gpt2", "gpt2-bf16", "llama", "llama-bf16"])
def dj(request: pytest.FixtureRequest) -> Iterator[djinn.Dj]:
    yield compiled(request.param)
    close_all(compiled(request.param))


def stopped(dj: djinn.Dj, reached: int, site: str = "resid_post.1") -> Run:
    run = start(dj.session(seed=5), [site])
    for _ in range(reached):
        next(run)
    return run


def look(stop: Stop) -> None:
    assert stop.value is not None


def leave_alone(stop: Stop) -> None:
    """Nothing."""


@pytest.mark.parametrize("act", [leave_alone, look, edit])
@pytest.mark.parametrize("reached", [1, 2, 4], ids=["first chunk", "second chunk", "decode"])
@pytest.mark.parametrize("site", ["resid_post.1", "logits"])
def test_three_in_a_row_then_written_to_elsewhere_and_resumed(
    dj: djinn.Dj, act: Callable[[Stop], None], reached: int, site: str
) -> None:
    run, twin = stopped(dj, reached, site), stopped(dj, reached, site)
    for one in (run, twin):
        act(some(one.stop))
    value, expected = some(twin.stop).value.clone(), finish(twin)
    stop = some(run.stop)
    hold_up(dj)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        taken = [stop.checkpoint() for _ in range(3)]
        stop.value.zero_()
    torch.cuda.current_stream().wait_stream(side)
    finish(run, edit)  # the row and the taps are overwritten meanwhile
    for checkpoint in taken:
        with dj.restore(checkpoint) as session:
            assert_same_bits(some(run_of(session).stop).value, value)
            assert_same(finish(run_of(session)), expected)


@pytest.mark.parametrize("act", [leave_alone, look])
@pytest.mark.parametrize("reached", [1, 2, 4], ids=["first chunk", "second chunk", "decode"])
def test_nothing_waits_at_a_stop(dj: djinn.Dj, reached: int, act: Callable[[Stop], None]) -> None:
    run, twin = stopped(dj, reached), stopped(dj, reached)
    stop, expected = some(run.stop), finish(twin)
    act(stop)
    with no_waiting():
        taken = [stop.checkpoint() for _ in range(2)]
        stop.value.zero_()
        taken.append(stop.checkpoint())
    for checkpoint in taken[:2]:
        with dj.restore(checkpoint) as session:
            assert_same(finish(run_of(session)), expected)
    with dj.restore(taken[2]) as session:
        assert some(run_of(session).stop).value.eq(0).all()


def test_a_change_is_found_on_the_device_and_questions_do_not_pile_up(dj: djinn.Dj) -> None:
    run = stopped(dj, 4)
    stop = some(run.stop)
    before = stop.value.clone()
    hold_up(dj)
    taken = [stop.checkpoint() for _ in range(3)]
    stop.value.mul_(2)
    taken.append(stop.checkpoint())
    for _ in range(50):
        stop.checkpoint()  # dropped with the question it asked
        torch.cuda.synchronize()
    assert len(dj.engine.doubts._made) < 20
    for checkpoint, value in zip(taken, [before, before, before, before * 2], strict=True):
        changed = value is not before
        assert checkpoint._contents().session["run"]["flight"]["stop"]["changed"] is changed
        with dj.restore(checkpoint) as session:
            assert_same_bits(some(run_of(session).stop).value, value)


def test_a_parked_session_sends_its_value_alone(dj: djinn.Dj) -> None:
    run, twin = stopped(dj, 4), stopped(dj, 4)
    expected = finish(twin)
    run.session.offload()
    checkpoint = some(run.stop).checkpoint()
    finish(run, edit)
    with dj.restore(checkpoint) as session:
        assert_same(finish(run_of(session)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (5, 7)], ids=["kernel", "twin"])
@pytest.mark.parametrize("staging", [32 << 20, 300_000, 20_000], ids=["whole", "pieces", "many pieces"])
@pytest.mark.parametrize("shape", [(1, 1, 501), (2, 33, 97), (3,), (256, 1001)], ids=str)
def test_rows_and_values_of_any_size(
    dtype: torch.dtype, dims: tuple[int, int], staging: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "FIRST", staging // 8)
    device = torch.device("cuda", torch.cuda.current_device())
    arena = KVArena([KVSpec(3, *dims), KVSpec(2, *dims)], 2, POSITIONS, dtype, device)
    transfer = Transfer(arena, HostPool(1 << 28, pinned=True), staging)
    for _ in range(2):
        wanted, sent = [], []
        for length in (0, 1, POSITIONS, POSITIONS - 3):
            for tensor in arena.env.values():
                tensor.normal_()
            extra = torch.randn(shape, device=device).to(dtype)
            wanted.append(([tensor[1, :, :length].cpu() for tensor in arena.env.values()], extra.cpu()))
            sent.append(transfer.send(1, length, extra))
            del extra  # its memory may not be given away while it is read
            filler = torch.full(shape, 7.0, device=device).to(dtype)
            arena.settle(1)
            for tensor in arena.env.values():
                tensor.fill_(3)
            del filler
        for one, (row, value) in zip(sent, wanted, strict=True):
            assert one.parked is not None and one.extra is not None and one.arrived is not None
            one.arrived.synchronize()
            assert_same_bits(one.extra, value)
            for found, tensor in zip(one.parked.tensors(), row, strict=True):
                assert_same_bits(found, tensor)
    parked = sent[2].parked
    assert parked is not None
    transfer.receive(parked, 0)
    arena.arrive(0)
    for found, tensor in zip(arena.env.values(), wanted[2][0], strict=True):
        assert_same_bits(found[0, :, :POSITIONS].cpu(), tensor)


def test_the_first_checkpoint_finds_its_slab() -> None:
    dj = small_dj(make_model("gpt2").cuda(), backend="eager")
    with dj.session() as session:
        coming = dj.engine.pool._coming
        if coming is not None:
            coming.join()
        found = dj.memory()["pinned_capacity"]
        assert found > 0
        next(start(session, ["resid_post.1"])).checkpoint().wait()
        assert dj.memory()["pinned_capacity"] == found
    dj.close()
