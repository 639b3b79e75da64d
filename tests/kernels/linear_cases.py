"""Calls of ``djinn::linears``, and what they must answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Linears = Callable[..., list[Tensor]]
Call = tuple[Tensor, list[Tensor], list[Tensor | None], list[bool]]


def make_call(
    rows: int,
    depth: int,
    widths: Sequence[int],
    *,
    transposed: bool | Sequence[bool] = False,
    biased: bool | Sequence[bool] = False,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> Call:
    """Random arguments of a call, with an input ``[rows, 1, K]``."""
    layouts = [transposed] * len(widths) if isinstance(transposed, bool) else list(transposed)
    flags = [biased] * len(widths) if isinstance(biased, bool) else list(biased)
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    x = torch.randn(rows, 1, depth, **options)
    weights = [
        torch.randn(*((depth, n) if layout else (n, depth)), **options)
        for n, layout in zip(widths, layouts, strict=True)
    ]
    biases = [torch.randn(n, **options) if flag else None for n, flag in zip(widths, flags, strict=True)]
    return x, weights, biases, layouts


def exact(call: Call) -> list[Tensor]:
    """The answer in fp64."""
    x, weights, biases, layouts = call
    found = []
    for weight, bias, layout in zip(weights, biases, layouts, strict=True):
        out = x.double() @ (weight if layout else weight.t()).double()
        found.append(out if bias is None else out + bias.double())
    return found


def check_close(call: Call, found: Sequence[Tensor], *, units: float = 0.5) -> None:
    """Rounding by at most so many units in the last place, and the error of so many products.

    Matrix units cut their sums off below fp32: over 14,336 products an H100 was off by more than four units of it.
    """
    x, weights, _, _ = call
    for out, wanted, weight in zip(found, exact(call), weights, strict=True):
        assert out.dtype == x.dtype
        assert out.shape == wanted.shape
        assert out.is_contiguous()
        noise = torch.finfo(torch.float32).eps * x.shape[-1] ** 0.5 * 16 * float(weight.abs().max() * x.abs().max())
        allowed = wanted.abs() * torch.finfo(x.dtype).eps * units + noise
        assert bool(((out.double() - wanted).abs() <= allowed).all())
