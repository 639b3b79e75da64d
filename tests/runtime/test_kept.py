"""Values on their way to the host: blocks of a bounded pool, used again, and ordinary memory where it is full."""

from __future__ import annotations

import pytest
import torch

from djinn_fx.runtime.kept import PIECE, SMALL, block_for, sending
from djinn_fx.runtime.pinned import HostPool


def test_values_of_some_size_get_blocks_while_the_pool_has_room() -> None:
    pool = HostPool(2 * SMALL, pinned=False, slab=SMALL)
    value = torch.zeros(SMALL // 4)
    assert block_for(value[1:], pool) is None  # too small
    one, two = block_for(value, pool), block_for(value, pool)
    assert one is not None and two is not None and block_for(value, pool) is None
    place = one.tensor.data_ptr()
    held = one.tensor.view(torch.float32)[3:]
    del one
    assert block_for(value, pool) is None  # a view holds it
    del held
    again = block_for(value, pool)
    assert again is not None and again.tensor.data_ptr() == place


@pytest.mark.gpu
@pytest.mark.parametrize("room", [0, 2 << 20, 64 << 20])
def test_large_values_reach_the_host_whatever_comes_after(room: int) -> None:
    pool = HostPool(room, pinned=True, slab=2 << 20)
    source = torch.device("cuda", torch.cuda.current_device())
    for _ in range(3):  # blocks are used again
        found = []
        with sending("cpu", torch.float16, source, pool) as send:
            for count in range(6):
                value = torch.full((1024, 1024), float(count), device=source)
                found.append(send(value))
                value.fill_(-1.0)  # later on the same stream
                del value
            values = [there() for there in found]
        assert all(value.is_cpu and value.dtype == torch.float16 for value in values)
        assert [set(value.unique().tolist()) for value in values] == [{float(count)} for count in range(6)]
        assert sum(value.is_pinned() for value in values) == min(6, room // (2 << 20))
        del values, found
    assert pool.used == 0


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7), (3, PIECE // 8 + 1)])
def test_a_value_goes_to_ordinary_memory_in_pieces(shape: tuple[int, ...]) -> None:
    source = torch.device("cuda", torch.cuda.current_device())
    value = torch.rand(shape, device=source)
    with sending("cpu", None, source, HostPool(0, pinned=True)) as send:
        there = send(value)()
    assert there.is_cpu and not there.is_pinned() and torch.equal(there, value.cpu())
