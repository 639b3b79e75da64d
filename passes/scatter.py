"""How a value is written back through a view: for each view op, the op that undoes it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from djinn_fx.passes.graph import LISTS, aten, shape_of

Emit = Callable[..., fx.Node]

#: Views that keep the order of the elements: a view back undoes them.
_ORDERED = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.unsqueeze.default,
        aten.contiguous.default,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.alias.default,
        aten.detach.default,
    }
)


def scattered(view: fx.Node, base: Any, value: fx.Node, emit: Emit) -> fx.Node | None:
    """The value of ``base`` after ``value`` was written to the view of it that ``view`` makes.

    Args:
        view: the node that makes the view; its own first argument is not looked at.
        base: the node that the view is of (a list of views where ``view`` is a ``getitem``).
        value: what the view holds now.
        emit: adds a call.

    Returns:
        The node, or None if there is no known way back.
    """
    target, rest = view.target, list(view.args[1:])
    if target in LISTS:
        return value
    if target in _ORDERED:
        return emit(aten.reshape.default, value, list(shape_of(base)))
    if target is aten.transpose.int:
        return emit(aten.transpose.int, value, rest[0], rest[1])
    if target is aten.t.default:
        return emit(aten.t.default, value)
    if target is aten.permute.default:
        rank = len(shape_of(base))
        order = [int(dim) % rank for dim in rest[0]]  # type: ignore[union-attr, arg-type]
        return emit(aten.permute.default, value, [order.index(dim) for dim in range(rank)])
    if target is aten.slice.Tensor:
        return emit(aten.slice_scatter.default, base, value, *rest)
    if target is aten.select.int:
        return emit(aten.select_scatter.default, base, value, *rest)
    if target is operator.getitem:
        return _scattered_item(view, base, value, emit)
    return None


def _scattered_item(view: fx.Node, parts: fx.Node, value: fx.Node, emit: Emit) -> fx.Node | None:
    """Write one item of a split, chunk or unbind back: the list stands for its own base."""
    index = view.args[1]
    base = parts.args[0]
    assert isinstance(index, int)
    assert isinstance(base, fx.Node)
    if parts.target is aten.unbind.int:
        dim = parts.args[1] if len(parts.args) > 1 else 0
        return emit(aten.select_scatter.default, base, value, dim, index)
    dim = parts.args[2] if len(parts.args) > 2 else parts.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    sizes = [int(item.shape[dim]) for item in parts.meta["val"]]
    start = sum(sizes[:index])
    return emit(aten.slice_scatter.default, base, value, dim, start, start + sizes[index])
