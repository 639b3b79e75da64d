"""Where a program that nobody stops inside is cut, so that equal layers are compiled once.

A decode step always runs to its end, so its program need not be cut at its sites. It is cut once a layer, right behind
the last matrix product before the residual, or the op that adds it too: what such an op makes is written to memory in
any case, so nothing that could be fused is torn apart, and still layers that differ only in their weights are equal
graphs.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from djinn_fx.passes.graph import NAMES, aten, compute_nodes

#: Ops that Inductor calls as they are: their results are written to memory, whatever follows.
_PRODUCTS = frozenset(
    {
        aten.linear.default,
        aten.addmm.default,
        aten.mm.default,
        aten.bmm.default,
        aten.matmul.default,
        aten.baddbmm.default,
    }
)
_RESIDUAL = "resid_post."


def joints(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes behind which to cut: per block its last matrix product (with the items of its result)."""
    cuts: set[fx.Node] = set()
    product: fx.Node | None = None
    for node in compute_nodes(gm):
        if any(name.startswith(_RESIDUAL) for name in node.meta.get(NAMES, ())):
            product = node if is_product(node) else product
            cuts |= {product} if product is not None else set()
            product = None
        elif is_product(node) or (node.target is operator.getitem and product is node.args[0]):
            product = node
    return cuts


def is_product(node: fx.Node) -> bool:
    """Whether a node is a matrix product, or an op of ours."""
    ours = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "djinn"
    return node.target in _PRODUCTS or ours
