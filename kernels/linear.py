"""Linear layers: the torch side of ``djinn::linears`` and ``linear_residual``, and how the kernels are cut.

A decode step multiplies a few rows with every weight of the model once, so its time is the reading of
the weights. Which kernel reads a weight, and in which tiles, is looked up here: :func:`plan` is a pure
function of sizes and dtype, because its answer decides the order of sums and so the bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: Rows beyond which a product is no longer bound by the reading of its weights.
MOST_ROWS = 64

#: Weights of one call at most.
MOST_WEIGHTS = 4

#: Row counts that kernels exist for; a call's rows are padded to the next one.
BUCKETS = (1, 16, 32, 64)

_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tiles:
    """How a product is cut.

    Attributes:
        rows: rows of the matrix product, those that are not there padded; 1: a reduction instead.
        columns: columns of the result that a program computes; a power of two.
        depth: how much of ``K`` is looked at together; a power of two.
        warps: warps of a program.
        stages: depth of the software pipeline over ``K``.
        splits: into how many runs ``K`` is cut, each a program's; a second kernel adds them up.
        turned: the weights are the first operand of the matrix product, not the second.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    splits: int = 1
    turned: bool = False


@dataclass(frozen=True, eq=False)
class Into:
    """What a linear layer's result is joined with; see :class:`djinn_fx.kernels.signatures.LinearResidual`."""

    residual: Tensor
    act: Tensor | None = None
    scale: Tensor | None = None
    add: Tensor | None = None
    inject: Tensor | None = None
    tap: Tensor | None = None
    soon: tuple[Tensor, ...] = ()


def linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], transposed: Sequence[bool]
) -> list[Tensor]:
    """See :class:`djinn_fx.kernels.signatures.Linears`; one call of torch's own per weight."""
    return [_linear(x, *each) for each in zip(weights, biases, transposed, strict=True)]


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    residual: Tensor,
    act: Tensor | None,
    scale: Tensor | None,
    add: Tensor | None,
    inject: Tensor | None,
    tap: Tensor | None,
    soon: Sequence[Tensor],
) -> Tensor:
    """See :class:`djinn_fx.kernels.signatures.LinearResidual`; step by step, as the ops of a graph do it."""
    value = residual + _linear(x, weight, bias, transposed).view(residual.shape)
    if act is not None and scale is not None and add is not None:
        scaled = (value.to(scale.dtype) * scale).to(value.dtype)
        value = torch.where(act, (scaled.to(add.dtype) + add).to(value.dtype), value)
    if inject is not None and tap is not None:
        value = torch.where(inject, tap, value)
    return value.contiguous()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """``[..., K]`` times ``[N, K]``, or ``[K, N]`` if ``transposed``: ``[..., N]``, contiguous."""
    if not transposed:
        out = F.linear(x, weight, bias)
    else:
        flat = x.reshape(-1, x.shape[-1])
        made = torch.mm(flat, weight) if bias is None else torch.addmm(bias, flat, weight)
        out = made.view(*x.shape[:-1], weight.shape[1])
    return out.contiguous()


def bucket(rows: int) -> int:
    """The least of :data:`BUCKETS` that is not below ``rows``, which is at most :data:`MOST_ROWS`."""
    return next(size for size in BUCKETS if size >= rows)


def plan(rows: int, depth: int, widths: Sequence[int], transposed: bool, dtype: torch.dtype) -> Tiles | None:
    """How the kernels compute linear layers of one layout; None: torch does.

    Args:
        rows: rows of the input, all leading dimensions taken together.
        depth: ``K``.
        widths: ``N`` of each weight.
        transposed: whether the weights are ``[K, N]``.
        dtype: of input, weights and result.
    """
    if dtype not in _HALVES or not 1 <= rows <= MOST_ROWS or len(widths) > MOST_WEIGHTS:
        return None
    # Rows of a weight then begin at multiples of 16 bytes.
    even = [depth, *widths] if transposed else [depth]
    if min(depth, *widths) < 16 or any(size % 8 for size in even):
        return None
    if transposed and depth * max(widths) >= 2**31:
        return None
    return _tiles(bucket(rows), depth, sum(widths), transposed)


