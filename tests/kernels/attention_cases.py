"""Cases for attention and its definition in fp64, one query at a time: what every backend is held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import djinn_fx.kernels.ops  # noqa: F401 - registers the operators

NAN = float("nan")
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Case:
    q: Tensor
    k_arena: Tensor
    v_arena: Tensor
    rows: Tensor
    positions: Tensor
    lengths: Tensor
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    scale: float = 0.3

    def args(self) -> tuple[object, ...]:
        tensors = (self.q, self.k_arena, self.v_arena, self.rows, self.positions, self.lengths)
        return (*tensors, self.window, self.softcap, self.sinks, self.scale)

    def run(self) -> Tensor:
        out: Tensor = torch.ops.djinn.attention(*self.args())
        return out

    def to(self, device: str, dtype: torch.dtype | None = None) -> Case:
        """The same case on a device; ``dtype`` is for everything but the integers."""
        moved: dict[str, Any] = {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def make_case(
    spans: Sequence[tuple[int, int]],
    *,
    heads: int = 4,
    groups: int = 2,
    depth: int = 16,
    value_depth: int | None = None,
    query: int | None = None,
    dtype: torch.dtype = torch.float32,
    arena_rows: int | None = None,
    arena_positions: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    seed: int = 0,
) -> Case:
    """A step of the spans ``(first, length)``; ``(0, 0)`` is a dead row. Whatever may not be read is NaN.

    A row's data depend on its span and on ``seed`` plus its index, so that a row can be met again elsewhere.
    """
    query = query or max(1, *(length - first for first, length in spans))
    value_depth = value_depth or depth
    size = (arena_rows or len(spans) + 2) + 1, (arena_positions or max(length for _, length in spans) + 3) + 1
    k_arena = torch.full((size[0], groups, size[1], depth), NAN, dtype=dtype)
    v_arena = torch.full((size[0], groups, size[1], value_depth), NAN, dtype=dtype)
    q = torch.full((len(spans), query, heads, depth), NAN, dtype=dtype).transpose(1, 2)
    rows = torch.randperm(size[0] - 1, generator=torch.Generator().manual_seed(seed))[: len(spans)]
    positions = torch.zeros(len(spans), query, dtype=torch.int64)
    for index, (first, length) in enumerate(spans):
        source = torch.Generator().manual_seed(1000 * seed + index)
        row, count = int(rows[index]), length - first
        for arena in (k_arena, v_arena):
            arena[row, :, :length] = torch.randn(groups, length, arena.shape[3], generator=source).to(dtype)
        q[index, :, :count] = torch.randn(heads, count, depth, generator=source).to(dtype)
        positions[index, :count] = torch.arange(first, length)
    sink = torch.linspace(-1.5, 2.0, heads).to(dtype) if sinks else None
    lengths = torch.tensor([length for _, length in spans])
    return Case(q, k_arena, v_arena, rows, positions, lengths, window, softcap, sink, depth**-0.5)


def alone(case: Case, index: int, *, arena_rows: int, arena_positions: int, row: int, query: int) -> Case:
    """One row of ``case`` as a batch by itself, in another arena of NaN and with another number of pads."""
    old, length = int(case.rows[index]), int(case.lengths[index])
    count = length - int(case.positions[index, 0])

    def move(arena: Tensor) -> Tensor:
        new = arena.new_full((arena_rows + 1, arena.shape[1], arena_positions + 1, arena.shape[3]), NAN)
        new[row, :, :length] = arena[old, :, :length]
        return new

    q = case.q.new_full((1, case.q.shape[1], query, case.q.shape[3]), NAN)
    q[0, :, :count] = case.q[index, :, :count]
    positions = case.positions.new_zeros(1, query)
    positions[0, :count] = case.positions[index, :count]
    return replace(
        case,
        q=q,
        k_arena=move(case.k_arena),
        v_arena=move(case.v_arena),
        rows=case.rows.new_tensor([row]),
        positions=positions,
        lengths=case.lengths[index : index + 1],
    )


def reference(case: Case) -> Tensor:
    """The definition, in fp64 on the CPU: ``[B, T, H, Dv]``."""
    case = case.to("cpu", torch.float64)
    batch, heads, query, _ = case.q.shape
    share = heads // case.k_arena.shape[1]
    sinks = torch.full((heads,), -math.inf).double() if case.sinks is None else case.sinks
    out = torch.zeros(batch, query, heads, case.v_arena.shape[3], dtype=torch.float64)
    for b in range(batch):
        row, first, length = int(case.rows[b]), int(case.positions[b, 0]), int(case.lengths[b])
        for t in range(length - first):
            last = int(case.positions[b, t])
            low = 0 if case.window is None else max(0, last - case.window + 1)
            keys, values = (
                arena[row, :, low : last + 1].repeat_interleave(share, 0) for arena in (case.k_arena, case.v_arena)
            )
            logits = (keys * case.q[b, :, t, None]).sum(-1) * case.scale
            if case.softcap is not None:
                logits = case.softcap * torch.tanh(logits / case.softcap)
            peak = torch.maximum(logits.amax(-1), sinks)[:, None]
            shares = (logits - peak).exp()
            shares = shares / (shares.sum(-1, keepdim=True) + (sinks[:, None] - peak).exp())
            out[b, t] = (shares[:, :, None] * values).sum(1)
    return out


def on_poison(kernel: Callable[..., Tensor], case: Case, **options: Any) -> Tensor:
    """What a kernel makes of a case where fresh memory is NaN, which it is in torch's deterministic mode."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=case.q.device).isnan().all()
        out = kernel(*case.args(), **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.is_contiguous()
    assert out.dtype == case.q.dtype
    return out


def permuted(case: Case, order: Tensor) -> Case:
    """The same rows at other places of the batch."""
    return replace(
        case,
        q=case.q[order],
        rows=case.rows[order],
        positions=case.positions[order],
        lengths=case.lengths[order],
    )


def bits(tensor: Tensor) -> Tensor:
    """A floating-point tensor as integers: equal only if every bit is."""
    return tensor.contiguous().view(INTEGERS[tensor.itemsize])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))
