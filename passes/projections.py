"""Pass: linear layers of the same few rows are computed together, by ``djinn::linears``.

In a decode step a linear layer is the reading of its weight, and the small ones are over before they
fill a GPU. Layers that read the same value need nothing of one another, so one call computes them at
the place of the first. The weights stay where the model has them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

import djinn_fx.kernels.ops  # noqa: F401 - registers djinn::linears
from djinn_fx.kernels.linear import MOST_ROWS, MOST_WEIGHTS
from djinn_fx.passes.context import PassContext
from djinn_fx.passes.graph import MODULE, NAMES, WEIGHT, Emitter, aten, compute_nodes, shape_of, tensor_of

LINEARS = torch.ops.djinn.linears.default


@dataclass(frozen=True)
class Projection:
    """A linear layer in a graph.

    Attributes:
        node: the op whose result is the layer's.
        x: its input, ``[..., K]``.
        weight: the placeholder of a weight ``[N, K]``, or ``[K, N]`` if ``transposed``.
        bias: the placeholder of a weight ``[N]``, or None.
        transposed: the weight's layout.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool


def projections(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Replace the linear layers of a step of at most :data:`MOST_ROWS` tokens.

    A result takes over its layer's metadata. Where a layer is computed earlier than it stood, a view at
    the old place does, so that the sites of the graph keep their order.
    """
    if ctx.kind != "lm" or ctx.shape.rows * ctx.shape.query > MOST_ROWS:
        return gm
    for group in groups(gm):
        _together(gm, group)
    return gm


def groups(gm: fx.GraphModule) -> list[tuple[Projection, ...]]:
    """The linear layers that one call can compute, in the order of their first ones."""
    found: dict[tuple[fx.Node, bool], list[Projection]] = {}
    for node in compute_nodes(gm):
        layer = projection(node)
        if layer is not None:
            found.setdefault((layer.x, layer.transposed), []).append(layer)
    return [
        tuple(layers[start : start + MOST_WEIGHTS])
        for layers in found.values()
        for start in range(0, len(layers), MOST_WEIGHTS)
    ]


def projection(node: fx.Node) -> Projection | None:
    """The linear layer that ``node`` is, if its weight and bias are the model's own."""
    args: Sequence[object] = node.args
    if node.target is aten.linear.default:
        x, weight, bias = (*args, None)[:3]
    elif node.target is aten.addmm.default:
        bias, x, weight = args
    elif node.target is aten.mm.default:
        x, weight, bias = *args, None
    else:
        return None
    transposed = node.target is not aten.linear.default
    if node.kwargs or not isinstance(x, fx.Node) or not _is_weight(weight, 2):
        return None
    assert isinstance(weight, fx.Node)
    width, depth = reversed(shape_of(weight)) if transposed else shape_of(weight)
    if bias is not None and not (_is_weight(bias, 1) and isinstance(bias, fx.Node) and shape_of(bias) == (width,)):
        return None
    value, parameter = tensor_of(x), tensor_of(weight)
    if value is None or parameter is None or value.dtype != parameter.dtype or not value.dtype.is_floating_point:
        return None
    if not 0 < value.numel() <= MOST_ROWS * depth:
        return None
    return Projection(node, x, weight, bias if isinstance(bias, fx.Node) else None, transposed)


def _is_weight(node: object, dims: int) -> bool:
    return isinstance(node, fx.Node) and WEIGHT in node.meta and len(shape_of(node)) == dims


def _together(gm: fx.GraphModule, group: Sequence[Projection]) -> None:
    """Compute the layers of a group by one call, at the place of the first."""
    # What they read may have been a layer too, and is a result of a call by now.
    group = [layer for layer in (projection(layer.node) for layer in group) if layer is not None]
    first = group[0]
    emit = Emitter(gm, first.node, first.node.meta[MODULE])
    call = emit(
        LINEARS,
        first.x,
        [layer.weight for layer in group],
        [layer.bias for layer in group],
        [layer.transposed for layer in group],
    )
    items = [emit(operator.getitem, call, index) for index in range(len(group))]
    for layer, item in zip(group, items, strict=True):
        if layer is not first and layer.node.meta[NAMES]:
            item.meta[MODULE] = layer.node.meta[MODULE]
            item = Emitter(gm, layer.node, layer.node.meta[MODULE])(aten.view.default, item, list(shape_of(item)))
        item.meta = {**layer.node.meta, "val": item.meta["val"]}
        layer.node.replace_all_uses_with(item)
        gm.graph.erase_node(layer.node)