def _tiles(rows: int, depth: int, width: int, transposed: bool) -> Tiles:
    """The cut that was fastest on an H200 (``benchmarks/linear_speed.py``).

    Args:
        rows: one of :data:`BUCKETS`.
        depth: ``K``.
        width: columns of all weights together.
        transposed: whether the weights are ``[K, N]``.
    """
    if rows == 1 and not transposed:
        if depth < 2048 or width > 2**16:
            return Tiles(1, columns=4, depth=256, warps=1, stages=1)
        if width <= 4096:
            return Tiles(1, columns=4, depth=1024, warps=4, stages=1)
        if width <= 8192:
            return Tiles(1, columns=4, depth=512, warps=2, stages=1)
        return Tiles(1, columns=2, depth=1024, warps=4, stages=1)
    if rows == 1 and depth <= 1024 and width <= 1024:
        return Tiles(1, columns=32, depth=256, warps=8, stages=1, splits=4)
    # Reducing columns that lie side by side costs more than a matrix product of 16 rows.
    rows = max(rows, 16)
    splits = _splits(rows, depth, width)
    if width > 8192 and depth >= 2048:
        return _wide(rows, width)
    if rows == 64:
        narrow = depth <= 4096 and width <= 4096
        deep = 6 if splits == 1 else 4
        if narrow:
            return Tiles(64, columns=32, depth=128, warps=4, stages=deep, splits=splits)
        if depth > 4096:
            return Tiles(64, columns=64, depth=128, warps=4, stages=4, splits=splits)
        if width <= 8192:
            return Tiles(64, columns=64, depth=128, warps=4, stages=5, turned=True)
        return Tiles(64, columns=128, depth=128, warps=4, stages=4)
    if splits > 1 or width > 8192:
        return Tiles(rows, columns=64, depth=128, warps=4, stages=4, splits=splits, turned=True)
    return Tiles(rows, columns=64, depth=128, warps=4, stages=6 if depth >= 2048 else 5, turned=True)


def _wide(rows: int, width: int) -> Tiles:
    """Cuts of many columns, where every program is one of many waves."""
    if rows == 16:
        return Tiles(16, columns=128, depth=128, warps=8, stages=3, turned=True)
    if rows == 64:
        return Tiles(64, columns=128, depth=128, warps=4, stages=4)
    if width > 2**16:
        return Tiles(32, columns=128, depth=128, warps=4, stages=3)
    return Tiles(32, columns=64, depth=128, warps=4, stages=4, turned=True)


def _splits(rows: int, depth: int, width: int) -> int:
    """Into how many runs to cut ``K`` where the columns alone do not fill a GPU."""
    if width > 8192:
        return 1
    if depth > 4096:
        return {16: 3, 32: 4, 64: 2}[rows]
    if width <= 1536:
        return min(4 if rows == 64 else 8, max(1, depth // 256))
    return 2 if width < 3072 and rows < 64 and depth >= 512 else 1


def kernel_choices(
    rows: int, depth: int, widths: Sequence[int], transposed: Sequence[bool], dtype: torch.dtype
) -> tuple[str, ...]:
    """What computes each linear layer of a call on a GPU, in words that are equal where the bits are.

    Args:
        rows: rows of the input.
        depth: ``K``.
        widths: ``N`` of each weight.
        transposed: whether each weight is ``[K, N]``.
        dtype: of input, weights and result.
    """
    found = []
    for layout in transposed:
        cut = plan(rows, depth, [n for n, t in zip(widths, transposed, strict=True) if t == layout], layout, dtype)
        found.append("torch" if cut is None else str(cut))
    return tuple(found)
