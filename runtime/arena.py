"""The KV arena: every session's keys and values, resident on the device, one row a session.

Each layer has two tensors ``[rows + 1, heads, positions + 1, dim]``. The last row and the last position are never read:
dead batch rows and pad tokens write there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from djinn_fx.errors import CapacityError
from djinn_fx.kernels.rows import Rows
from djinn_fx.program import KVSpec, kv_name


class KVArena:
    """Keys and values of all layers, and which rows are free.

    Args:
        specs: what each layer keeps per position.
        rows: number of sessions that fit.
        positions: number of positions per session.
        dtype: dtype of keys and values.
        device: where they live.
    """

    def __init__(
        self, specs: Sequence[KVSpec], rows: int, positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows, self.positions, self.device = rows, positions, device
        shape = (rows + 1, positions + 1)
        with torch.inference_mode(False):  # tensors made in inference mode could not be written outside it
            self.layers = [
                (
                    torch.zeros(shape[0], spec.heads, shape[1], spec.key_dim, dtype=dtype, device=device),
                    torch.zeros(shape[0], spec.heads, shape[1], spec.value_dim, dtype=dtype, device=device),
                )
                for spec in specs
            ]
        self._free = list(range(rows - 1, -1, -1))
        self.env = {
            kv_name(layer, part): tensor
            for layer, pair in enumerate(self.layers)
            for part, tensor in zip("kv", pair, strict=True)
        }
        self.names = tuple(self.env)
        self.packer = Rows(list(self.env.values()))
        self._read: dict[int, torch.cuda.Event] = {}
        self._moving: dict[int, torch.cuda.Event] = {}

    @property
    def free_rows(self) -> int:
        """Number of rows that no session holds."""
        return len(self._free)

    @property
    def spare_row(self) -> int:
        """The row that dead batch rows write to."""
        return self.rows

    @property
    def nbytes(self) -> int:
        """Bytes of all arenas."""
        return sum(k.nbytes + v.nbytes for k, v in self.layers)

    @property
    def bytes_per_position(self) -> int:
        """Bytes that one position of one row takes over all layers."""
        return self.nbytes // ((self.rows + 1) * (self.positions + 1))

    def take(self, count: int = 1) -> list[int]:
        """Take ``count`` rows, all or none.

        Raises:
            CapacityError: fewer are free.
        """
        self.require(count)
        if self._moving:  # a row that a session is still leaving comes last
            self._free.sort(key=lambda row: row not in self._moving or self._moving[row].query())
        return [self._free.pop() for _ in range(count)]

    def require(self, count: int) -> None:
        """Raise :class:`CapacityError` unless ``count`` rows are free."""
        if count > len(self._free):
            raise CapacityError(
                f"{count} KV row(s) needed, {len(self._free)} of {self.rows} free. Close or offload() a session "
                "(dj.sessions lists them) or unpin one: those that are pinned or driven at this moment do not make "
                "room by themselves. Or compile with a larger max_sessions."
            )

    def moving(self, row: int, until: torch.cuda.Event) -> None:
        """Note that another stream fills or clears a row until this event passes: nobody may use it before."""
        self._read.pop(row, None)  # that stream keeps the order itself
        self._moving[row] = until

    @property
    def still(self) -> bool:
        """Whether no row is being filled or cleared by another stream."""
        return not self._moving

    def on_the_way(self, row: int) -> torch.cuda.Event | None:
        """What :meth:`moving` noted of a row, if it has not passed yet."""
        event = self._moving.get(row)
        if event is not None and event.query():
            del self._moving[row]
            return None
        return event

    def arrive(self, row: int) -> None:
        """Before a row is used: the current stream waits until its content has come. The host does not wait."""
        event = self._moving.pop(row, None)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def reading(self, row: int, until: torch.cuda.Event) -> None:
        """Note that another stream reads a row until this event passes."""
        self._read[row] = until

    def settle(self, row: int) -> None:
        """Before something of a row is overwritten: the current stream waits for whoever still reads it.

        The host does not wait. Positions that a row does not have yet may be written without it.
        """
        event = self._read.pop(row, None)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def release(self, row: int) -> None:
        """Zero a row and give it back, so that nothing of its session stays behind."""
        self.arrive(row)
        self.settle(row)
        self.packer.clear(row)
        self._free.append(row)

    def vacated(self, row: int) -> None:
        """Give back a row that was zeroed, or will be by the stream that :meth:`moving` told of."""
        self._free.append(row)

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copy positions ``[0, length)`` of row ``source`` to each target row, on the device."""
        self.packer.copy(source, targets, length)

    def write(self, row: int, tensors: Sequence[torch.Tensor]) -> None:
        """Fill a row from host tensors ``[heads, length, dim]``, ``k, v`` of each layer."""
        for target, source in zip(self.env.values(), tensors, strict=True):
            target[row, :, : source.shape[1]].copy_(source)
