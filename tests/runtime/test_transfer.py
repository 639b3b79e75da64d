"""Transfers and what is built on them, where every copy is at once: the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.program import KVSpec
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.pinned import HostPool
from djinn_fx.runtime.transfer import Transfer
from tests.bits import assert_same_bits
from tests.runtime.checkpoint_cases import assert_same, close_all, edit, finish, run_of, small_dj, start
from tests.runtime.tiny import model_of, some


@pytest.fixture
def dj() -> Iterator[djinn.Dj]:
    """Room for no more than one session's KV: 2 layers x 2 x 32 x 4 bytes a position."""
    made = small_dj(model_of("gpt2"), pinned_bytes=12000)
    yield made
    close_all(made)
    made.close()


@pytest.fixture
def roomy() -> Iterator[djinn.Dj]:
    """Room for a few sessions."""
    made = small_dj(model_of("gpt2"), pinned_bytes=40000)
    yield made
    close_all(made)
    made.close()


def arena(rows: int = 3, positions: int = 10) -> KVArena:
    made = KVArena([KVSpec(2, 4, 4), KVSpec(1, 6, 2)], rows, positions, torch.float32, torch.device("cpu"))
    for tensor in made.env.values():
        tensor.normal_()
    return made


@pytest.mark.parametrize("length", [0, 1, 7, 10])
def test_a_row_goes_and_comes_back(length: int) -> None:
    here = arena()
    transfer = Transfer(here, HostPool(1 << 20, pinned=False))
    before = [tensor.clone() for tensor in here.env.values()]
    sent = transfer.send(1, length, torch.arange(5))
    assert sent.parked is not None and sent.extra is not None and sent.extra.tolist() == [0, 1, 2, 3, 4]
    for found, tensor in zip(sent.parked.tensors(), before, strict=True):
        assert_same_bits(found, tensor[1, :, :length])
    for found, tensor in zip(sent.parked.tensors(length // 2), before, strict=True):
        assert_same_bits(found, tensor[1, :, : length // 2])
    transfer.receive(sent.parked, 2)
    for tensor, old in zip(here.env.values(), before, strict=True):
        old[2, :, :length] = old[1, :, :length]
        assert_same_bits(tensor, old)


def test_without_host_memory_everything_stays_as_it_is(dj: djinn.Dj) -> None:
    session, other = dj.session(seed=5), dj.session(seed=5)
    run, twin = start(session, ["resid_post.1"]), start(other, ["resid_post.1"])
    for _ in range(4):
        edit(next(run))
        edit(next(twin))
    held = session.checkpoint()
    acts = [session.offload, session.checkpoint, some(run.stop).checkpoint]
    for act in acts:
        with pytest.raises(djinn.CapacityError, match=r"of pinned_bytes=12000 are taken. Drop checkpoints"):
            act()
        assert session.resident and some(run.stop).current
    del held
    session.offload()
    with pytest.raises(djinn.CapacityError, match="close an offloaded session"):
        other.offload()
    assert not session.resident and other.resident
    assert_same(finish(run), finish(twin))


def test_a_row_that_cannot_be_filled_is_given_back(dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch) -> None:
    session, twin = dj.session(seed=5), dj.session(seed=5)
    run = start(session, ["resid_post.1"])
    for _ in range(4):
        edit(next(run))
    session.offload()
    free = dj.engine.arena.free_rows

    def refuse(*_: object) -> None:
        raise djinn.CapacityError("no device memory")

    with monkeypatch.context() as patched:
        patched.setattr(dj.engine.transfer, "receive", refuse)
        with pytest.raises(djinn.CapacityError, match="no device memory"):
            next(run)
    assert dj.engine.arena.free_rows == free and not session.resident and some(run.stop).current
    again = start(twin, ["resid_post.1"])
    for _ in range(4):
        edit(next(again))
    assert_same(finish(run), finish(again))


def test_a_checkpoint_of_an_offloaded_session_shares_its_memory(roomy: djinn.Dj) -> None:
    session = roomy.session(seed=5)
    run = start(session, ["resid_post.1"])
    for _ in range(4):
        edit(next(run))
    session.offload()
    used = roomy.memory()["pinned_used"]
    checkpoint = session.checkpoint()
    assert roomy.memory()["pinned_used"] <= used + 256
    expected = finish(run)
    session.close()
    for _ in range(2):
        with roomy.restore(checkpoint) as restored:
            assert_same(finish(run_of(restored)), expected)


def test_memory_is_counted_and_comes_back(roomy: djinn.Dj) -> None:
    session = roomy.session(seed=5)
    run = start(session, ["resid_post.1"])
    for _ in range(4):
        next(run)
    for _ in range(100):
        checkpoint = session.checkpoint()
        session.offload()
        assert roomy.memory()["host"] == roomy.engine.arena.bytes_per_position * session.extent
        session.pin()
        session.pin(False)
        assert checkpoint.nbytes > 0
        del checkpoint
    found = roomy.memory()
    assert found["host"] == found["pinned_used"] == found["staging"] == 0
    assert found["pinned_capacity"] <= 40000
    finish(run)


def test_a_checkpoint_is_apart_from_what_its_user_can_reach(roomy: djinn.Dj) -> None:
    session = roomy.session(seed=5)
    session.steer("resid_post.0", add=torch.ones(32))
    point = djinn.break_at("resid_post.1", djinn.when.probe(torch.ones(32), 1e9))
    run = start(session, [point, "embed"])
    next(run)
    checkpoint = session.checkpoint()  # nobody has looked at it yet
    with roomy.restore(checkpoint) as early:
        expected = finish(run_of(early))
    later = session.checkpoint()
    edited, when = session.handles["resid_post.0"].edit.add, point.when
    assert edited is not None and isinstance(when, djinn.when.Probe)
    edited.zero_()
    when.w.fill_(-1e12)
    some(run.stop).value.zero_()
    with roomy.restore(later) as restored:
        assert_same(finish(run_of(restored)), expected)


def test_what_a_checkpoint_says_of_the_environment_follows_it() -> None:
    dj = small_dj(model_of("gpt2"), sites=("resid_post",))
    with dj.session() as session:
        session.forward([5, 6, 7]).result()
        before = session.checkpoint()
        dj.add_sites("embed")
        after = session.checkpoint()
    with pytest.raises(djinn.CheckpointError, match="only compiled here: embed"):
        dj.restore(before)
    dj.restore(after).close()
    dj.close()
