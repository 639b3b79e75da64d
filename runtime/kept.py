"""Values of a site that a pass over a batch of prompts left behind, and their way to the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from djinn_fx.errors import CapacityError
from djinn_fx.runtime.pinned import Block, HostPool


@dataclass
class Kept:
    """A site's values of a batch, chunk by chunk.

    Attributes:
        chunks: of each chunk the whole value ``[batch rows, query, *feature_shape]``, and how many tokens of it each
            prompt has. Nobody writes into it any more.
    """

    chunks: list[tuple[torch.Tensor, list[int]]] = field(default_factory=list)

    def rows(self) -> list[torch.Tensor]:
        """The value of each prompt, ``[tokens, *feature_shape]``; views where a prompt is one chunk."""
        parts: list[list[torch.Tensor]] = [[] for _ in self.chunks[0][1]]
        for value, counts in self.chunks:
            for index, count in enumerate(counts):
                if count:
                    parts[index].append(value[index, :count])
        return [found[0] if len(found) == 1 else torch.cat(found) for found in parts]

    def whole(self, taken: set[int]) -> torch.Tensor | None:
        """The value of all prompts as the pass left it, if it is just that and nobody else has a part of it.

        Args:
            taken: addresses of memory that somebody has; what is handed out is added.
        """
        value, counts = self.chunks[0]
        if len(self.chunks) > 1 or list(value.shape[:2]) != [len(counts), counts[0]] or len(set(counts)) > 1:
            return None
        if len(counts) == 1:
            return None  # a copy costs little, and a module might have returned a table of its own
        memory = value.untyped_storage()
        if memory.nbytes() != value.nbytes or not value.is_contiguous() or memory.data_ptr() in taken:
            return None
        taken.add(memory.data_ptr())
        return value


#: Begins to move a value to where it is wanted, and returns what gives it there.
Send = Callable[[torch.Tensor], Callable[[], torch.Tensor]]

#: Smaller values go to memory of their own: pinning any costs more than they do.
SMALL = 1 << 20

#: Bytes in which host memory for values is pinned, and of a piece of a value that goes to ordinary memory.
SLAB, PIECE = 128 << 20, 32 << 20


@contextmanager
def sending(
    target: torch.device | str | None, dtype: torch.dtype | None, source: torch.device, pool: HostPool
) -> Iterator[Send]:
    """While entered, values are moved to a device and to a dtype.

    From a GPU to the host that goes on beside the work that follows, on a stream of its own. Values go straight into
    blocks of ``pool``, which belong to whoever holds a value: fresh pages of the host take ten times as long as the
    bus. Where the pool has no room a thread copies to ordinary memory, since such a copy holds up whoever asks for it.
    """
    if source.type != "cuda" or target is None or torch.device(target).type != "cpu":

        def now(value: torch.Tensor) -> Callable[[], torch.Tensor]:
            moved = value.to(target, dtype)
            return lambda: moved

        yield now
        return
    stream = torch.cuda.Stream(source)
    with ThreadPoolExecutor(1, "djinn-values") as courier:

        def later(value: torch.Tensor) -> Callable[[], torch.Tensor]:
            there = value.to(dtype=dtype).contiguous()
            ready = torch.cuda.current_stream(source).record_event()
            block = block_for(there, pool)
            if block is None:
                return courier.submit(_to_host, there, ready, stream).result
            return _land(there, block, ready, stream)

        yield later


def block_for(value: torch.Tensor, pool: HostPool) -> Block | None:
    """A block of the pool for a value; None where it is not worth one, or where there is none."""
    if value.nbytes < SMALL:
        return None
    try:
        return pool.take(value.nbytes)
    except CapacityError:
        return None


def _land(
    value: torch.Tensor, block: Block, ready: torch.cuda.Event, stream: torch.cuda.Stream
) -> Callable[[], torch.Tensor]:
    """Begin to copy a value into a block once it is computed; nobody waits before it is asked for."""
    there = block.tensor.view(value.dtype).view(value.shape)
    with torch.cuda.stream(stream):
        stream.wait_event(ready)
        there.copy_(value, non_blocking=True)
        arrived = stream.record_event()
    value.record_stream(stream)  # its memory on the device is nobody else's before
    block.busy_until(arrived)

    def landed() -> torch.Tensor:
        arrived.synchronize()
        return there

    return landed


def _to_host(value: torch.Tensor, ready: torch.cuda.Event, stream: torch.cuda.Stream) -> torch.Tensor:
    """Copy a value to ordinary memory once it is computed; it is there when this returns.

    It goes piece by piece through pinned memory, which torch keeps: the bus fills that in no time, and fresh pages are
    then filled by many threads instead of the driver's one.
    """
    there = torch.empty(value.shape, dtype=value.dtype)
    source, target = value.view(-1), there.view(-1)
    most = PIECE // value.itemsize
    with torch.cuda.stream(stream):
        stream.wait_event(ready)
        staged = torch.empty(min(most, source.numel()), dtype=value.dtype, pin_memory=True)
        for start in range(0, source.numel(), most):
            piece = source[start : start + most]
            pinned = staged[: piece.numel()].copy_(piece, non_blocking=True)
            stream.synchronize()
            target[start : start + most] = pinned
    return there
