"""Transfers where every stream does its work as late as it may: what is still to be sent is not overwritten."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.program import KVSpec
from djinn_fx.runtime import transfer as transfers
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.checkpoint import Checkpoint
from djinn_fx.runtime.parcels import Sent
from djinn_fx.runtime.pinned import HostPool
from djinn_fx.runtime.stop import Stop
from djinn_fx.runtime.transfer import Transfer
from tests.bits import assert_same_bits
from tests.runtime.checkpoint_cases import Passed, assert_same, close_all, edit, finish, run_of, shared, start
from tests.runtime.lazy_cuda import LazyCuda

POSITIONS = 24


def setup(seed: int, staging: int, patch: pytest.MonkeyPatch) -> tuple[KVArena, Transfer, LazyCuda]:
    """4 layers of 384 bytes a position; the first of several pieces has 200 bytes."""
    torch.manual_seed(seed)
    arena = KVArena([KVSpec(2, 16, 16), KVSpec(1, 16, 16)] * 2, 3, POSITIONS, torch.float32, torch.device("cpu"))
    for tensor in arena.env.values():
        tensor.normal_()
    patch.setattr(transfers, "FIRST", 200)
    transfer = Transfer(arena, HostPool(1 << 20, pinned=False), staging)
    return arena, transfer, LazyCuda(seed, transfer, patch)


def row_of(arena: KVArena, row: int, length: int) -> list[torch.Tensor]:
    return [tensor[row, :, :length].clone() for tensor in arena.env.values()]


def write(target: torch.Tensor, content: torch.Tensor) -> None:
    target.zero_().add_(content)


def assert_sent(sent: Sent, wanted: list[torch.Tensor], extra: torch.Tensor | None) -> None:
    assert sent.parked is not None and sent.arrived is not None
    sent.arrived.synchronize()
    for found, tensor in zip(sent.parked.tensors(), wanted, strict=True):
        assert_same_bits(found, tensor)
    found_extra = sent.extra
    assert (found_extra is None) == (extra is None)
    if found_extra is not None and extra is not None:
        assert_same_bits(found_extra, extra)


@pytest.mark.parametrize("staging", [1 << 20, 6000, 1200, 64])
@pytest.mark.parametrize("shape", [None, (3, 5), (1, 7, 111)], ids=str)
def test_rows_and_values_arrive_whatever_comes_next(
    staging: int, shape: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(20):
        with monkeypatch.context() as patch:
            arena, transfer, cuda = setup(seed, staging, patch)
            expected, sent = [], []
            content = row_of(arena, 1, POSITIONS)
            for _ in range(3):  # none waits for the one before
                length = cuda.chance.choice([0, 1, 7, POSITIONS, POSITIONS])
                extra = None if shape is None else torch.randn(shape).to(torch.bfloat16)
                expected.append(([tensor[:, :length] for tensor in content], extra))
                sent.append(transfer.send(1, length, extra))
                assert cuda.current is cuda.compute
                arena.settle(1)
                content = [torch.randn(tensor[1].shape) for tensor in arena.env.values()]  # the session goes on
                for tensor, fresh in zip(arena.env.values(), content, strict=True):
                    cuda.compute.do(partial(write, tensor[1], fresh))
                if cuda.chance.random() < 0.3:
                    cuda.drain()
            for one, (wanted, value) in zip(sent, expected, strict=True):
                assert_sent(one, wanted, value)
            cuda.drain()


@pytest.mark.parametrize("direct", [0, 1 << 20], ids=["long", "short"])
@pytest.mark.parametrize("staging", [1 << 20, 1200, 64])
def test_values_that_are_written_to_right_afterwards(
    staging: int, direct: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(20):
        with monkeypatch.context() as patch:
            patch.setattr(transfers, "DIRECT", direct)
            arena, transfer, cuda = setup(seed, staging, patch)
            value, expected, sent = torch.zeros(3, 7), [], []
            for turn in range(1, 4):
                cuda.compute.do(partial(write, value, torch.full((3, 7), float(turn))))
                length = cuda.chance.choice([0, 7, POSITIONS])
                expected.append((row_of(arena, 1, length), torch.full((3, 7), float(turn))))
                sent.append(transfer.send(1, length, value, copy=partial(copied, cuda, value)))
            cuda.compute.do(value.zero_)
            for one, (wanted, content) in zip(sent, expected, strict=True):
                assert_sent(one, wanted, content)
            cuda.drain()
            assert not transfer._flying or not direct


def copied(cuda: LazyCuda, value: torch.Tensor, own: torch.Tensor) -> torch.cuda.Event:
    """A kernel on the compute stream, which takes bytes or the like."""
    there = own if own.dtype == value.dtype else own.view(value.dtype).view(value.shape)
    cuda.compute.do(partial(write, there, value))
    event = torch.cuda.Event()
    event.record(cuda.compute)  # type: ignore[arg-type]
    return event


def test_a_short_value_alone_takes_no_other_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    arena, transfer, cuda = setup(0, 1 << 20, monkeypatch)
    value = torch.randn(4, 3)
    sent = transfer.send(1, 0, value, copy=partial(copied, cuda, value))
    assert [len(stream.queue) for stream in cuda.streams] == [2]  # copy, "arrived"
    assert sent.parked is not None and sent.block is not None and sent.arrived is not None
    assert sent.block.busy is sent.arrived and not sent.arrived.query()
    cuda.drain()
    assert_sent(sent, row_of(arena, 1, 0), value)


def test_memory_of_a_value_whose_copy_is_interrupted_is_given_away_only_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, transfer, cuda = setup(0, 1 << 20, monkeypatch)
    value = torch.randn(4, 3)

    def cut_short(own: torch.Tensor) -> torch.cuda.Event:
        copied(cuda, value, own)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer.send(1, 0, value, copy=cut_short)
    assert not any(stream.queue for stream in cuda.streams)


@pytest.mark.parametrize("staging", [1 << 20, 1200])
def test_a_row_that_is_left_is_zeroed_behind_its_packing_and_comes_back(
    staging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(12):
        with monkeypatch.context() as patch:
            arena, transfer, cuda = setup(seed, staging, patch)
            wanted = row_of(arena, 0, POSITIONS)
            parked = transfer.send(0, POSITIONS).parked
            assert parked is not None
            transfer.leave(0)
            transfer.receive(parked, 2)
            arena.arrive(2)
            cuda.compute.synchronize()
            for found, tensor in zip(row_of(arena, 2, POSITIONS), wanted, strict=True):
                assert_same_bits(found, tensor)
            cuda.drain()
            assert not any(bool(tensor[0].any()) for tensor in arena.env.values())


def test_one_launch_and_one_copy_with_the_value_behind_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    _, transfer, cuda = setup(0, 1 << 20, monkeypatch)
    transfer.send(1, 5, torch.randn(4, 3))
    cuda.drain()
    sent = transfer.send(1, 5, torch.randn(4, 3))
    compute, copies = (stream.queue for stream in cuda.streams)
    assert len(compute) == 1  # how far it had come
    assert len(copies) == 5  # wait for that, pack, "the row may change", copy, "arrived"
    assert sent.arrived is not None and not sent.arrived.query() and len(transfer._flying) == 1
    cuda.drain()
    sent = transfer.send(1, 0, torch.randn(4, 3))
    assert len(copies) == 3 and sent.extra is not None  # wait, copy, "arrived"
    cuda.drain()


def test_memory_dropped_while_a_copy_fills_it_is_not_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    arena, transfer, cuda = setup(0, 1 << 20, monkeypatch)
    wanted = row_of(arena, 1, POSITIONS)
    sent = transfer.send(0, POSITIONS, torch.randn(3))
    assert sent.parked is not None
    place = sent.parked.block.tensor.data_ptr()
    del sent
    kept = transfer.send(1, POSITIONS)
    assert kept.parked is not None and kept.parked.block.tensor.data_ptr() != place
    cuda.drain()
    assert_sent(kept, wanted, None)
    assert transfer._pool.used  # to be asked, it looks at what was dropped
    again = transfer.send(1, POSITIONS)
    assert again.parked is not None and again.parked.block.tensor.data_ptr() == place and not transfer._flying
    cuda.drain()


def test_what_fails_on_the_way_leaves_nothing_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    arena, transfer, cuda = setup(0, 1200, monkeypatch)

    def refuse(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(arena, "reading", refuse)
        with pytest.raises(KeyboardInterrupt):
            transfer.send(1, POSITIONS)
    assert cuda.current is cuda.compute and not any(stream.queue for stream in cuda.streams)
    wanted = row_of(arena, 1, POSITIONS)
    assert_sent(transfer.send(1, POSITIONS), wanted, None)


def taken_on_the_way(dj: djinn.Dj, seed: int) -> list[Passed]:
    """Two runs between which other things happen, and what comes of each checkpoint that was taken on the way."""
    chance, taken = random.Random(seed), list[Checkpoint]()

    def checkpoint(stop: Stop) -> None:
        taken.extend(stop.checkpoint() for _ in range(chance.choice([1, 3])))

    def look(stop: Stop) -> None:
        assert stop.value is not None

    def assign(stop: Stop) -> None:
        stop.value = stop.content * 2

    def offload(stop: Stop) -> None:
        stop.session.offload()

    def fork(stop: Stop) -> None:
        (twin,) = stop.fork()
        twin.value.zero_()
        taken.append(twin.checkpoint())
        twin.session.close()

    acts: list[Callable[[Stop], None]] = [checkpoint, checkpoint, checkpoint, look, edit, assign, offload, fork]
    for _ in range(2):
        with dj.session(seed=5) as session:
            for stop in start(session, ["embed", "resid_post.1", "logits"]):
                for act in chance.choices(acts, k=3):
                    act(stop)
            taken.append(session.checkpoint())
    found = []
    for one in chance.sample(taken, 6):
        with dj.restore(one) as session:
            found.append(finish(run_of(session)))
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama-bf16"])
@pytest.mark.parametrize("seed", range(4))
def test_checkpoints_whose_copies_come_late_hold_what_they_would_at_once(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dj = shared(name)
    expected = taken_on_the_way(dj, seed)
    with monkeypatch.context() as patch:
        patch.setattr(dj.engine.transfer, "_staging", torch.empty((1 << 20, 2048)[seed % 2], dtype=torch.uint8))
        cuda = LazyCuda(seed, dj.engine.transfer, patch, prompt=True)
        found = taken_on_the_way(dj, seed)
        cuda.drain()
        close_all(dj)
    for kept in (dj.engine.arena._read, dj.engine.arena._moving, dj.engine.transfer._flying):
        kept.clear()  # events of the stand-in, all passed
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
