"""The pool of host memory: blocks never overlap, what is dropped can be had again, the bound holds."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from typing import Any, cast

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import djinn_fx as djinn
from djinn_fx.runtime import pinned
from djinn_fx.runtime.pinned import ALIGNMENT, SLACK, Block, HostPool
from djinn_fx.runtime.slab import Slab

SLAB, LIMIT = 8192, 40000


class Event:
    """A copy that is through when somebody says so, or when somebody waits for it."""

    def __init__(self) -> None:
        self.passed = False
        self.waited = False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = self.waited = True


def busy(block: Block) -> Event:
    """Let a copy touch the block."""
    event = Event()
    block.busy_until(cast(Any, event))
    return event


def rounded(nbytes: int) -> int:
    return max(ALIGNMENT, -(-nbytes // ALIGNMENT) * ALIGNMENT)


class Pool(RuleBasedStateMachine):
    """Blocks are taken, written, dropped in any order; copies end at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = HostPool(LIMIT, pinned=False, slab=SLAB)
        self.held: list[tuple[Block, int]] = []
        self.flying: list[tuple[Event, int]] = []  # copies of dropped blocks
        self.mark = 0

    def taken(self) -> int:
        self.flying = [(event, size) for event, size in self.flying if not event.passed]
        return sum(rounded(block.tensor.numel()) for block, _ in self.held) + sum(size for _, size in self.flying)

    @rule(nbytes=st.one_of(st.integers(0, 600), st.integers(0, 12000)))
    def take(self, nbytes: int) -> None:
        try:
            block = self.pool.take(nbytes)
        except djinn.CapacityError as error:
            assert "pinned_bytes=40000" in str(error)
            # Held blocks are what is in the way, in pieces or whole: nothing else is left.
            assert sum(rounded(one.tensor.numel()) for one, _ in self.held) + rounded(nbytes) > LIMIT - 4 * SLAB
            return
        self.mark = (self.mark + 1) % 256
        assert block.tensor.numel() == nbytes and block.tensor.data_ptr() % 8 == 0
        self.held.append((block, self.mark))
        block.tensor.fill_(self.mark)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), copying=st.booleans())
    def drop(self, data: st.DataObject, copying: bool) -> None:
        block, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        if copying:
            self.flying.append((busy(block), rounded(block.tensor.numel())))

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        event, _ = self.flying[data.draw(st.integers(0, len(self.flying) - 1))]
        event.passed = True

    @invariant()
    def nothing_overlaps(self) -> None:
        for block, mark in self.held:
            assert bool(block.tensor.eq(mark).all())

    @invariant()
    def bytes_are_counted(self) -> None:
        assert self.pool.used == self.taken() <= self.pool.capacity <= LIMIT

    def teardown(self) -> None:
        for event, _ in self.flying:
            event.passed = True
        self.held.clear()
        assert self.pool.used == 0
        whole = self.pool.take(LIMIT - LIMIT % ALIGNMENT)  # every slab is whole again
        assert whole.tensor.numel() > LIMIT - ALIGNMENT


TestPool = Pool.TestCase


def test_the_first_hole_that_fits_is_taken_and_neighbours_join() -> None:
    pool = HostPool(SLAB, pinned=False, slab=SLAB)
    blocks: list[Block | None] = [pool.take(1024) for _ in range(8)]
    places = [block.tensor.data_ptr() for block in blocks if block is not None]
    assert places == [places[0] + 1024 * index for index in range(8)]
    for index in (1, 5, 4):
        blocks[index] = None
    assert pool.take(2048).tensor.data_ptr() == places[4]
    for index in (2, 0):
        blocks[index] = None
    assert pool.take(3000).tensor.data_ptr() == places[0]


def test_a_view_keeps_the_memory() -> None:
    pool = HostPool(SLAB, pinned=False, slab=SLAB)
    view = pool.take(4096).tensor.view(torch.int32)[10:].fill_(7)
    gc.collect()
    others = [pool.take(512).tensor.fill_(255) for _ in range(8)]
    assert pool.used == SLAB and bool(view.eq(7).all()) and len(others) == 8
    del view
    assert pool.used == SLAB - 4096


