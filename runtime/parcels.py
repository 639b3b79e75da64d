"""Parcels: what was sent to host memory, perhaps still on its way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from djinn_fx.errors import CapacityError
from djinn_fx.kernels.rows import RowLayout
from djinn_fx.runtime.pinned import Block, HostPool

#: What one block holds of several begins at multiples of this.
GAP = 64


@dataclass(eq=False)
class Parked:
    """KV of one row in host memory, perhaps still on its way.

    Attributes:
        block: where it lies, packed.
        layout: how.
        length: its positions.
        nbytes: its bytes.
        arrived: passes when it is there; None on the CPU.
    """

    block: Block
    layout: RowLayout
    length: int
    nbytes: int
    arrived: torch.cuda.Event | None = None

    in_memory: ClassVar[bool] = True

    def tensors(self, length: int | None = None) -> list[torch.Tensor]:
        """Keys and values of each layer, ``[heads, length, dim]``, in the order of ``KVArena.env``.

        The host waits until they are there. They are views that nobody may write; they keep the memory.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        found = self.layout.views(self.block.tensor, self.length)
        return found if length is None else [tensor[:, :length] for tensor in found]


@dataclass(eq=False, slots=True)
class Sent:
    """What one checkpoint sent.

    Attributes:
        parked: the KV; None if none was asked for.
        arrived: passes when all of it is there; None on the CPU.
        block: the memory, if a tensor went with the KV.
        place: where it lies in the block: its first byte, dtype and shape.
        kept: the tensor itself, if it needed no copy.
    """

    parked: Parked | None
    arrived: torch.cuda.Event | None = None
    block: Block | None = None
    place: tuple[int, torch.dtype, torch.Size] | None = None
    kept: torch.Tensor | None = None

    @property
    def extra(self) -> torch.Tensor | None:
        """The tensor that went with it, on the host, to be read once it has arrived; None if there was none."""
        if self.block is None or self.place is None:
            return self.kept
        start, dtype, shape = self.place
        return self.block.tensor[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def fetch(tensors: Mapping[str, torch.Tensor], pool: HostPool) -> dict[str, torch.Tensor]:
    """Tensors on the host: those that lie there as they are, the others copied; the host waits for them.

    The copies are views of one block of ``pool``, or where that has no room left, ordinary memory.

    Args:
        tensors: whatever is to come; on a GPU each must be computed already, not just enqueued.
        pool: where the block comes from.
    """
    far = {name: tensor for name, tensor in tensors.items() if not tensor.is_cpu}
    if not far:
        return dict(tensors)
    sizes = [-(-tensor.nbytes // GAP) * GAP for tensor in far.values()]
    try:
        memory = pool.take(sum(sizes)).tensor
    except CapacityError:
        return {name: tensor.cpu() for name, tensor in tensors.items()}
    found, offset = dict(tensors), 0
    stream = torch.cuda.Stream(next(iter(far.values())).device)
    with torch.cuda.stream(stream):
        for (name, tensor), size in zip(far.items(), sizes, strict=True):
            found[name] = memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            found[name].copy_(tensor, non_blocking=True)
            offset += size
    stream.synchronize()
    return found
