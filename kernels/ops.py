"""The operators of the namespace ``djinn``; import registers them.

A captured graph holds these opaque operators. Which implementation answers is decided outside it,
by the device of the tensors: :func:`operators` is the one table of who answers where.

Registrations belong to the process: torch keeps them and this module keeps nothing. A second
import, under another name or by a reload, finds them in place and leaves them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from djinn_fx.errors import InternalError
from djinn_fx.kernels import attention as attention_torch
from djinn_fx.kernels import kv as kv_torch
from djinn_fx.kernels import linear as linear_torch
from djinn_fx.kernels import triton_attention, triton_kv, triton_linear
from djinn_fx.kernels.backend import uses_triton
from djinn_fx.kernels.signatures import (
    ATTENTION,
    KV_WRITE,
    LINEAR_RESIDUAL,
    LINEARS,
    MARK,
    Attention,
    KvWrite,
    LinearResidual,
    Linears,
    Mark,
)

NAMESPACE = "djinn"

Signature = TypeVar("Signature", bound=Callable[..., Any])


@dataclass(frozen=True)
class Operator(Generic[Signature]):
    """An operator to register.

    Attributes:
        name: its name within the namespace.
        schema: arguments, which of them are written, and results, in torch's notation.
        fake: makes results of the right shape, strides and dtype without computing.
        backends: implementation by device type; ``"default"`` answers on every device.
    """

    name: str
    schema: str
    fake: Signature
    backends: Mapping[str, Signature]


def operators(*, triton: bool | None = None) -> tuple[Operator[Any], ...]:
    """Every operator with its backends.

    Args:
        triton: whether CUDA tensors go to the Triton kernels rather than to the torch twins; None
            asks :func:`djinn_fx.kernels.backend.uses_triton`.
    """
    write: dict[str, KvWrite] = {"cpu": kv_torch.kv_write, "cuda": kv_torch.kv_write}
    attend: dict[str, Attention] = {"cpu": attention_torch.attention, "cuda": attention_torch.attention}
    multiply: dict[str, Linears] = {"cpu": linear_torch.linears, "cuda": linear_torch.linears}
    join: dict[str, LinearResidual] = {"cpu": linear_torch.linear_residual, "cuda": linear_torch.linear_residual}
    if uses_triton() if triton is None else triton:
        write["cuda"], attend["cuda"] = triton_kv.kv_write, triton_attention.attention
        multiply["cuda"], join["cuda"] = triton_linear.linears, triton_linear.linear_residual
    return (
        Operator[Mark]("mark", MARK, _fake_mark, {"default": _mark}),
        Operator[KvWrite]("kv_write", KV_WRITE, _fake_kv_write, write),
        Operator[Attention]("attention", ATTENTION, _fake_attention, attend),
        Operator[Linears]("linears", LINEARS, _fake_linears, multiply),
        Operator[LinearResidual]("linear_residual", LINEAR_RESIDUAL, _fake_linear_residual, join),
    )


def register() -> None:
    """Register the operators that this process does not have yet."""
    present = getattr(torch.ops, NAMESPACE)
    for operator in operators():
        if hasattr(present, operator.name):
            continue
        qualified = f"{NAMESPACE}::{operator.name}"
        torch.library.define(qualified, operator.schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(qualified, operator.fake)
        for device, implementation in operator.backends.items():
            torch.library.impl(qualified, device, implementation)


def _mark(x: Tensor, name: str) -> Tensor:
    # An operator's result may not share its argument's storage.
    return x.clone()


def _fake_mark(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


def _fake_kv_write(
    k_arena: Tensor,
    v_arena: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    positions: Tensor,
    lengths: Tensor,
) -> None:
    for part, arena, new in (("k", k_arena, k), ("v", v_arena, v)):
        same = (arena.shape[1], arena.shape[3]) == (new.shape[1], new.shape[3])
        if not same or arena.dtype != new.dtype:
            raise InternalError(
                f"djinn::kv_write: {part} is {new.dtype} {tuple(new.shape)}, which does not fit "
                f"the arena of {arena.dtype} {tuple(arena.shape)}."
            )


def _fake_attention(
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
    batch, heads, width, depth = q.shape
    groups, value_depth = v_arena.shape[1], v_arena.shape[3]
    if heads % groups or depth != k_arena.shape[3]:
        raise InternalError(
            f"djinn::attention: queries {tuple(q.shape)} do not fit the arenas "
            f"{tuple(k_arena.shape)} and {tuple(v_arena.shape)}."
        )
    return q.new_empty(batch, width, heads, value_depth)


def _fake_linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], transposed: Sequence[bool]
) -> list[Tensor]:
    made = []
    for weight, bias, layout in zip(weights, biases, transposed, strict=True):
        depth, width = weight.shape if layout else (weight.shape[1], weight.shape[0])
        fits = x.shape[-1] == depth and (bias is None or tuple(bias.shape) == (width,))
        if not fits or weight.dtype != x.dtype:
            raise InternalError(
                f"djinn::linears: {x.dtype} {tuple(x.shape)} does not fit the weight of {weight.dtype} "
                f"{tuple(weight.shape)}, transposed: {layout}."
            )
        made.append(x.new_empty(*x.shape[:-1], width))
    return made


def _fake_linear_residual(
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
    made = _fake_linears(x, [weight], [bias], [transposed])[0]
    if made.numel() != residual.numel() or made.shape[-1] != residual.shape[-1] or made.dtype != residual.dtype:
        raise InternalError(
            f"djinn::linear_residual: {made.dtype} {tuple(made.shape)} does not fit the residual of "
            f"{residual.dtype} {tuple(residual.shape)}."
        )
    return residual.new_empty(residual.shape)


register()
