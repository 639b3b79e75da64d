"""Attention over the arena: the torch implementation of ``djinn::attention``, row by row.

Each batch row is computed by itself over its own valid prefix, in blocks of queries counted from
the step's first, so that neither the batch nor the arena can reach a row's bits. The lengths are
read on the host: on a GPU this waits for the device and cannot be part of a CUDA graph.

Matrix kernels may choose their order of summation by the address of an operand (seen with MKL's
matrix-vector product), so operands start at addresses that only the row's own shape decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from djinn_fx.errors import InternalError

#: Queries computed together: bounds the memory of the logits and spares a block the later keys.
QUERY_BLOCK = 128

#: Bytes to which torch's CPU allocator aligns, and the widest vector that a matrix kernel loads.
ALIGNMENT = 64


def attention(
    q: Tensor,
    k_arena: Tensor,
    v_arena: Tensor,
    rows: Tensor,
    positions: Tensor,
    lengths: Tensor,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    scale: float,
) -> Tensor:
    """See :class:`djinn_fx.kernels.signatures.Attention`.

    Raises:
        InternalError: a length reaches the arena's spare position.
    """
    batch, heads, width, _ = q.shape
    room = k_arena.shape[2] - 1
    wide = torch.promote_types(q.dtype, torch.float32)
    sinks = None if sinks is None else sinks.to(wide)
    masks: dict[tuple[int, int], _Mask] = {}  # rows of one length share them
    out = q.new_zeros(batch, width, heads, v_arena.shape[3])
    table = torch.stack((rows, positions[:, 0], lengths)).tolist()  # the one read on the host
    for index, (row, first, length) in enumerate(zip(*table, strict=True)):
        if length > room:
            raise InternalError(f"attention: batch row {index} has {length} of {room} positions.")
        if first >= length:
            continue  # a dead row
        base = _oldest(first, window)
        k = _operand(_part(k_arena.select(0, row), 1, base, length - base), wide)
        v = _operand(_part(v_arena.select(0, row), 1, base, length - base), wide)
        for start in range(first, length, QUERY_BLOCK):
            count = min(QUERY_BLOCK, length - start)
            low = _oldest(start, window) - base
            keys = start + count - base - low
            block = _part(q.select(0, index), 1, start - first, count)
            if count > 1 and (count, keys) not in masks:
                masks[count, keys] = _Mask.of(count, keys, window, wide, q.device)
            found = _attend(
                (block.to(wide) * scale).contiguous(),
                _part(k, 1, low, keys),
                _part(v, 1, low, keys),
                masks.get((count, keys)),
                softcap,
                sinks,
            )
            _part(out.select(0, index), 0, start - first, count).copy_(found)
    return out


def _oldest(position: int, window: int | None) -> int:
    """The first position that a query at ``position`` sees."""
    return 0 if window is None else max(0, position - window + 1)


def _part(tensor: Tensor, axis: int, start: int, count: int) -> Tensor:
    """``tensor.narrow``; what is whole anyway, as all parts of a decode step are, stays as it is."""
    return tensor if count == tensor.shape[axis] else tensor.narrow(axis, start, count)


def _operand(view: Tensor, dtype: torch.dtype) -> Tensor:
    """``view`` ``[Hkv, m, D]`` of an arena in ``dtype``, laid out alike wherever it lies.

    A CPU view whose every row starts at an aligned address is read in place: its bits are those
    of its copy. Every other view is copied.
    """
    if view.dtype == dtype and view.is_cpu:
        head, position, step = (stride * view.itemsize for stride in view.stride())
        starts = view.data_ptr() | head | position  # their low bits, all zero if all are aligned
        if starts % ALIGNMENT == 0 and step == view.itemsize:
            return view
    return view.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: _Mask | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of the last ``n`` of ``m`` consecutive positions.

    Args:
        q: ``[H, n, D]``, contiguous, already scaled.
        k: ``[Hkv, m, D]``.
        v: ``[Hkv, m, Dv]``.
        mask: what the queries must not see; None for one query, which sees everything.
        softcap: see :class:`djinn_fx.kernels.signatures.Attention`.
        sinks: likewise.

    Returns:
        ``[n, H, Dv]``, not contiguous.
    """
    heads, n, depth = q.shape
    groups, m, _ = k.shape
    logits = torch.bmm(q.view(groups, -1, depth), k.transpose(1, 2)).view(heads, n, m)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        mask.apply(logits)
    weights = _softmax(logits, sinks).reshape(groups, -1, m)
    return _mix(weights, v, None if mask is None else mask.hidden).view(heads, n, -1).transpose(0, 1)


@dataclass(frozen=True)
class _Mask:
    """Which of ``m`` keys the queries at the last ``n`` positions must not see.

    Attributes:
        hidden: bool ``[n, m]``.
        bias: -inf where hidden, else 0, ``[n, m]``.
        newest: the last key that the first query sees.
        oldest: the first one that it sees, negative where that is before all keys; None: all up to the last.
    """

    hidden: Tensor
    bias: Tensor
    newest: int
    oldest: int | None

    @staticmethod
    def of(n: int, m: int, window: int | None, dtype: torch.dtype, device: torch.device) -> _Mask:
        """The mask of ``n`` queries over ``m`` keys."""
        age = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
        hidden = age < 0 if window is None else (age < 0) | (age >= window)
        bias = torch.zeros(n, m, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        return _Mask(hidden, bias, m - n, None if window is None else m - n - window + 1)

    def apply(self, logits: Tensor) -> None:
        """Put -inf in the place of what is hidden in ``[H, n, m]``, whatever is there.

        Cutting triangles off and adding takes a quarter of the time of ``masked_fill_`` on a CPU.
        """
        logits.tril_(self.newest)
        if self.oldest is not None:
            logits.triu_(self.oldest)
        logits.add_(self.bias)


def _softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the keys of ``[H, n, m]``, with the sinks ``[H]`` in its denominator."""
    if sinks is None:
        return logits.softmax(-1)
    column = sinks[:, None, None].expand(-1, logits.shape[1], 1)
    return torch.cat((logits, column), dim=-1).softmax(-1)[..., :-1]


def _mix(weights: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    """Weighted sums of the values: weights ``[Hkv, G * n, m]``, v ``[Hkv, m, Dv]``.

    A hidden key has weight 0, but 0 times Inf is NaN: a value that is not finite would reach the
    queries before it. Where that happened, such values are added for the queries that see them.
    """
    out = torch.bmm(weights, v)
    # One pass instead of five: a sum is not finite where something in it is not (or, harmlessly, where it overflows).
    if hidden is None or bool(out.sum().isfinite()):
        return out
    finite = v.isfinite()
    if bool(finite.all()):
        return out
    out = torch.bmm(weights, v.masked_fill(~finite, 0.0))
    wild = v.masked_fill(finite, 0.0)
    seen = (~hidden).repeat(weights.shape[1] // hidden.shape[0], 1)
    for key in (~finite).any(-1).any(0).nonzero().flatten().tolist():
        share = weights[:, :, key, None] * wild[:, None, key]
        out += torch.where(seen[:, key, None], share, 0.0)
    return out
