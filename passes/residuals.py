"""Pass: a linear layer, and the residual that its result is added to, become one ``djinn::linear_residual``.

What is behind a block's last layer costs a kernel of its own, in which one multiprocessor per row reads the residual,
the edits of the site and its tap. The kernel of the layer has all multiprocessors, and writes that very sum.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

import djinn_fx.kernels.ops  # noqa: F401 - registers djinn::linear_residual
from djinn_fx.kernels.linear import MOST_ROWS
from djinn_fx.passes.context import PassContext
from djinn_fx.passes.graph import MODULE, NAMES, RESHAPES, Emitter, aten, compute_nodes, shape_of, tensor_of, val
from djinn_fx.passes.projections import LINEARS

LINEAR_RESIDUAL = torch.ops.djinn.linear_residual.default


def residuals(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Join the layers of a decode step with their residuals.

    The new op takes over the sum's metadata. A layer whose own value is a chosen site stays.
    """
    if ctx.kind != "lm" or ctx.shape.query != 1 or ctx.shape.rows > MOST_ROWS:
        return gm
    chosen = frozenset(site.name for site in ctx.sites)
    for node in list(compute_nodes(gm)):
        if node.target is aten.add.Tensor:
            _join(gm, node, chosen)
    return gm


def _join(gm: fx.GraphModule, total: fx.Node, chosen: frozenset[str]) -> None:
    """Replace a sum by one op, if an addend is the result of a layer that nobody else reads."""
    if total.kwargs or len(total.args) != 2:
        return
    for layer, residual in (total.args, total.args[::-1]):
        call = _layer(layer, chosen)
        if call is None or layer is residual or not _fits(total, layer, residual, call):
            continue
        x, weights, biases, transposed = call.args
        emit = Emitter(gm, total, total.meta[MODULE])
        arguments = (x, weights[0], biases[0], transposed[0], residual)  # type: ignore[index]
        node = emit(LINEAR_RESIDUAL, *arguments, *[None] * 5, [])
        node.meta = {**total.meta, "val": node.meta["val"]}
        total.replace_all_uses_with(node)
        _erase(gm, total, layer, call)
        return


def _layer(node: object, chosen: frozenset[str]) -> fx.Node | None:
    """The call that computes one layer, whose result ``node`` is, looked at in other shapes at most."""
    while isinstance(node, fx.Node) and len(node.users) == 1 and chosen.isdisjoint(node.meta.get(NAMES, ())):
        if node.target is LINEARS:
            weights = node.args[1]
            return node if isinstance(weights, (list, tuple)) and len(weights) == 1 else None
        if node.target is not operator.getitem and node.target not in RESHAPES:
            return None
        node = node.args[0]
    return None


def _fits(total: fx.Node, layer: object, residual: object, call: fx.Node) -> bool:
    """Whether both addends are of the sum's shape, ``[B, 1, N]``, and dtype, and the layer has ``N`` columns."""
    wanted, made = tensor_of(total), val(call)[0]
    if wanted is None or len(shape_of(total)) != 3 or shape_of(total)[1] != 1 or made.shape[-1] != wanted.shape[-1]:
        return False
    parts = [tensor_of(part) for part in (layer, residual) if isinstance(part, fx.Node)]
    same = [part is not None and part.shape == wanted.shape and part.dtype == wanted.dtype for part in parts]
    return len(same) == 2 and all(same)


def _erase(gm: fx.GraphModule, total: fx.Node, layer: object, call: fx.Node) -> None:
    """Take out a sum and what computed its layer, up to the call."""
    gm.graph.erase_node(total)
    while isinstance(layer, fx.Node):
        below = None if layer is call else layer.args[0]
        gm.graph.erase_node(layer)
        layer = below
