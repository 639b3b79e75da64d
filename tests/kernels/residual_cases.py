"""Calls of ``djinn::linear_residual``, and what they must answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from djinn_fx.kernels.linear import Into
from tests.bits import assert_same_bits
from tests.kernels.linear_cases import make_call

#: What a call may join with, from the residual alone to everything.
LEVELS = (1, 2, 3)


def make_into(rows: int, width: int, level: int, *, dtype: torch.dtype, device: str = "cpu") -> Into:
    """A residual ``[rows, 1, width]``; every second row is edited, every third injected into."""
    residual = torch.randn(rows, 1, width, dtype=dtype, device=device)
    each = torch.arange(rows, device=device).view(rows, 1, 1)
    tables: list[Tensor | None] = [None] * 5
    if level > 1:
        tables[:3] = [each % 2 == 0, *(torch.randn(rows, 1, width, device=device) for _ in range(2))]
    if level > 2:
        tables[3:] = [each % 3 == 1, torch.randn_like(residual)]
    act, scale, add, inject, tap = tables
    return Into(residual, act, scale, add, inject, tap)


def joined(made: Tensor, into: Into) -> Tensor:
    """What the ops of a graph make of a layer's result."""
    value = into.residual + made
    if into.act is not None and into.scale is not None and into.add is not None:
        scaled = (value.float() * into.scale).to(value.dtype)
        value = torch.where(into.act, (scaled.float() + into.add).to(value.dtype), value)
    if into.inject is not None and into.tap is not None:
        value = torch.where(into.inject, into.tap, value)
    return value


def check_levels(
    linear_residual: Callable[..., Tensor],
    linears: Callable[..., list[Tensor]],
    rows: int,
    depth: int,
    width: int,
    **options: Any,
) -> Iterator[None]:
    """Whatever it is joined with, a layer has the bits that ``linears`` gives it; yields once per level.

    ``x`` is ``[rows, K]``, as some models have it, and the residual ``[rows, 1, N]``.
    """
    x, weights, biases, layouts = make_call(rows, depth, [width], biased=True, **options)
    made = linears(x, weights, biases, layouts)[0]
    for level in LEVELS:
        into = make_into(rows, width, level, dtype=x.dtype, device=x.device.type)
        wanted = joined(made.view(into.residual.shape), into)
        soon = [torch.randn(rows, 2, width, device=x.device) for _ in range(2)] if level == 2 else []
        given = (into.act, into.scale, into.add, into.inject, into.tap, soon)
        found = linear_residual(x[:, 0], weights[0], biases[0], layouts[0], into.residual, *given)
        assert_same_bits(found, wanted)
        assert found.is_contiguous()
        assert found.shape == into.residual.shape
        yield