def test_a_dropped_block_is_given_to_nobody_before_its_copy_is_through() -> None:
    pool = HostPool(4 * SLAB, pinned=False, slab=SLAB)
    block, free = pool.take(SLAB), pool.take(SLAB)
    place, event = block.tensor.data_ptr(), busy(block)
    del block, free
    other = pool.take(SLAB)
    assert other.tensor.data_ptr() != place and not event.waited
    last = pool.take(SLAB)  # a copy takes less time than a slab
    assert last.tensor.data_ptr() == place and event.waited and pool.capacity == 2 * SLAB


def test_slabs_give_way_to_a_block_longer_than_any() -> None:
    pool = HostPool(4 * SLAB, pinned=False, slab=SLAB)
    blocks = [pool.take(SLAB) for _ in range(4)]
    with pytest.raises(djinn.CapacityError, match=r"8193 bytes .* and 32768 of pinned_bytes=32768 are taken"):
        pool.take(SLAB + 1)
    del blocks[1:]
    assert pool.take(3 * SLAB).tensor.numel() == 3 * SLAB
    assert pool.capacity == 4 * SLAB


def test_what_a_long_block_leaves_takes_one_that_has_grown() -> None:
    pool = HostPool(64 * SLAB, pinned=False, slab=SLAB)
    pool.take(2 * SLAB)
    capacity = pool.capacity
    for growth in range(1, 5):  # a session that leaves, comes back, grows and leaves again
        pool.take(2 * SLAB + growth * 2 * SLAB // SLACK // 4)
    assert pool.capacity == capacity < 3 * SLAB


def test_blocks_outlive_their_pool() -> None:
    pool = HostPool(SLAB, pinned=False, slab=SLAB)
    block = pool.take(100)
    del pool
    gc.collect()
    assert bool(block.tensor.fill_(3).eq(3).all())


@pytest.mark.gpu
def test_pinned_slabs() -> None:
    pool = HostPool(1 << 28, pinned=True)
    block = pool.take(3 << 20)
    assert block.tensor.is_pinned() and pool.capacity == 64 << 20
    source = torch.randint(256, (3 << 20,), dtype=torch.uint8, device="cuda")
    block.tensor.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(block.tensor, source.cpu())
    large = pool.take(100 << 20)
    assert large.tensor.is_pinned() and pool.capacity == (64 << 20) + (100 << 20) * 9 // 8


class Slow(Slab):
    """A slab that is long in the making, or cannot be made."""

    may, made = threading.Event(), 0
    failing: type[Exception] | None = None

    def __init__(self, nbytes: int, pin: bool) -> None:
        if threading.current_thread().name == "djinn-pinning":
            assert Slow.may.wait(20)
            if Slow.failing is not None:
                raise Slow.failing("no")
        Slow.made += 1
        super().__init__(nbytes, pin)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[Slow]:
    monkeypatch.setattr(pinned, "Slab", Slow)
    Slow.may, Slow.failing, Slow.made = threading.Event(), None, 0
    return Slow


def test_nobody_waits_for_a_slab_that_is_made_ahead(slow: type[Slow]) -> None:
    pool = HostPool(2 * SLAB, pinned=False, slab=SLAB, ahead=True)
    first = pool.take(SLAB * 2 // 3)  # what is left is less: the next slab begins to be made
    assert slow.made == 1 and pool._coming is not None
    small = pool.take(256)
    assert slow.made == 1 and pool.capacity == 2 * SLAB  # the one that is coming counts
    slow.may.set()
    pool._coming.join()
    second = pool.take(SLAB * 2 // 3)
    assert slow.made == 2 and pool.capacity == 2 * SLAB and pool._coming is None  # the bound allows no third
    with pytest.raises(djinn.CapacityError, match="pinned_bytes"):
        pool.take(SLAB)
    del first, small, second


def test_who_needs_the_slab_that_is_coming_waits_for_it(slow: type[Slow]) -> None:
    pool = HostPool(2 * SLAB, pinned=False, slab=SLAB, ahead=True)
    held = [pool.take(SLAB * 2 // 3)]
    threading.Timer(0.05, slow.may.set).start()
    held.append(pool.take(SLAB * 2 // 3))
    assert slow.made == 2 and pool.capacity == 2 * SLAB


def test_the_first_slab_is_made_before_anybody_needs_it(slow: type[Slow]) -> None:
    pool = HostPool(4 * SLAB, pinned=False, slab=SLAB, ahead=True)
    pool.prepare()
    pool.prepare()
    assert slow.made == 0 and pool._coming is not None and pool.capacity == SLAB
    slow.may.set()
    pool._coming.join()
    block = pool.take(SLAB // 4)
    pool.prepare()
    assert slow.made == 1 and pool._coming is None and block.tensor.numel() == SLAB // 4
    HostPool(4 * SLAB, pinned=False, slab=SLAB).prepare()
    assert slow.made == 1


def test_a_block_outlives_its_pool_and_takes_the_slab_with_it() -> None:
    pool = HostPool(SLAB, pinned=False, slab=SLAB)
    view = pool.take(512).tensor.view(torch.int32)[5:].fill_(3)
    gone: list[bool] = []
    weakref.finalize(pool._slabs[0].memory, gone.append, True).atexit = False  # as pinned memory is unpinned
    del pool
    gc.collect()
    assert not gone and bool(view.eq(3).all())
    del view
    gc.collect()
    assert gone


@pytest.mark.parametrize("error", [OSError, ValueError])
def test_a_slab_that_cannot_be_made_ahead_is_made_when_it_is_needed(slow: type[Slow], error: type[Exception]) -> None:
    pool = HostPool(4 * SLAB, pinned=False, slab=SLAB, ahead=True)
    slow.failing = error
    slow.may.set()
    held = [pool.take(SLAB * 2 // 3) for _ in range(3)]
    assert slow.made == 3 and pool._coming is None and len(held) == 3


@pytest.mark.parametrize("seed", range(6))
def test_one_holder_whose_blocks_grow_needs_little_more_than_without(seed: int) -> None:
    chance = random.Random(seed)
    pools = [HostPool(64 * SLAB, pinned=False, slab=SLAB, ahead=ahead) for ahead in (False, True)]
    flying: list[list[Event]] = [[], []]
    for step in range(600):
        size = 256 + 16 * (step % 230)
        late = chance.randrange(3)  # so many copies are not through yet
        for pool, events in zip(pools, flying, strict=True):
            for event in events[: len(events) - late]:
                event.passed = True
            block = pool.take(size)
            events.append(busy(block))
            del block
            gc.collect(0)
            if pool._coming is not None:
                pool._coming.join()
    plain, ahead = (pool.capacity for pool in pools)
    assert ahead <= plain + SLAB  # one block more


def test_what_is_given_back_soon_is_not_made_anew(slow: type[Slow]) -> None:
    pool = HostPool(8 * SLAB, pinned=False, slab=SLAB, ahead=True)
    slow.may.set()
    for _ in range(20):  # each is dropped while a copy still touches it
        block = pool.take(SLAB * 2 // 3)
        event = busy(block)
        del block
        gc.collect()
        if pool._coming is not None:
            pool._coming.join()
        event.passed = True
    assert pool.capacity == 2 * SLAB


def test_blocks_made_faster_than_they_are_copied_do_not_fill_all_memory(slow: type[Slow]) -> None:
    pool = HostPool(64 * SLAB, pinned=False, slab=SLAB, ahead=True)
    slow.may.set()
    events = []
    for _ in range(50):  # no copy is through before somebody waits for it
        block = pool.take(SLAB * 2 // 3)
        events.append(busy(block))
        del block
        gc.collect(0)
        if pool._coming is not None:
            pool._coming.join()
    assert pool.capacity == 3 * SLAB and sum(event.waited for event in events) >= 45


@pytest.mark.parametrize("late", range(8))
def test_blocks_may_be_collected_at_any_moment(late: int) -> None:
    """The collector may run while the pool looks at what was dropped, and drop more."""
    pool = HostPool(1 << 20, pinned=False, slab=SLAB, ahead=True)
    kept = [pool.take(SLAB // 4) for _ in range(40)]
    events = [busy(block) for block in kept]
    kept.clear()
    gc.collect()
    for _ in range(20):
        ring: list[Any] = [pool.take(256)]
        ring.append(ring)  # only the collector frees it
        del ring
        allowed = gc.get_threshold()
        gc.set_threshold(gc.get_count()[0] + 1 + late, *allowed[1:])
        try:
            pool._places(256, pool._waiting())
        finally:
            gc.set_threshold(*allowed)
    assert len(events) == 40 and pool.used
